"""One adapter from several: an exact weighted sum, or TIES and DARE at a given rank with its error.

Over a layer with weight M every update has the form  gain * M + P - M,  with P = gain * U V, U (d_out, k), V (k, d_in)
and a gain per output row: 1 for LoRA, m / n for DoRA. So an update is two differences from the base: gain - 1, and the
low-rank P, which for LoRA is dW itself. A method combines both over several adapters. A weighted sum of low-rank P has
the same form, so it is exact for mixed ranks, scalings, variants and starts; TIES and DARE select single entries, so
their P is truncated to a rank by SVD. In every case one adapter with weight 1 gives itself.

peft's `add_weighted_adapter` works on A and B separately. The sum of products is not the product of sums, so there TIES and
DARE do not act on the update itself; and its weighted sum is wrong for rsLoRA, DoRA and negative weights.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError, did_you_mean
from lorakit.lora.config import LoraConfig
from lorakit.lora.inits import Factors, named_generator, truncated
from lorakit.lora.inject import check_known, check_new_name, check_unmerged, set_adapter
from lorakit.lora.layers import AdapterHost, Layer, SavedModule, hosts
from lorakit.lora.special_layers import BiasHost, RowsHost, TrainedBias, TrainedRows
from lorakit.lora.targets import OUT_PROJ, select_targets
from lorakit.lora.updates import UPDATES, DoRA, LoRA

# Methods: prune each difference by itself, then add the pruned ones. They only see tensors.
# Shapes: difference (...), K adapters, weighted differences (K, ...). Density: the share of entries kept, in (0, 1].


def keep(difference: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """All entries."""
    return difference


def trim(difference: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The largest entries by magnitude (TIES: Yadav et al. 2023, arXiv:2306.01708, algorithm 1, step 1).

    Difference: the paper ranks the entries of all layers together, this one tensor at a time, as peft does.
    """
    size = difference.abs().flatten()
    count = math.ceil(density * len(size))
    return difference * (difference.abs() >= size.kthvalue(len(size) - count + 1).values)


def drop(difference: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries drawn at random, divided by the density so that the expectation is the difference itself.

    DARE: Yu et al. 2023, arXiv:2311.03099, eq. 1, with drop rate p = 1 - density.
    """
    drawn = torch.rand(difference.shape, generator=generator) < density  # on the CPU: the same seed, the same draw
    return difference * drawn.to(difference.device) / density


def add(differences: Tensor) -> Tensor:
    """The sum (task arithmetic: Ilharco et al. 2022, arXiv:2212.04089)."""
    return differences.sum(0)


def elect(differences: Tensor) -> Tensor:
    """The mean of those that have the sign of the sum, entry by entry (TIES, algorithm 1, steps 2 and 3).

    With equal weights this is the paper's lambda times its merged vector. Difference for unequal weights: they count in the
    election too (peft elects before weighting, so a negative weight votes the wrong way).
    """
    agree = differences.sign() == differences.sum(0).sign()
    return (differences * agree).sum(0) / agree.sum(0).clamp_min(1)


Prune = Callable[[Tensor, float, torch.Generator], Tensor]
Merge = Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """A way to combine: how to prune each difference, and how to add the weighted ones."""

    prune: Prune
    merge: Merge


METHODS: Mapping[str, Method] = {
    "linear": Method(keep, add),
    "magnitude_prune": Method(trim, add),
    "ties": Method(trim, elect),
    "dare": Method(drop, add),
    "dare_ties": Method(drop, elect),
}


# Adapters


class Kind(NamedTuple):
    """Settings that all layers of the result share in one LoraConfig."""

    dora: bool  # if any adapter has DoRA anywhere
    lora_bias: bool  # a bias in the update, if a layer without one needs it
    base_bias: bool  # otherwise in the layer's own, if there is a difference

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> Kind:
        every = [(host, name) for name in names for _, host in hosts(model, name)]
        updates = [(host, host.lora(name)) for host, name in every if isinstance(host, Layer)]
        shifted = [layer for layer, update in updates if update.offset(layer) is not None]
        without = any(getattr(layer.base, "bias", None) is None for layer in shifted)
        all_biases = any(isinstance(host, BiasHost) for host, _ in every)
        dora = any(isinstance(update, DoRA) for _, update in updates)
        return cls(dora, without, all_biases or (bool(shifted) and not without))


@dataclass(frozen=True)
class Recipe:
    """The arguments of `combine`, the same for every tensor of the model."""

    shares: Mapping[str, float]  # adapter -> weight
    method: str
    density: float
    r: int | None
    seed: int
    kind: Kind

    def merged(self, what: str, differences: Mapping[str, Tensor]) -> Tensor:
        """Combine one difference per adapter. Random draws depend only on the seed, the adapter and `what`."""
        prune, merge = METHODS[self.method]
        pruned = {
            name: prune(difference, self.density, named_generator(self.seed, f"{what}:{name}"))
            for name, difference in differences.items()
        }
        return merge(torch.stack([self.shares[name] * difference for name, difference in pruned.items()]))


@dataclass(frozen=True)
class Combined:
    """The result of `combine`: the error in each layer, and the settings to save it with.

    >>> for name in ("a", "b"):
    ...     targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), name)
    >>> combined = combine(model, ["a", "b"], [0.5, 0.5], into="both", r=4)
    >>> save_adapter(model, folder, combined.config, name="both")
    """

    errors: Mapping[str, float]  # |P - kept| / |P| in the Frobenius norm; 0 if nothing was truncated
    config: LoraConfig

    @property
    def r(self) -> int:
        """The largest rank; 0 if it has only heads."""
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
    """Add the adapter `into`, combined from others, and make it the active one.

    `method` is a key of METHODS: "linear" is the weighted sum; the others first keep a share `density` of each difference
    from the base, "dare" one drawn from `seed`, and "ties" then lets the signs vote. Without `r` each layer gets the sum of
    the adapters' ranks, which for "linear" is exact; with `r`, and after pruning, the largest singular directions are kept.
    Modules trained in full are combined entry by entry without truncation. A repeated name counts with the sum of its weights.

    >>> for name in ("a", "b"):
    ...     targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), name)
    >>> combined = combine(model, ["a", "b"], [0.7, 0.3], into="both")
    >>> combined.config.r  # without r the ranks add up, and nothing is lost
    8

    Raises:
        ConfigError: numbers of names and weights differ, a weight is not finite, method, density or r is not usable, a
            DoRA gain would become 0 or less, or the modules that two adapters save differ in shape.
        AdapterError: an adapter is unknown or merged.
    """
    if not names or len(names) != len(weights):
        raise ConfigError(f"combine: {len(names)} adapters but {len(weights)} weights")
    for name, weight in zip(names, weights, strict=True):
        check_known(model, name)
        if not math.isfinite(weight):
            raise ConfigError(f"combine: the weight of {name!r} is {weight}")
    if method not in METHODS:
        raise ConfigError(f"combine: method {method!r} is not known; {did_you_mean(method, METHODS)}")
    if METHODS[method].prune is keep and density not in (None, 1):
        raise ConfigError(f"combine: density = {density} has no effect with method {method!r}, which keeps everything")
    density = 1.0 if METHODS[method].prune is keep else density
    if density is None or not 0 < density <= 1:
        raise ConfigError(
            f"combine: density = {density}: method {method!r} needs the share of entries to keep, above 0 and at most 1"
        )
    if r is not None and (type(r) is not int or r < 1):
        raise ConfigError(f"combine: r = {r!r}: a rank is a whole number from 1")
    check_new_name(model, into)
    check_unmerged(model)
    shares = {name: sum(w for n, w in zip(names, weights, strict=True) if n == name) for name in names}
    recipe = Recipe(shares, method, density, r, seed, Kind.of(model, names))
    parts: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    rows: dict[nn.Module, TrainedRows] = {}  # tied modules share their rows
    for path, host in hosts(model):
        here = [name for name in shares if name in host.adapters]
        if not here:
            continue
        if isinstance(host, Layer):
            parts[path], errors[path] = _combined_update(path, host, here, recipe)
        elif isinstance(host, RowsHost):
            shared = host.trained(here[0])
            parts[path] = rows[shared] = rows.get(shared) or _combined_rows(path, host, here, recipe)
        elif isinstance(host, (SavedModule, BiasHost)):
            parts[path] = _combined_module(path, host, here, recipe)
        else:
            raise ConfigError(f"combine: what {type(host).__name__} holds at {path} cannot be combined")
    made = Combined(errors, _config(model, parts, recipe.kind))
    for path, host in hosts(model):
        if path in parts:
            host.adapters[into] = parts[path].train(model.training)
    set_adapter(model, into)
    return made


def _config(model: nn.Module, parts: Mapping[str, nn.Module], kind: Kind) -> LoraConfig:
    """Settings of the result: each layer by its path, with its own rank and scaling 1."""
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


# Combining at one place of the model


def _combined_update(path: str, layer: Layer, names: Sequence[str], recipe: Recipe) -> tuple[LoRA, float]:
    """The combined update of one layer, and its relative error |lost P| / |P|."""
    updates = {name: layer.lora(name) for name in names}
    ones = torch.ones_like(layer.matrix()[:, 0])
    gains = {name: each.gain(layer) if isinstance(each, DoRA) else ones for name, each in updates.items()}  # (d_out,)
    gain = 1 + recipe.merged(f"{path}.gain", {name: gains[name] - 1 for name in names})  # (d_out,)
    if bool((gain <= 0).any()):
        raise ConfigError(f"combine: at {path} the weights make a DoRA magnitude 0 or negative; use smaller weights")
    parts = {
        name: Factors(update.factors().A, update.scaling * gains[name][:, None] * update.factors().B)
        for name, update in updates.items()
    }
    (V, U), error = _low_rank(path, parts, recipe)
    U = U / gain[:, None]
    dropout = next(iter(updates.values())).dropout.p
    start = Factors(V, torch.zeros_like(U))  # B is set afterwards: a non-zero initial B would be a start
    update = UPDATES["dora" if recipe.kind.dora else "lora"](start, 1.0, dropout, layer).to(U.device)
    update.lora_B.copy_(U)
    if isinstance(update, DoRA):
        update.magnitude.copy_(gain * update.row_norms(layer.matrix()))
    update.train_biases(layer, recipe.kind.lora_bias, recipe.kind.base_bias)
    offsets = {name: offset for name, each in updates.items() if (offset := each.offset(layer)) is not None}
    trained = update.base_bias if update.lora_bias is None else update.lora_bias
    if offsets and trained is not None:
        trained.add_(recipe.merged(f"{path}.bias", offsets))
    return update, error


def _low_rank(path: str, parts: Mapping[str, Factors], recipe: Recipe) -> tuple[Factors, float]:
    """The combined P in two factors, and its relative error."""
    total = sum(len(part.A) for part in parts.values())
    if METHODS[recipe.method] != (keep, add):  # a plain weighted sum stays low-rank
        merged = recipe.merged(path, {name: part.B @ part.A for name, part in parts.items()})
        return truncated(merged, recipe.r or total)
    V = torch.cat([part.A for part in parts.values()])  # (k, d_in)
    U = torch.cat([recipe.shares[name] * part.B for name, part in parts.items()], dim=1)  # (d_out, k)
    if recipe.r is None or total <= recipe.r:
        return Factors(V, U), 0.0
    Qu, Ru = torch.linalg.qr(U)
    Qv, Rv = torch.linalg.qr(V.T)
    core, error = truncated(Ru @ Rv.T, recipe.r)  # (k, k), with the singular values of U V
    return Factors(core.A @ Qv.T, Qu @ core.B), error


def _combined_module(path: str, host: AdapterHost, names: Sequence[str], recipe: Recipe) -> nn.Module:
    """base + the combined difference from it, tensor by tensor, for a module or a bias that is trained in full.

    In fp64, so that one adapter with weight 1 is unchanged bit for bit.
    """
    copies = {name: dict(host.adapters[name].named_parameters()) for name in names}
    made = copy.deepcopy(host.adapters[names[0]])
    base = {"base_bias": host.base.bias} if isinstance(host, BiasHost) else dict(host.base.named_parameters())
    for key, parameter in made.named_parameters():
        if any(copies[name][key].shape != parameter.shape for name in names):
            raise ConfigError(f"combine: {path}.{key} has different shapes in the adapters (other labels?)")
        start = base[key].double()
        differences = {name: copies[name][key].double() - start for name in names}
        parameter.copy_(start + recipe.merged(f"{path}.{key}", differences))
    for key, buffer in made.named_buffers():
        if any(not torch.equal(host.adapters[name].get_buffer(key), buffer) for name in names):
            raise ConfigError(f"combine: {path}.{key} differs, and running statistics cannot be combined")
    return made


def _combined_rows(path: str, host: RowsHost, names: Sequence[str], recipe: Recipe) -> TrainedRows:
    """The rows that any adapter trains; an adapter that does not train a row adds no difference to it."""
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
