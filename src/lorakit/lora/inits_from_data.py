"""Initialisations from data: from the inputs or gradients of each layer on some batches.

Each is a function and a line in DATA_INITS. They use the base model only, in eval mode, and do not change it.
Shapes: x (B, ..., d_in), W and its gradient G (d_out, d_in), A (r, d_in), B (d_out, r).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.lora.config import LoraConfig
from lorakit.lora.inits import Factors, named_generator, randomised_svd
from lorakit.lora.inject import disabled
from lorakit.lora.targets import adaptable_layers, check_ranks, select_targets
from lorakit.lora.weight_layouts import LINEAR, TRANSPOSED, geometry_of, matrix_shape

Batch = Mapping[str, Tensor]
NITER = 4  # power iterations; LoRA-GA's own code takes 4


class Data(NamedTuple):
    """Batches of the training data, and the loss function.

    >>> data = Data([batch], lambda batch: model(**batch).logits.sum())
    """

    batches: Iterable[Batch]  # positions where a batch's `attention_mask` (B, T) is 0 are left out
    loss: Callable[[Batch], Tensor]  # a scalar of any scale


class Place(NamedTuple):
    """A layer of the base model to adapt, and its rank."""

    path: str
    layer: Any  # a kind in weight_layouts.py
    r: int


def eva(places: Sequence[Place], data: Data, seed: int, rho: float = 2.0) -> dict[str, Factors]:
    """A from the principal directions of a layer's inputs, B zero (Paischer et al. 2024, arXiv:2410.07170).

    The incremental SVD of section 3.1, and the ranks of section 3.3: of all layers' directions, those that explain
    the largest shares of their layer's variance get the total rank, at most rho r per layer. A layer without any is left
    out. Difference: no early stop, all batches are used.

    Raises:
        ConfigError: there is no batch, a layer is not linear, or no batch reaches a layer.
    """
    seen = {}
    for p in places:
        if geometry_of(p.layer) not in (LINEAR, TRANSPOSED):
            kind = type(p.layer).__name__
            raise ConfigError(f"init_lora_weights = 'eva': {p.path} is not a linear layer but {kind}; exclude it")
        most = min(round(rho * p.r), *matrix_shape(p.layer))
        seen[p.path] = _Variation(most, named_generator(seed, p.path))
    for batch in data.batches:
        hooks = [p.layer.register_forward_pre_hook(_watch(seen[p.path], batch.get("attention_mask"))) for p in places]
        try:
            with torch.no_grad():
                data.loss(batch)
        finally:
            for hook in hooks:
                hook.remove()
    if missed := [path for path, variation in seen.items() if not variation.rows]:
        raise ConfigError(f"init_lora_weights = 'eva': no input reached {missed[0]} in the batches; exclude it")
    shares = [(share, path) for path, variation in seen.items() for share in variation.shares()]
    shares.sort(key=lambda entry: -entry[0])  # stable: ties keep the model's order
    chosen = [path for _, path in shares[: sum(p.r for p in places)]]
    return {
        p.path: Factors(seen[p.path].Vh[:r].contiguous().cpu(), torch.zeros(matrix_shape(p.layer)[0], r))
        for p in places
        if (r := chosen.count(p.path))
    }


def _watch(variation: _Variation, mask: Tensor | None) -> Callable[[Any, tuple[Tensor, ...]], None]:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].float()
        fits = mask is not None and mask.shape == x.shape[:-1]
        variation.add(x[mask.bool()] if fits and mask is not None else x.flatten(0, -2))

    return hook


class _Variation:
    """The k principal directions of all rows so far, about their mean (Ross et al. 2008, IJCV 77, section 3.1).

    Twice as many are tracked, so that directions that become important later are not lost.
    """

    def __init__(self, k: int, generator: torch.Generator) -> None:
        self.k = k
        self.generator = generator
        self.rows = 0
        self.mean = self.total = torch.zeros(())  # total: the sum of squares about the mean
        self.S, self.Vh = torch.zeros(0), torch.zeros(0)

    def add(self, X: Tensor) -> None:
        """Add rows. Shapes: X (n, d_in)."""
        if not len(X):
            return
        mean, rows = X.mean(0), self.rows + len(X)
        parts = [X - mean]
        if self.rows:
            shift = mean - self.mean
            parts += [(shift * math.sqrt(self.rows * len(X) / rows))[None], self.S[:, None] * self.Vh]
            mean = self.mean + shift * (len(X) / rows)
        self.total = self.total + sum(part.square().sum() for part in parts[:2])
        _, self.S, self.Vh = randomised_svd(torch.cat(parts), 2 * self.k, NITER, self.generator)
        self.mean, self.rows = mean, rows

    def shares(self) -> list[float]:
        """The share of the variance that each principal direction explains, the largest first."""
        total = self.total.clamp_min(torch.finfo(torch.float32).tiny)
        return [float(share) for share in self.S[: self.k].square() / total]


def lora_ga(places: Sequence[Place], data: Data, seed: int, gamma: float = 16.0) -> dict[str, Factors]:
    """A and B from the gradient's singular vectors, so that the first step approximates that of full fine-tuning.

    Wang et al. 2024, arXiv:2407.05000, theorem 3.1 and algorithm 1: G = U S V^T gives A = c V_1..r^T and
    B = c U_r+1..2r with c = d_out^(1/4) / sqrt(gamma) (section 3.3). The paper then subtracts s B A from W; here W
    stays and the layer subtracts the start. Differences: the gradient is computed in eval mode; if a layer has fewer than 2r
    directions, B takes the last r. peft 0.21 also multiplies B by S and leaves A at length 1; the paper does not.

    Raises:
        ConfigError: there is no batch, a weight is not floating-point, or no gradient reaches a layer.
    """
    gradients = _gradients(places, data)
    factors = {}
    for p in places:
        U, _, Vh = randomised_svd(gradients[p.path], 2 * p.r, NITER, named_generator(seed, p.path))
        c = len(U) ** 0.25 / math.sqrt(gamma)
        factors[p.path] = Factors((c * Vh[: p.r]).contiguous().cpu(), (c * U[:, -p.r :]).contiguous().cpu())
    return factors


def _gradients(places: Sequence[Place], data: Data) -> dict[str, Tensor]:
    """The summed gradient of each layer's matrix, in fp32. Shapes: (d_out, d_in)."""
    weights = [p.layer.weight for p in places]
    needed = [weight.requires_grad for weight in weights]
    sums: dict[str, Tensor] = {}
    for place, weight in zip(places, weights, strict=True):
        if not weight.is_floating_point():
            raise ConfigError(f"init_lora_weights = 'lora_ga': {place.path} is quantised and has no gradient")
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in data.batches:
            with torch.enable_grad():
                grads = torch.autograd.grad(data.loss(batch), weights, allow_unused=True)
            for place, gradient in zip(places, grads, strict=True):
                if gradient is not None:
                    sums[place.path] = sums.get(place.path, 0) + gradient.float()
    finally:
        for weight, before in zip(weights, needed, strict=True):
            weight.requires_grad_(before)
    if missed := [p.path for p in places if not bool(sums.get(p.path, torch.zeros(1)).any())]:
        raise ConfigError(f"init_lora_weights = 'lora_ga': no gradient reached {missed[0]} in the batches; exclude it")
    geometries = {p.path: geometry_of(p.layer) for p in places}
    return {path: g.matrix(SimpleNamespace(weight=sums[path])) for path, g in geometries.items() if g is not None}


DataInit = Callable[[Sequence[Place], Data, int], dict[str, Factors]]

DATA_INITS: Mapping[str, DataInit] = {"eva": eva, "lora_ga": lora_ga}


# The start from data: layers, ranks and factors from some batches, before the adapter is added.


class Start(NamedTuple):
    """The start of an adapter from data: its settings, with the resulting ranks, and factors by path.

    >>> config = LoraConfig(r=4, init_lora_weights="eva", target_modules=("query",))
    >>> start = start_from_data(model, config, Data([batch], lambda batch: model(**batch).logits.sum()))
    >>> list(start.factors)[0]
    'bert.encoder.layer.0.attention.self.query'
    """

    config: LoraConfig
    factors: Mapping[str, Factors]


def start_from_data(model: nn.Module, config: LoraConfig, data: Data, seed: int = 0) -> Start:
    """The start by `init_lora_weights = "eva"` or "lora_ga" on some batches; the model is unchanged.

    To use it: `add_adapter(model, start.config, factors=start.factors)`, and save with `start.config`.

    >>> config = LoraConfig(r=4, init_lora_weights="eva", target_modules=("query",))
    >>> start = start_from_data(model, config, Data([batch], lambda batch: model(**batch).logits.sum()))
    >>> targets = add_adapter(model, start.config, factors=start.factors)

    Raises:
        ConfigError: the initialisation needs no data, or cannot be computed from these batches (see eva and lora_ga).
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
    ranks = {target.path: len(factors[target.path].A) for target in targets if target.path in factors}
    if ranks == {target.path: target.r for target in targets}:
        return Start(config, factors)
    power = 0.5 if config.use_rslora else 1  # with other layers and ranks each layer's scaling stays
    alphas = {t.path: t.alpha * (ranks[t.path] / t.r) ** power for t in targets if t.path in ranks}
    config = dataclasses.replace(
        config,
        target_modules=tuple(ranks),
        exclude_modules=(),
        layers_to_transform=None,
        rank_pattern={path: r for path, r in ranks.items() if r != config.r},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )
    return Start(config, factors)
