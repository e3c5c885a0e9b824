"""Add adapters to a model and remove them: wrap, freeze, count, switch, disable, delete."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from lorakit.errors import AdapterError, ConfigError, did_you_mean
from lorakit.lora.config import DATA_INIT_NAMES, LoraConfig
from lorakit.lora.inits import Factors, find_init, named_generator
from lorakit.lora.layers import BASE, AdapterHost, Layer, LoRALinear, Routing, SavedModule, Segments, hosts
from lorakit.lora.quantization import is_quantized
from lorakit.lora.special_layers import Attention, BiasHost, RowsHost, TrainedRows, set_fast_paths
from lorakit.lora.targets import (
    Target,
    adaptable_layers,
    check_ranks,
    embeddings_in_place_of,
    plain,
    saved_modules,
    select_targets,
    tied_to,
    trainable_row_modules,
    walk,
)
from lorakit.lora.updates import UPDATES
from lorakit.lora.weight_layouts import matrix_shape

Put = TypeVar("Put", bound=nn.Module)
Host = TypeVar("Host", bound=AdapterHost)
LAYERS: Mapping[type[nn.Module], type[Layer]] = {nn.Linear: LoRALinear, nn.MultiheadAttention: Attention}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class ParameterCount(NamedTuple):
    """Numbers of scalars. `trainable` is the sum of `saved`, in modules trained in full, and `lora`, all others.

    >>> ParameterCount(lora=6_144, saved=770, total=22_700_000).trainable
    6914
    """

    lora: int
    saved: int
    total: int

    @property
    def trainable(self) -> int:
        return self.lora + self.saved


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    seed: int = 0,
    factors: Mapping[str, Factors] = MappingProxyType({}),
) -> list[Target]:
    """Freeze the model, add an adapter and make it the active one; returns the adapted layers.

    The model's output is exactly as before, since every update starts at zero. `factors`, by path, replace those
    of the initialisation (see start_from_data).

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> len(targets), targets[0].path
    (6, 'bert.encoder.layer.0.attention.self.query')

    Raises:
        ConfigError: the name is not usable or taken, a setting matches nothing (see select_targets), a rank
            exceeds its layer's smaller side, the initialisation needs data and there are no factors for a layer, or a module
            to train is never called by the model or has several names in it.
        AdapterError: an adapter is merged, so the base weights are not the original ones.
    """
    return insert_adapter(model, config, name, seed, factors, is_new=True)


def insert_adapter(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    seed: int = 0,
    factors: Mapping[str, Factors] = MappingProxyType({}),
    *,
    is_new: bool = False,
) -> list[Target]:
    """Like add_adapter, for factors from a file unless it `is_new`: a rank above a layer's smaller side is allowed.

    peft allows such ranks, and an update with a start is saved with twice its rank.
    """
    check_new_name(model, name)
    check_unmerged(model)
    targets, saved = select_targets(model, config), saved_modules(model, config.modules_to_save)
    if is_new:
        check_ranks(model, targets)
        main, called = embeddings_in_place_of(model)
        if main in saved:
            raise ConfigError(
                f"modules_to_save: the model never calls {main}, whose weight is used through {' and '.join(called)}; "
                "name those"
            )
    layers = adaptable_layers(model)
    for target in targets:
        if target.path in factors:
            d_out, d_in = matrix_shape(layers[target.path])
            shapes = tuple(tuple(factor.shape) for factor in factors[target.path])
            if shapes != ((target.r, d_in), (d_out, target.r)):
                raise ConfigError(f"factors: those of {target.path} have shapes {shapes}; its rank is {target.r}")
        elif config.init_lora_weights in DATA_INIT_NAMES:
            raise ConfigError(
                f"init_lora_weights = {config.init_lora_weights!r} is computed from data: "
                f"pass the factors of start_from_data to add_adapter; there are none for {target.path}"
            )
    for path in saved:
        module = model.get_submodule(path)
        if not isinstance(module, SavedModule) and hosts(module):
            raise ConfigError(f"modules_to_save: {path} holds LoRA layers of another adapter")
        if any(is_quantized(inner) for inner in module.modules()):
            raise ConfigError(
                f"modules_to_save: {path} is quantised, so it cannot be trained; name it in quantize's skip"
            )
    rows = trainable_row_modules(model, config)
    paths = frozenset(target.path for target in targets)
    biases = biased_modules(model, config, paths, saved)
    if both := [path for path in rows if path in paths or path in saved]:
        raise ConfigError(f"trainable_token_indices: {both[0]} is already adapted or saved as a whole")
    trained, names = {*paths, *saved, *biases, *rows}, dict[nn.Module, str]()
    for path, module in model.named_modules(remove_duplicate=False):
        first = names.setdefault(module, path)
        if first != path and not trained.isdisjoint((path, first)):
            raise ConfigError(
                f"{first} is also {path}, and an adapter file stores each module under one name: exclude it, or copy it"
            )
    # nothing is refused from here on, but a layer that serves another adapter differently
    routing = routing_of(model) or Routing()
    model.requires_grad_(False)
    for path in saved:
        hosted(model, path, SavedModule, routing).add(name)
    for path in biases:
        hosted(model, path, BiasHost, routing).add(name)
    for path, indices in rows.items():
        tied = tied_to(model, path)
        own_rows = TrainedRows(plain(model.get_submodule(path)).weight, indices)
        for place in tied:  # all modules that share the embedding's weight share the trained rows
            hosted(model, place, RowsHost, routing).adapters[name] = own_rows
    for target in targets:
        kind = LAYERS.get(type(model.get_submodule(target.path)), Layer)
        layer = hosted(model, target.path, kind, routing)
        scaling, start = config.scaling(target.alpha, target.r), factors.get(target.path)
        if start is None:
            init = find_init(config.init_lora_weights)
            assert init is not None, "checked by LoraConfig and above"
            start = init(layer.matrix().cpu(), target.r, scaling, named_generator(seed, target.path))
        update = UPDATES[config.update](start, scaling, config.lora_dropout, layer)
        if target.parts:  # of q, k and v in one projection
            third = len(layer.matrix()) // 3
            update.keep_rows(torch.cat([torch.arange(third) + third * "qkv".index(part) for part in target.parts]))
        update.train_biases(layer, config.lora_bias, config.bias != "none")
        layer.adapters[name] = update.train(model.training).to(layer.weight.device)
    set_fast_paths(model)
    set_adapter(model, name)
    return targets


def biased_modules(model: nn.Module, config: LoraConfig, targets: Set[str], saved: Sequence[str]) -> list[str]:
    """The modules other than the targets whose bias is trained with bias = "all": as in peft, each parameter named bias."""
    chosen: list[str] = []
    for path, module in walk(model) if config.bias == "all" else ():
        base = plain(module)
        fused = isinstance(base, nn.MultiheadAttention) and base.in_proj_bias is not None
        if any(path == s or path.startswith(s + ".") for s in saved) or path in targets:
            continue
        if fused or base._parameters.get("bias") is not None:
            if next(base.children(), None) is not None:
                own = "in_proj_bias" if fused else "bias"
                raise ConfigError(f"bias = 'all': {path}.{own} cannot be trained by itself; use 'lora_only'")
            chosen.append(path)
    return chosen


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise a ConfigError unless `name` can be used for another adapter."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"adapter name {name!r}: use letters, digits, '-' and '_', at most 64 of them")
    if hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"adapter name {name!r} is an attribute of every torch module; choose another")
    if name in adapter_names(model):
        raise ConfigError(f"adapter {name!r} exists already; delete it first or choose another name")


def hosted(model: nn.Module, path: str, kind: type[Host], routing: Routing) -> Host:
    """The host at a path, created if there is none."""
    module = model.get_submodule(path)
    if not isinstance(module, AdapterHost):
        return put(model, module, kind(module, routing))
    if not isinstance(module, kind):
        raise ConfigError(f"{path} serves another adapter differently ({type(module).__name__}); use two models")
    return module


def put(model: nn.Module, old: nn.Module, new: Put) -> Put:
    """Replace `old` by `new` under each of its names."""
    parents, met = [model], {model, new}
    for parent in parents:  # the list grows; calling model.modules() for each adapted layer takes several times as long
        for name, child in [*parent._modules.items()]:
            if child is old:
                setattr(parent, name, new)
            elif child is not None and child not in met:
                met.add(child)
                parents.append(child)
    new.train(model.training)
    return new


def routing_of(model: nn.Module) -> Routing | None:
    """The routing that the model's hosts share, or None."""
    return next((module.routing for module in model.modules() if isinstance(module, AdapterHost)), None)


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters in the model, in the order of their hosts, and within a host in the order they were added.

    >>> for name in ("a", "b"):
    ...     targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), name)
    >>> adapter_names(model)
    ['a', 'b']
    """
    names: dict[str, None] = {}
    for _, host in hosts(model):
        names.update(dict.fromkeys(host.adapters))
    return list(names)


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The trainable tensors of one adapter by path: its A and B, and the modules it saves.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-3)
    >>> len(adapter_parameters(model))
    12
    """
    check_known(model, name)
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()  # tied modules share their update
    for path, host in hosts(model, name):
        for key, parameter in host.adapters[name].named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[f"{path}.{key}"] = parameter
    return parameters


def set_adapter(model: nn.Module, name: str) -> None:
    """Use one adapter for every example, and make only that one trainable.

    >>> for name in ("a", "b"):
    ...     targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), name)
    >>> set_adapter(model, "a")
    """
    check_known(model, name)
    check_unmerged(model)
    for _, host in hosts(model):
        host.routing.use(name)
        for other, part in host.adapters.items():
            part.requires_grad_(other == name)


@contextmanager
def routed(model: nn.Module, segments: Segments) -> Iterator[None]:
    """Within this context these segments (see Routing) choose the adapter of each example.

    >>> for name in ("a", "b"):
    ...     targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), name)
    >>> with routed(model, [("a", 1), ("b", 2)]):  # the first example of a batch of 3 by a, the others by b
    ...     logits = model(**batch).logits
    """
    routing = routing_of(model)
    if routing is None:  # only the base, perhaps trained in full
        yield
        return
    with routing.routed(segments):
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model behaves as the base model.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> with disabled(model):
    ...     base = model(**batch).logits
    """
    check_unmerged(model)
    with routed(model, []):
        yield


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter, and hosts without any adapter left, so that the base model is as it was.

    >>> for name in ("a", "b"):
    ...     targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), name)
    >>> delete_adapter(model, "b")
    >>> adapter_names(model)
    ['a']
    """
    check_known(model, name)
    check_unmerged(model)
    for _, host in hosts(model, name):
        del host.adapters[name]
        if not host.adapters:
            put(model, host, host.base)
    set_fast_paths(model)
    routing = routing_of(model)
    if routing is not None:
        routing.segments = [(BASE if adapter == name else adapter, rows) for adapter, rows in routing.segments]


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Rename an adapter; its position among the others and the examples it serves stay the same.

    >>> for name in ("a", "b"):
    ...     targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), name)
    >>> rename_adapter(model, "a", "reviews")
    >>> adapter_names(model)
    ['reviews', 'b']

    Raises:
        AdapterError: there is no such adapter, or one is merged.
        ConfigError: the new name is taken or not usable.
    """
    check_known(model, old)
    check_unmerged(model)
    check_new_name(model, new)
    for _, host in hosts(model, old):
        arrange(host, {new if name == old else name: part for name, part in host.adapters.items()})
    routing = routing_of(model)
    if routing is not None:
        routing.segments = [(new if adapter == old else adapter, rows) for adapter, rows in routing.segments]


def arrange(host: AdapterHost, parts: Mapping[str, nn.Module]) -> None:
    """Make a host hold these updates under these names, in this order."""
    host.adapters.clear()
    host.adapters.update(parts)


def unload(model: nn.Module) -> nn.Module:
    """Replace every host by the plain module that computes the same: the base, or the merged layer.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> list(hosts(unload(model)))
    []
    """
    for _, host in hosts(model):
        put(model, host, host.unwrapped())
    set_fast_paths(model)
    return model


def count_parameters(model: nn.Module, name: str = "default") -> ParameterCount:
    """The number of scalars that the adapter trains, and of all scalars including the base's (tied ones once).

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> count_parameters(model)
    ParameterCount(lora=1536, saved=0, total=28498)
    """
    names = adapter_parameters(model, name)
    saved = sum(
        p.numel()
        for _, host in hosts(model, name)
        if isinstance(host, SavedModule)
        for p in host.adapters[name].parameters()
    )
    lora = sum(p.numel() for p in names.values()) - saved
    # base parameters that the adapter replaces by its own copy are counted once, as the copy
    own = {id(p) for _, host in hosts(model) for p in host.adapters.parameters()}
    replaced = {id(p) for _, host in hosts(model, name) for p in host.replaced(name)}
    base = sum(p.numel() for p in model.parameters() if id(p) not in own | replaced)
    return ParameterCount(lora, saved, base + lora + saved)


def check_known(model: nn.Module, name: str) -> None:
    """Raise an AdapterError that lists the model's adapters, unless `name` is one of them."""
    names = adapter_names(model)
    if name not in names:
        raise AdapterError(f"no adapter {name!r} in this model; {did_you_mean(name, names)}")


def check_unmerged(model: nn.Module) -> None:
    """Raise an AdapterError if an adapter is merged, since the base weights are then not the original ones."""
    for _, host in hosts(model):
        if host.merged is not None:
            raise AdapterError(f"adapter {host.merged!r} is merged; unmerge it first")
