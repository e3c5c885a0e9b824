"""What `lorakit sweep` does: the points that are asked for, trained in the way that is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.app.printing import Output
from lorakit.app.seeds import group_folder
from lorakit.app.sweep.points import (
    SEED,
    Axis,
    Choice,
    Point,
    draw_points,
    grid,
    joined_points,
    parse_axes,
    read_points,
    word,
)
from lorakit.app.sweep.search import Search, check_optuna, search
from lorakit.app.sweep.table import write_csv, write_plots
from lorakit.app.sweep.training import Sweep, halve, halving_shares, halving_words, recipe_maker
from lorakit.app.sweep.workers import SharedSweep, Space, work
from lorakit.errors import ConfigError
from lorakit.recipe import Recipe, read_recipe
from lorakit.runtime.events import Report, ignore


@dataclass(frozen=True)
class Asked:
    """The command line of a sweep."""

    recipe: Path
    words: Sequence[str]
    points: Path | None = None  # a file of them
    random: int | None = None
    draw_seed: int = 0
    seeds: Sequence[int] = ()
    halving: int | None = None
    optuna: str | None = None  # a storage; "" for a file in the folder
    trials: int | None = None
    at_once: int = 4
    sampler: str = "tpe"
    pruner: str = "none"
    worker: bool = False
    resume: bool = False


class Plan(NamedTuple):
    """What is swept, and over what."""

    base: Recipe
    fixed: list[str]  # words that change it for all points
    axes: list[Axis]
    seeds: Sequence[int]
    folder: Path


def make_plan(asked: Asked) -> Plan:
    """The recipe that the points share, and what they differ in.

    Raises:
        ConfigError: the recipe or a word is wrong, or asks for what does not go together.
    """
    axes = parse_axes(asked.words)
    single = [axis for axis in axes if isinstance(axis, Choice) and len(axis.values) == 1]
    fixed = [word(axis.key, axis.values[0]) for axis in single if axis.key != SEED]
    base = read_recipe(asked.recipe, fixed)
    seeds = next((axis for axis in axes if axis.key == SEED), None)
    if seeds is not None and asked.seeds:
        raise ConfigError("--seeds and train.seed: name one of them")
    if not isinstance(seeds, Choice | None):
        raise ConfigError("train.seed: seeds are not drawn; say --seeds 0,1,2")
    swept = [axis for axis in axes if axis is not seeds and axis not in single]
    if any(axis.key == "output.dir" for axis in swept):
        raise ConfigError("output.dir: each run of a sweep has a folder within the one folder of the sweep")
    chosen = seeds.values if seeds else asked.seeds or base.train.seeds or (base.train.seed,)
    folder = Path(base.output.dir or Path("runs") / f"{asked.recipe.stem}-sweep")
    return Plan(base, fixed, swept, tuple(dict.fromkeys(chosen)), folder)


def points_of(asked: Asked, plan: Plan) -> list[Point]:
    """Every point with every seed.

    Raises:
        ConfigError: there is nothing to sweep over, or a point is no recipe. DataError: the file of points is wrong.
    """
    ways = {"--list": asked.points, "--random": asked.random, "--optuna": asked.optuna}
    if len(given := [name for name, value in ways.items() if value is not None]) > 1:
        raise ConfigError(f"{' and '.join(given)}: name one of them")
    if asked.optuna is not None and asked.halving:
        raise ConfigError("--halving and --optuna: what Optuna thins out is said by --pruner")
    if (asked.optuna is None) != (asked.trials is None):
        raise ConfigError("--optuna and --trials N go together")
    if asked.worker and (asked.optuna is None or asked.resume):
        raise ConfigError("--worker goes with --optuna, and joins the search that is there without --resume")
    if not (asked.points or plan.axes or len(plan.seeds) > 1):
        raise ConfigError("nothing to sweep over; say which values, for example train.lr=3e-4,1e-3")
    if asked.optuna is not None:
        return []  # they are asked for one after the other
    points = draw_points(plan.axes, asked.random, asked.draw_seed) if asked.random else grid(plan.axes)
    if asked.points:
        points = joined_points(read_points(asked.points), points)
    return [point if SEED in point else {**point, SEED: seed} for point in points for seed in plan.seeds]


def planned(asked: Asked) -> Output:
    """The points, checked but not trained."""
    plan = make_plan(asked)
    sweep = Sweep(plan.folder, recipe_maker(asked.recipe, plan.fixed), {})
    groups = sweep.add(points_of(asked, plan))
    lines = [
        f"{member.name}: {' '.join(word(key, value) for key, value in {**member.point, SEED: member.seed}.items())}"
        for member in sweep.members
    ]
    found = [{"name": m.name, "point": dict(m.point), "seed": m.seed} for m in sweep.members]
    counts = f"{len(groups)} points, {len(sweep.members)} runs in {plan.folder}"
    return Output([*lines, counts], {"folder": str(plan.folder), "runs": found})


def run_sweep(asked: Asked, report: Report = ignore) -> Sweep:
    """Train every point and leave sweep.json, sweep.csv, sweep.png and sweep.svg beside the runs.

    Raises:
        LorakitError: a mistake in what is asked for, or one that all points share; an Interrupted after a signal.
    """
    check_alone()
    plan = make_plan(asked)
    points = points_of(asked, plan)
    shares = _shares(asked, plan, points)
    fixed = [*plan.fixed, *halving_words(plan.base, shares)]
    sweep = Sweep(plan.folder, recipe_maker(asked.recipe, fixed), _how(asked, plan.base, shares), report)
    wanted = None if asked.trials is None else _search(asked, asked.trials)
    if wanted is not None and asked.worker:
        shared = SharedSweep(sweep.folder, sweep.recipe_of, sweep.how, report)
        work(shared, plan.base, Space(plan.axes, plan.seeds, shares), wanted)
        return shared
    with group_folder(plan.folder, plan.base, "auto" if asked.resume else None, report):
        if asked.resume:
            sweep.restore()
        if wanted is not None:
            search(sweep, plan.axes, plan.seeds, wanted, shares)
        elif asked.halving:
            halve(sweep, points, asked.halving, shares)
        else:
            sweep.train(sweep.add(points))
        sweep.best()
        write_csv(sweep, plan.folder / "sweep.csv")
        write_plots(sweep)
    return sweep


def check_alone() -> None:
    """Raise a ConfigError under torchrun: several processes would each keep the books of one sweep."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a sweep is one process; `lorakit train` is what several can share")


def _search(asked: Asked, trials: int) -> Search:
    wanted = Search(trials, asked.at_once, asked.optuna or None, asked.sampler, asked.pruner, asked.draw_seed)
    check_optuna(wanted)
    return wanted


def _shares(asked: Asked, plan: Plan, points: Sequence[Point]) -> list[float]:
    if asked.halving:
        return halving_shares(_count(points), asked.halving, plan.base)
    return [] if asked.pruner == "none" else halving_shares(PRUNED_AT, 3, plan.base)


PRUNED_AT = 9  # points that would be halved by thirds as often as a pruner looks


def _count(points: Sequence[Point]) -> int:
    """Points, seeds not counted."""
    return len({repr({key: value for key, value in point.items() if key != SEED}) for point in points})


def _how(asked: Asked, base: Recipe, shares: Sequence[float]) -> dict[str, Any]:
    """What a resumed sweep must have in common with itself: every key of the recipe, and the rungs."""
    sections = base.model_dump(mode="json")
    keys = {f"{section}.{key}": value for section, table in sections.items() for key, value in table.items()}
    return {**{key: value for key, value in keys.items() if not key.startswith("output.")}, "rungs": list(shares)}
