"""Recipes that are trained together: what several have in common is read, encoded and loaded once, and they share one base."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import ParamSpec, TypeVar

from lorakit.errors import Interrupted, LorakitError, RankLost, StorageError
from lorakit.inference.speed_up import PLAIN
from lorakit.lora import Layer, frozen_blocks, fuse, hosts, move_adapter
from lorakit.lora.special_layers import Attention
from lorakit.recipe import Recipe
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.events import Report, ignore
from lorakit.training.prepare import Once, Prepared, prepare

MEMBERS_BYTES = 2 * 2**30  # that the members of one model may take: parameters, gradients, two moments, the best
COPIES = 5
END_ALL = {error.exit_code for error in (Interrupted, StorageError, RankLost)}  # also as another rank tells of them
P = ParamSpec("P")
T = TypeVar("T")


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | LorakitError:
    """What the function gives, or the error that ends one member alone; what ends all of them is raised."""
    try:
        return function(*args, **kwargs)
    except LorakitError as err:
        if err.exit_code in END_ALL:
            raise
        return err


def prepare_all(
    recipes: Sequence[Recipe], report: Report = ignore, ranks: Ranks = ALONE
) -> list[Prepared | LorakitError]:
    """Each recipe prepared as if alone, or what is wrong with it; those that can share a model have the same one."""
    once, groups = Once(), dict[Hashable, list[Prepared]]()
    return [attempt(_join, recipe, report, ranks, once, groups) for recipe in recipes]


def _join(recipe: Recipe, report: Report, ranks: Ranks, once: Once, groups: dict[Hashable, list[Prepared]]) -> Prepared:
    """Prepare a recipe on a model of its own, and move its adapter to a model that it can share where there is one already."""
    prepared = prepare(recipe, report, ranks, once)
    group = groups.setdefault(_sharing_key(prepared), [])
    if sum(member.parameters.trainable for member in group) * 4 * COPIES > MEMBERS_BYTES:
        group.clear()
    if group:
        model = group[0].model
        name = f"member-{len(group)}"
        move_adapter(prepared.model, model, name)
        if prepared.kernels != PLAIN:
            fuse(model)
        prepared = replace(prepared, base=replace(prepared.base, model=model), adapter=name)
    group.append(prepared)
    return prepared


def _sharing_key(prepared: Prepared) -> Hashable:
    """Equal for members that can share a model: one base, in one form, frozen up to one block, wrapped alike."""
    recipe, model = prepared.recipe, prepared.model
    wrapped = [(path, type(host)) for path, host in hosts(model) if not isinstance(host, Layer)]
    attention = any(isinstance(host, Attention) for _, host in hosts(model))  # serves one adapter a batch
    if recipe.train.method == "full" or recipe.train.shard_base or attention:
        return object()
    kept = prepared.kernels != PLAIN and not prepared.draws
    depth = len(frozen_blocks(model)) if kept else None
    return type(model), prepared.base.fingerprint, recipe.model.model_dump_json(), tuple(wrapped), depth


def groups_of(prepared: Sequence[Prepared | LorakitError]) -> list[dict[int, Prepared]]:
    """Those that share a model, by position, model by model."""
    by_model: dict[int, dict[int, Prepared]] = {}
    for position, member in enumerate(prepared):
        if isinstance(member, Prepared):
            by_model.setdefault(id(member.model), {})[position] = member
    return list(by_model.values())
