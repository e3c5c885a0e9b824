"""Operations on whole adapters: merge into the base and unmerge, move to another model, replace by another."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lorakit.lora.config import LoraConfig
from lorakit.lora.inject import (
    adapter_names,
    adapter_parameters,
    arrange,
    check_known,
    check_new_name,
    check_unmerged,
    delete_adapter,
    hosted,
    put,
    routing_of,
    unload,
)
from lorakit.lora.layers import Routing, hosts
from lorakit.lora.peft_files import load_adapter
from lorakit.lora.quantization import dequantize
from lorakit.lora.special_layers import set_fast_paths

# Merging: unmerging is exact, bit for bit


@torch.no_grad()
def merge(model: nn.Module, name: str = "default") -> None:
    """Fold the adapter into the base: W becomes W + s B A. The old weights are kept, so `unmerge` is exact.

    Over a quantised W the sum is dense, in the dtype of W's products; `unmerge` restores the codes.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> merge(model)
    >>> unmerge(model)

    Raises:
        AdapterError: the adapter is unknown, one is merged already, or a merged weight would not be finite;
            in every case the model stays as it was.
    """
    check_known(model, name)
    done = []
    try:
        for _, host in hosts(model):
            host.merge(name)
            done.append(host)
    except Exception:
        for host in done:
            host.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is the same tensor as before.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> before = model.bert.encoder.layer[0].attention.self.query.base.weight
    >>> merge(model)
    >>> unmerge(model)
    >>> model.bert.encoder.layer[0].attention.self.query.base.weight is before
    True
    """
    for _, host in hosts(model):
        host.unmerge()


def merge_and_unload(model: nn.Module, name: str = "default") -> nn.Module:
    """The plain model with the adapter merged, without LoRA layers or quantised weights.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> type(merge_and_unload(model).bert.encoder.layer[0].attention.self.query)
    <class 'torch.nn.modules.linear.Linear'>
    """
    merge(model, name)
    return dequantize(unload(model))


# Moving: an adapter is built on a copy of the base model, then moved into the model that serves


def move_adapter(source: nn.Module, model: nn.Module, name: str, old: str = "default") -> None:
    """Move the adapter `old` of one model to another model of the same architecture, as `name`.

    Its tensors stay the same objects, trainable or not as they were; the layers of the two models must match.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> move_adapter(model, other_model, "reviews")
    >>> adapter_names(other_model)
    ['reviews']

    Raises:
        AdapterError: there is no such adapter, or one is merged.
        ConfigError: the name is taken or not usable, or a layer serves another adapter differently.
    """
    check_known(source, old)
    check_new_name(model, name)
    check_unmerged(model)
    routing = routing_of(model) or Routing()
    for path, host in hosts(source, old):
        hosted(model, path, type(host), routing).adapters[name] = host.adapters[old]
    set_fast_paths(model)
    delete_adapter(source, old)


# Replacing: if anything is wrong with the new adapter, the old one stays


def swap_adapter(model: nn.Module, folder: Path, name: str = "default") -> LoraConfig:
    """Replace the adapter `name`, weights and settings, by the one in a folder; returns the new settings.

    Ranks, targets, variants and saved modules may all differ; the model is then as after a fresh `load_adapter`.
    Routing and what is trained stay as they were, and a layer that both adapt keeps its wrapper. An
    optimizer of the old adapter holds tensors that are no longer in the model.

    >>> config = LoraConfig(r=4, target_modules=("query", "value"))
    >>> targets = add_adapter(model, config)
    >>> save_adapter(model, folder, config)
    >>> swap_adapter(model, folder) == config
    True

    Raises:
        AdapterError: there is no such adapter, one is merged, or the folder does not fit this model (see load_adapter);
            the model then is as before, bit for bit.
    """
    check_known(model, name)
    check_unmerged(model)
    routing = hosts(model, name)[0][1].routing
    segments = routing.segments
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    is_trained = not trainable.isdisjoint(adapter_parameters(model, name).values())
    # The old one is removed first, since the new one may use a layer differently (a head adapted, not saved).
    places = [(host, dict(host.adapters)) for _, host in hosts(model, name)]
    delete_adapter(model, name)
    try:
        config = load_adapter(model, folder, name)
        now = {host.base: host for _, host in hosts(model, name)}
        for old, parts in places:  # the new updates go into the old hosts, in the old order, where the kind is the same
            new = now.get(old.base)
            if new is not None and type(new) is type(old):
                arrange(old, {**parts, name: new.adapters[name]})
                if new is not old:
                    put(model, new, old)
    except BaseException:
        if name in adapter_names(model):  # the new one, half inserted
            delete_adapter(model, name)
        for old, parts in places:
            if not old.adapters:
                put(model, old.base, old)
            arrange(old, parts)
        set_fast_paths(model)
        raise
    finally:
        for _, host in hosts(model):
            host.routing = routing  # a model without an adapter was given a new one
        routing.segments = segments
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(is_trained)
    return config
