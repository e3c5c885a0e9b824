"""Recipes that are trained together: common data are read and encoded once, and they share one base model and its cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar, cast

from torch.utils.data import ConcatDataset

from lorakit.errors import ConfigError, Interrupted, LorakitError, RankLost, StorageError
from lorakit.inference.answer import batches_of
from lorakit.lora import Layer, Prefix, frozen_blocks, fuse, hosts, move_adapter
from lorakit.lora.special_layers import Attention
from lorakit.recipe import Recipe
from lorakit.runtime.device import to_device
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.events import Note, Report, ignore
from lorakit.tasks.base import inputs_of
from lorakit.training.prepare import Once, Prepared, prepare

# the most memory for the members of one model: parameters, gradients, two moments, best parameters
MEMBERS_BYTES = 2 * 2**30
COPIES = 5
END_ALL = {error.exit_code for error in (Interrupted, StorageError, RankLost)}  # also if reported by another rank
P = ParamSpec("P")
T = TypeVar("T")


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | LorakitError:
    """The function's result, or the error that ends only one member; an error that ends all is raised."""
    try:
        return function(*args, **kwargs)
    except LorakitError as err:
        if err.exit_code in END_ALL:
            raise
        return err


def prepare_all(
    recipes: Sequence[Recipe], report: Report = ignore, ranks: Ranks = ALONE
) -> list[Prepared | LorakitError]:
    """Prepare each recipe as if alone; returns its error if that fails. Recipes that can share a model get the same one."""
    once, groups = Once(len(recipes) > 1), dict[Hashable, list[Prepared]]()
    return [attempt(_join, recipe, report, ranks, once, groups) for recipe in recipes]


def _join(recipe: Recipe, report: Report, ranks: Ranks, once: Once, groups: dict[Hashable, list[Prepared]]) -> Prepared:
    """Prepare a recipe on its own model, then move its adapter to a model that it can share, if there is one.

    Those of its folds, each prepared as if alone, follow.
    """
    prepared = prepare(recipe, report, ranks, once)
    if prepared.fold_of and _has_attention(prepared):
        raise ConfigError(
            f"data.folds = {prepared.recipe.data.folds}: an adapted nn.MultiheadAttention serves one adapter at a time; "
            "set data.folds = 0"
        )
    group = groups.setdefault(_sharing_key(prepared), [])
    if sum(member.parameters.trainable for member in group) * 4 * COPIES > MEMBERS_BYTES:
        group.clear()
    if group:
        prepared = _move(prepared, group)
    group.append(prepared)
    folds: list[Prepared] = []
    for number in range(prepared.n_folds):
        group.append(_move(prepare(prepared.recipe, ignore, ranks, once, number), group))
        folds.append(group[-1])
    return replace(prepared, folds=tuple(folds))


def _move(prepared: Prepared, group: Sequence[Prepared]) -> Prepared:
    """The same over the model of the group, to which its adapter is moved."""
    model, name = group[0].model, f"member-{len(group)}"
    move_adapter(prepared.model, model, name)
    if prepared.kernels:
        fuse(model)
    return replace(prepared, base=replace(prepared.base, model=model), adapter=name)


def _has_attention(prepared: Prepared) -> bool:
    """Whether it adapts an attention that serves one adapter per batch."""
    return any(isinstance(host, Attention) for _, host in hosts(prepared.model))


def _sharing_key(prepared: Prepared) -> Hashable:
    """Equal for members that can share a model: same base and form, frozen up to the same block, same kinds of hosts."""
    recipe, model = prepared.recipe, prepared.model
    wrapped = [(path, type(host)) for path, host in hosts(model) if not isinstance(host, Layer)]
    if recipe.train.method == "full" or recipe.train.shard_base or _has_attention(prepared):
        return object()
    uses_cache = prepared.kernels and not prepared.draws
    depth = len(frozen_blocks(model)) if uses_cache else None
    return type(model), prepared.base.fingerprint, recipe.model.model_dump_json(), tuple(wrapped), depth


def groups_of(prepared: Sequence[Prepared | LorakitError]) -> list[dict[int, Prepared]]:
    """The members of each model, by position."""
    by_model: dict[int, dict[int, Prepared]] = {}
    for position, member in enumerate(prepared):
        if isinstance(member, Prepared):
            by_model.setdefault(id(member.model), {})[position] = member
    return list(by_model.values())


# The outputs of the blocks below the adapters, cached; the cache itself is lorakit.lora.Prefix

MOST_BYTES = 2 * 2**30  # the most disk space for it


def keep_prefix(runs: Sequence[Prepared], report: Report = ignore) -> None:
    """Cache the outputs of the blocks below all adapters for training and validation texts, if that is valid and worth it.

    It is not valid if the base has dropout, and not worth it if each text is read once, or if the outputs take more than
    MOST_BYTES or the free disk space.
    """
    first = runs[0]
    model, device = cast(Any, first.model), first.device
    parts = {id(part): part for run in runs for part in (run.parts["train"], run.parts["validation"])}
    again = len(parts) < 2 * len(runs) or any(run.plan.steps > run.plan.steps_per_epoch for run in runs)
    if not first.kernels or first.base.drops or not again or not (blocks := frozen_blocks(model)):
        return
    items: Any = ConcatDataset([cast(Any, part.flat) for part in parts.values()])  # read on demand
    n_tokens = sum(len(item["input_ids"]) for item in items)
    if n_tokens * model.config.hidden_size * model.dtype.itemsize > MOST_BYTES:
        return
    batches = (first.task.collate([items[i] for i in batch]) for batch in batches_of(model, first.task, items, device))
    prefix = Prefix(model, blocks)
    try:
        prefix.fill((to_device(inputs_of(batch), device) for batch in batches), n_tokens)
    except OSError as err:
        place = tempfile.gettempdir()
        report(Note(f"the blocks below the adapters are computed in every epoch: {place}: {err.strerror}"))
    else:
        report(Note(str(prefix)))
