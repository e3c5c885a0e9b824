"""What several adapters become in one place of the model, each being a difference from the base there.

Over a layer with weight M every update of ours has the form  gain * M + P - M,  with P = gain * U V, U (d_out, k), V (k, d_in)
and a gain per output row: 1 for LoRA, m / n for DoRA. So an update is two differences from the base: gain - 1, and the
low-rank P, which for LoRA is dW itself. A method of methods.py makes one of each out of those of several adapters. A weighted
sum of low-rank P has the same form, so that it is exact for mixed ranks, scalings, variants and starts; the P of TIES and
DARE, which take single entries, is cut to a rank by its singular values. In every case one adapter of weight 1 is itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.lora.layer import AdapterHost, Layer
from lorakit.lora.methods import METHODS, add, keep
from lorakit.lora.places import BiasHost, RowsHost, TrainedRows
from lorakit.lora.updates import UPDATES, DoRA, LoRA
from lorakit.lora.variants import Factors, named_generator, truncated


class Kind(NamedTuple):
    """What every layer of the result has, as one LoraConfig says it of all layers."""

    dora: bool  # as soon as one of the adapters is DoRA anywhere
    lora_bias: bool  # a bias of its own, when a layer without one needs it
    base_bias: bool  # otherwise the layer's own, when there is any difference to hold


@dataclass(frozen=True)
class Recipe:
    """What was asked of `combine`, the same for every tensor of the model."""

    shares: Mapping[str, float]  # adapter -> weight
    method: str
    density: float
    r: int | None
    seed: int
    kind: Kind

    @property
    def is_sum(self) -> bool:
        """Whether the method is a plain weighted sum, so that low rank stays low rank."""
        return METHODS[self.method] == (keep, add)

    def merged(self, what: str, differences: Mapping[str, Tensor]) -> Tensor:
        """One difference out of one per adapter. What is drawn depends on the seed, the adapter and `what` alone."""
        prune, merge = METHODS[self.method]
        pruned = {
            name: prune(difference, self.density, named_generator(self.seed, f"{what}:{name}"))
            for name, difference in differences.items()
        }
        return merge(torch.stack([self.shares[name] * difference for name, difference in pruned.items()]))


def combined_update(path: str, layer: Layer, names: Sequence[str], recipe: Recipe) -> tuple[LoRA, float]:
    """The update of one layer, and the share of P that its rank could not hold."""
    updates = {name: layer.lora(name) for name in names}
    gains = {name: _gain(layer, update) for name, update in updates.items()}
    gain = 1 + recipe.merged(f"{path}.gain", {name: gains[name] - 1 for name in names})  # (d_out,)
    if bool((gain <= 0).any()):
        raise ConfigError(f"combine: at {path} the weights turn a DoRA magnitude to 0 or below; use smaller weights")
    parts = {
        name: Factors(update.factors().A, update.scaling * gains[name][:, None] * update.factors().B)
        for name, update in updates.items()
    }
    (V, U), error = _low_rank(path, parts, recipe)
    U = U / gain[:, None]
    dropout = next(iter(updates.values())).dropout.p
    start = Factors(V, torch.zeros_like(U))  # B is set after: a B that is not zero at birth is taken for a start
    update = UPDATES["dora" if recipe.kind.dora else "lora"](start, 1.0, dropout, layer).to(U.device)
    update.lora_B.copy_(U)
    if isinstance(update, DoRA):
        update.magnitude.copy_(gain * update.row_norms(layer.matrix()))
    _combine_biases(path, layer, update, updates, recipe)
    return update, error


def _combine_biases(path: str, layer: Layer, made: LoRA, updates: Mapping[str, LoRA], recipe: Recipe) -> None:
    made.train_biases(layer, recipe.kind.lora_bias, recipe.kind.base_bias)
    offsets = {name: offset for name, update in updates.items() if (offset := update.offset(layer)) is not None}
    trained = made.base_bias if made.lora_bias is None else made.lora_bias
    if offsets and trained is not None:
        trained.add_(recipe.merged(f"{path}.bias", offsets))


def _gain(layer: Layer, update: LoRA) -> Tensor:
    """The gain of each output row: m / n for DoRA, 1 for LoRA. Shapes: (d_out,)."""
    return update.gain(layer) if isinstance(update, DoRA) else torch.ones_like(update.lora_B[:, 0])


def _low_rank(path: str, parts: Mapping[str, Factors], recipe: Recipe) -> tuple[Factors, float]:
    """The combined P in two factors, and the share of its norm that is lost."""
    total = sum(len(part.A) for part in parts.values())
    if not recipe.is_sum:
        return truncated(
            recipe.merged(path, {name: part.B @ part.A for name, part in parts.items()}), recipe.r or total
        )
    V = torch.cat([part.A for part in parts.values()])  # (k, d_in)
    U = torch.cat([recipe.shares[name] * part.B for name, part in parts.items()], dim=1)  # (d_out, k)
    if recipe.r is None or total <= recipe.r:
        return Factors(V, U), 0.0
    Qu, Ru = torch.linalg.qr(U)
    Qv, Rv = torch.linalg.qr(V.T)
    core, error = truncated(Ru @ Rv.T, recipe.r)  # (k, k), with the singular values of U V
    return Factors(core.A @ Qv.T, Qu @ core.B), error


def combined_module(path: str, host: AdapterHost, names: Sequence[str], recipe: Recipe) -> nn.Module:
    """base + the combined difference from it, tensor by tensor, for a module or a bias that is trained in full.

    In fp64, so that of one adapter with weight 1 it is that adapter's bit for bit.
    """
    copies = {name: dict(host.adapters[name].named_parameters()) for name in names}
    made = copy.deepcopy(host.adapters[names[0]])
    base = {"base_bias": host.base.bias} if isinstance(host, BiasHost) else dict(host.base.named_parameters())
    for key, parameter in made.named_parameters():
        if any(copies[name][key].shape != parameter.shape for name in names):
            raise ConfigError(f"combine: {path}.{key} has another shape in another adapter (other labels?)")
        start = base[key].double()
        differences = {name: copies[name][key].double() - start for name in names}
        parameter.copy_(start + recipe.merged(f"{path}.{key}", differences))
    for key, buffer in made.named_buffers():
        if any(not torch.equal(host.adapters[name].get_buffer(key), buffer) for name in names):
            raise ConfigError(f"combine: {path}.{key} differs, and running statistics of two adapters make no third")
    return made


def combined_rows(path: str, host: RowsHost, names: Sequence[str], recipe: Recipe) -> TrainedRows:
    """The rows that any of the adapters trains; to a row that one leaves alone, it adds no difference."""
    indices = list(dict.fromkeys(i for name in names for i in host.trained(name).indices.tolist()))
    made = TrainedRows(host.base.weight, indices)
    start = made.rows.double()
    differences = {}
    for name in names:
        trained = host.trained(name)
        differences[name] = torch.zeros_like(start)
        places = made.slots[trained.indices]
        differences[name][places] = trained.rows.double() - start[places]
    made.rows.copy_(start + recipe.merged(path, differences))
    return made
