"""A start that comes from data: which layers, ranks and factors some batches call for, before anything is injected."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from lorakit.errors import ConfigError
from lorakit.lora.config import LoraConfig
from lorakit.lora.data_inits import DATA_INITS, Data, Place
from lorakit.lora.inject import disabled
from lorakit.lora.targets import Target, adaptable_layers, check_ranks, select_targets
from lorakit.lora.variants import Factors


class Start(NamedTuple):
    """Where an adapter begins that looked at data first: its settings, with the ranks found, and factors by path."""

    config: LoraConfig
    factors: Mapping[str, Factors]


def start_from_data(model: nn.Module, config: LoraConfig, data: Data, seed: int = 0) -> Start:
    """What `init_lora_weights = "eva"` or "lora_ga" finds in some batches; the model is left as it was.

    To use it: `add_adapter(model, start.config, factors=start.factors)`, and save with `start.config`.

    Raises:
        ConfigError: the initialisation needs no data, or cannot be computed from these batches (see data_inits.py).
    """
    init = DATA_INITS.get(config.init_lora_weights)
    if init is None:
        known = " and ".join(map(repr, DATA_INITS))
        raise ConfigError(f"init_lora_weights = {config.init_lora_weights!r} needs no data; {known} do")
    targets = select_targets(model, config)
    check_ranks(model, targets)
    layers, training = adaptable_layers(model), model.training
    places = [Place(t.path, layers.get(t.path), t.r) for t in targets]
    if fused := [place.path for place in places if isinstance(place.layer, nn.MultiheadAttention)]:
        raise ConfigError(f"init_lora_weights = {config.init_lora_weights!r}: {fused[0]} is fused; exclude it")
    try:
        model.eval()
        with disabled(model):
            factors = init(places, data, seed)
    finally:
        model.train(training)
    return Start(_with_ranks(config, targets, factors), factors)


def _with_ranks(config: LoraConfig, targets: Iterable[Target], factors: Mapping[str, Factors]) -> LoraConfig:
    """The settings with the factors' layers and ranks in place of the asked ones; each layer's scaling stays."""
    ranks = {target.path: len(factors[target.path].A) for target in targets if target.path in factors}
    if ranks == {target.path: target.r for target in targets}:
        return config
    power = 0.5 if config.use_rslora else 1
    alphas = {t.path: t.alpha * (ranks[t.path] / t.r) ** power for t in targets if t.path in ranks}
    return dataclasses.replace(
        config,
        target_modules=tuple(ranks),
        exclude_modules=(),
        layers_to_transform=None,
        rank_pattern={path: r for path, r in ranks.items() if r != config.r},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )
