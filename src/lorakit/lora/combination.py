"""One adapter out of several: a weighted sum that is exact, or TIES and DARE at a rank whose error is reported.

How each place of the model is combined stands in differences.py, and what makes TIES of it in methods.py.

peft's `add_weighted_adapter` works on A and B apart. The sum of products is not the product of sums, so there TIES and DARE
act on numbers that are no part of the update; and its weighted sum is wrong for rsLoRA, DoRA and negative weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lorakit.errors import ConfigError, did_you_mean
from lorakit.lora.config import LoraConfig
from lorakit.lora.differences import Kind, Recipe, combined_module, combined_rows, combined_update
from lorakit.lora.inject import check_known, check_new_name, check_unmerged, set_adapter
from lorakit.lora.layer import Layer, SavedModule, hosts
from lorakit.lora.methods import METHODS, keep
from lorakit.lora.places import BiasHost, RowsHost, TrainedBias, TrainedRows
from lorakit.lora.targets import OUT_PROJ, select_targets
from lorakit.lora.updates import DoRA, LoRA


@dataclass(frozen=True)
class Combined:
    """What `combine` made: how much was lost in each layer, and the settings to save it with."""

    errors: Mapping[str, float]  # |P - kept| / |P| in the Frobenius norm; 0 where nothing was cut
    config: LoraConfig

    @property
    def r(self) -> int:
        """The largest rank in it; 0 if it is heads alone."""
        return self.config.r if self.errors else 0


@torch.no_grad()
def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    into: str,
    *,
    method: str = "linear",
    density: float | None = None,
    r: int | None = None,
    seed: int = 0,
) -> Combined:
    """Add the adapter `into`, made of others, and make it the active one.

    `method` is a key of METHODS: "linear" is the weighted sum; the others first keep a share `density` of each difference
    from the base, "dare" one drawn from `seed`, and "ties" then lets the signs vote. Without `r` each layer gets the sum of
    the adapters' ranks, which for "linear" is exact; with `r`, and after pruning, the largest singular directions are kept.
    Modules trained in full are combined entry by entry, with nothing to cut. A name given twice counts with both weights.

    Raises:
        ConfigError: numbers of names and weights differ, a weight is not finite, method, density or r is not usable, a
            DoRA gain would become 0 or less, or the modules that two adapters save differ in shape.
        AdapterError: an adapter is unknown or merged.
    """
    shares = _shares(model, names, weights)
    check_new_name(model, into)
    check_unmerged(model)
    recipe = Recipe(shares, method, _checked_density(method, density), _checked_rank(r), seed, _kind(model, shares))
    parts: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    rows: dict[nn.Module, TrainedRows] = {}  # modules that are tied share theirs
    for path, host in hosts(model):
        here = [name for name in shares if name in host.adapters]
        if not here:
            continue
        if isinstance(host, Layer):
            parts[path], errors[path] = combined_update(path, host, here, recipe)
        elif isinstance(host, RowsHost):
            shared = host.trained(here[0])
            parts[path] = rows[shared] = rows.get(shared) or combined_rows(path, host, here, recipe)
        elif isinstance(host, (SavedModule, BiasHost)):
            parts[path] = combined_module(path, host, here, recipe)
        else:
            raise ConfigError(f"combine: what {type(host).__name__} holds at {path} cannot be combined")
    made = Combined(errors, _config(model, parts, recipe.kind))
    for path, host in hosts(model):
        if path in parts:
            host.adapters[into] = parts[path].train(model.training)
    set_adapter(model, into)
    return made


def _shares(model: nn.Module, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    if not names or len(names) != len(weights):
        raise ConfigError(f"combine: {len(names)} adapters but {len(weights)} weights")
    for name, weight in zip(names, weights, strict=True):
        check_known(model, name)
        if not math.isfinite(weight):
            raise ConfigError(f"combine: the weight of {name!r} is {weight}")
    return {name: sum(w for n, w in zip(names, weights, strict=True) if n == name) for name in names}


def _checked_density(method: str, density: float | None) -> float:
    if method not in METHODS:
        raise ConfigError(f"combine: method {method!r} is not known; {did_you_mean(method, METHODS)}")
    if METHODS[method].prune is keep:
        if density not in (None, 1):
            raise ConfigError(
                f"combine: density = {density} means nothing to method {method!r}, which keeps everything"
            )
        return 1.0
    if density is None or not 0 < density <= 1:
        raise ConfigError(
            f"combine: density = {density}: method {method!r} needs the share of entries to keep, above 0 and at most 1"
        )
    return density


def _checked_rank(r: int | None) -> int | None:
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ConfigError(f"combine: r = {r!r}: a rank is a whole number from 1")
    return r


def _kind(model: nn.Module, names: Collection[str]) -> Kind:
    updates = [(h, h.lora(name)) for name in names for _, h in hosts(model, name) if isinstance(h, Layer)]
    shifted = [layer for layer, update in updates if update.offset(layer) is not None]
    without = any(getattr(layer.base, "bias", None) is None for layer in shifted)
    all_biases = any(isinstance(host, BiasHost) for name in names for _, host in hosts(model, name))
    dora = any(isinstance(update, DoRA) for _, update in updates)
    return Kind(dora, without, all_biases or (bool(shifted) and not without))


def _config(model: nn.Module, parts: Mapping[str, nn.Module], kind: Kind) -> LoraConfig:
    """Settings that describe the parts: each layer by its path, with its own rank and a scaling of 1."""
    updates = {path: part for path, part in parts.items() if isinstance(part, LoRA)}
    ranks = {path: len(update.lora_A) for path, update in updates.items()}
    named = {path: rank for path, rank in ranks.items() if not path.endswith(OUT_PROJ)}  # it comes with its attention
    r = max(ranks.values(), default=1)
    others = {f"^{re.escape(path)}": rank for path, rank in named.items() if rank != r}
    rows = {part: path for path, part in reversed(list(parts.items())) if isinstance(part, TrainedRows)}  # the first
    all_biases = any(isinstance(part, TrainedBias) for part in parts.values())
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=max((update.dropout.p for update in updates.values()), default=0.0),
        target_modules=tuple(named),
        rank_pattern=others,
        alpha_pattern=others,
        modules_to_save=tuple(p for p, part in parts.items() if not isinstance(part, (LoRA, TrainedRows, TrainedBias))),
        trainable_token_indices={path: tuple(part.indices.tolist()) for part, path in rows.items()},
        use_dora=kind.dora,
        lora_bias=kind.lora_bias,
        bias="all" if all_biases else "lora_only" if kind.base_bias else "none",
    )
    too_many = (target.path for target in select_targets(model, config) if target.path not in ranks)
    return replace(config, exclude_modules=tuple(too_many))  # a path may be the end of a longer one
