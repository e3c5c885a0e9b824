"""One adapter out of several: a weighted sum that is exact, or one of lower rank whose error is reported.

Over a layer with weight M every update of ours has the form  gain * (M + U V) - M,  with U (d_out, k), V (k, d_in) and a gain
per output row: 1 for LoRA, m / n for DoRA. A weighted sum of such updates has the same form, so it is exact for mixed
ranks, scalings, variants and starts, and `combine([x], [1])` is x.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.lora.inject import check_known, check_new_name, check_unmerged, set_adapter
from lorakit.lora.layer import Layer, SavedModule, hosts
from lorakit.lora.updates import DoRA, LoRA
from lorakit.lora.variants import Factors


@dataclass(frozen=True)
class Combined:
    """What `combine` made: the largest rank in it, and how much of the exact sum was lost, layer by layer."""

    r: int
    errors: Mapping[str, float]  # |U V - kept| / |U V| in the Frobenius norm; 0 where nothing was cut


@torch.no_grad()
def combine(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], into: str, *, r: int | None = None
) -> Combined:
    """Add the adapter `into`, the weighted sum of others, and make it the active one.

    Without `r` the sum is exact, of a rank that is the sum of theirs. With `r` each layer keeps the r largest
    singular directions. Modules trained in full become base + the weighted sum of their differences from the base.

    Raises:
        ConfigError: numbers of names and weights differ, a weight is not finite, the sum turns a DoRA gain to 0 or
            below, or the modules that two adapters save differ in shape.
        AdapterError: an adapter is unknown or merged.
    """
    _check(model, names, weights)
    check_new_name(model, into)
    check_unmerged(model)
    shares = {name: sum(w for n, w in zip(names, weights, strict=True) if n == name) for name in names}
    parts: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    for path, host in hosts(model):
        here = {name: weight for name, weight in shares.items() if name in host.adapters}
        if here and isinstance(host, Layer):
            parts[path], errors[path] = _combined_update(path, host, here, r)
        elif here and isinstance(host, SavedModule):
            parts[path] = _combined_module(path, host, here)
    for path, host in hosts(model):
        if path in parts:
            host.adapters[into] = parts[path].train(model.training)
    set_adapter(model, into)
    ranks = [len(part.lora_A) for part in parts.values() if isinstance(part, LoRA)]
    return Combined(max(ranks, default=0), errors)


def _check(model: nn.Module, names: Sequence[str], weights: Sequence[float]) -> None:
    if not names or len(names) != len(weights):
        raise ConfigError(f"combine: {len(names)} adapters but {len(weights)} weights")
    for name, weight in zip(names, weights, strict=True):
        check_known(model, name)
        if not math.isfinite(weight):
            raise ConfigError(f"combine: the weight of {name!r} is {weight}")


def _combined_update(path: str, layer: Layer, shares: Mapping[str, float], r: int | None) -> tuple[LoRA, float]:
    gains = {name: _gain(layer, layer.lora(name)) for name in shares}
    total = torch.stack([weight * (gains[name] - 1) for name, weight in shares.items()]).sum(0) + 1  # (d_out,)
    if bool((total <= 0).any()):
        raise ConfigError(f"combine: at {path} the weights turn a DoRA magnitude to 0 or below; use smaller weights")
    scaled = {name: weight * layer.lora(name).scaling * gains[name] / total for name, weight in shares.items()}
    factors = {name: layer.lora(name).factors() for name in shares}
    V = torch.cat([factors[name].A for name in shares])  # (k, d_in)
    U = torch.cat([scaled[name][:, None] * factors[name].B for name in shares], dim=1)  # (d_out, k)
    U, V, error = _cut(U, V, r)
    start = Factors(V, torch.zeros_like(U))  # B is set after: a B that is not zero at birth is taken for a start
    dropout = next(layer.lora(name).dropout.p for name in shares)
    if not any(isinstance(layer.lora(name), DoRA) for name in shares):
        update = LoRA(start, 1.0, dropout)
        update.lora_B.copy_(U)
        return update, error
    dora = DoRA(start, 1.0, dropout, layer).to(U.device)
    dora.lora_B.copy_(U)
    dora.magnitude.copy_(total * dora.row_norms(layer.matrix()))
    return dora, error


def _gain(layer: Layer, update: LoRA) -> Tensor:
    """The gain of each output row: m / n for DoRA, 1 for LoRA. Shapes: (d_out,)."""
    return update.gain(layer) if isinstance(update, DoRA) else torch.ones_like(update.lora_B[:, 0])


def _cut(U: Tensor, V: Tensor, r: int | None) -> tuple[Tensor, Tensor, float]:
    """U V with its r largest singular directions kept, and the share of its norm that is lost; by QR of the factors."""
    if r is None or len(V) <= r:
        return U, V, 0.0
    Qu, Ru = torch.linalg.qr(U)
    Qv, Rv = torch.linalg.qr(V.T)
    left, S, right = torch.linalg.svd(Ru @ Rv.T)
    norm = S.norm()
    lost = float(S[r:].norm() / norm) if norm > 0 else 0.0
    root = S[:r].sqrt()
    return Qu @ left[:, :r] * root, (root[:, None] * right[:r]) @ Qv.T, lost


def _combined_module(path: str, host: SavedModule, shares: Mapping[str, float]) -> nn.Module:
    """base + the weighted sum of the copies' differences from it; of one copy with weight 1, exactly that copy."""
    copies = {name: dict(host.adapters[name].named_parameters()) for name in shares}
    made = copy.deepcopy(host.adapters[next(iter(shares))])
    base = dict(host.base.named_parameters())
    for key, parameter in made.named_parameters():
        if any(copies[name][key].shape != parameter.shape for name in shares):
            raise ConfigError(f"combine: {path}.{key} has another shape in another adapter (other labels?)")
        rest = 1 - sum(shares.values())
        parameter.copy_(rest * base[key].float() + sum(w * copies[name][key] for name, w in shares.items()))
    return made
