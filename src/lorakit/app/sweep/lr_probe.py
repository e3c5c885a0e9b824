"""`lorakit sweep RECIPE --lr-probe`: short runs over a grid of learning rates, and the rate that their losses speak for.

A range test (Smith 2017, arXiv:1506.01186) with a run from the same start for each rate, instead of one run whose rate
grows: the loss at a rate then owes nothing to the rates before it. All of them see the same batches in the same order.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.app.printing import Output
from lorakit.app.sweep.plan import Axis, Options, Plan, make_plan, parse_axes, run_name
from lorakit.errors import ConfigError, LorakitError
from lorakit.recipe import Recipe

if TYPE_CHECKING:
    from lorakit.runtime.events import Report

LR = "train.lr"
RATES = Axis(LR, (1e-5, 1e-1), is_range=True)
PER_DECADE = 3
LAST = 0.25  # share of the steps whose mean loss counts
SHORT_RUNS = 1.5  # by how much the best rate of some 100 steps is above that of a long run (Schulman et al. 2025)
RULE = (
    f"the lowest loss over the last quarter of the steps, between rates by the parabola through it and its neighbours, "
    f"over {SHORT_RUNS}: runs of some 100 steps like rates that much higher than long ones "
    "(Schulman et al. 2025, doi:10.64434/tml.20250929)"
)


def plan_probe(options: Options) -> Plan:
    """A plan of short runs, one for each rate.

    Raises:
        ConfigError: something else than train.lr is to be tried.
    """
    ways = {
        "--list": options.points,
        "--random": options.random,
        "--optuna": options.optuna,
        "--halving": options.halving,
    }
    if flags := [name for name, value in ways.items() if value]:
        raise ConfigError(f"--lr-probe and {flags[0]}: use one of them")
    axes = parse_axes(options.words)
    axis = next((axis for axis in axes if axis.key == LR), RATES)
    rates = list(axis.values)
    if not axis.is_range:
        if len(rates) < 3 or not all(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
            raise ConfigError("--lr-probe: train.lr takes a range such as 1e-5..1e-1, or at least three rates")
    else:
        low, high = rates
        if not low > 0:
            raise ConfigError(f"--lr-probe: train.lr={low}..{high}: a logarithmic grid must begin above 0")
        n = max(3, round(PER_DECADE * math.log10(high / low)) + 1)
        rates = [float(f"{rate:.2g}") for rate in np.geomspace(low, high, n)]
    others = [word for word, axis in zip(options.words, axes, strict=True) if axis.key != LR]
    words = [*others, f"{LR}={','.join(map(str, sorted(map(float, rates))))}"]
    plan = make_plan(Options(options.recipe, words, seeds=options.seeds, resume=options.resume))
    if len(plan.axes) > 1 or len(plan.seeds) > 1:
        raise ConfigError("--lr-probe varies train.lr only; give every other key one value")
    return replace(plan, folder=Path(plan.base.output.dir or Path("runs") / f"{options.recipe.stem}-lr-probe"))


def run_probe(plan: Plan, steps: int, report: Report | None = None) -> Output:
    """Train `steps` steps at each rate and leave lr-probe.json, .png and .svg beside the runs.

    Raises:
        LorakitError: every run failed; an Interrupted after a signal.
    """
    from lorakit.app.api import train_recipes
    from lorakit.app.seeds import group_folder, with_seed
    from lorakit.runtime.events import Note, ignore
    from lorakit.runtime.files import atomic_text
    from lorakit.training.results import Result

    report, resume, (seed,) = report or ignore, "auto" if plan.options.resume else None, plan.seeds
    rates = [float(point[LR]) for point, _ in plan.settings]
    folders = [plan.folder / run_name(number, point, seed) for number, (point, _) in enumerate(plan.settings)]
    recipes = [
        with_seed(short(plan.recipe_of(point, seed), steps), seed, folder)
        for (point, _), folder in zip(plan.settings, folders, strict=True)
    ]
    with group_folder(plan.folder, short(plan.base, steps), resume, report):
        results = train_recipes(recipes, report=report, resume=resume)
        losses = [_last_loss(result.folder) if isinstance(result, Result) else None for result in results]
        for folder, result in zip(folders, results, strict=True):
            if isinstance(result, LorakitError):
                report(Note(f"{folder.name} failed: {result}"))
        done = [result for result in results if isinstance(result, Result)]
        if not done or all(loss is None for loss in losses):
            raise LorakitError(f"all {len(results)} runs of the probe failed; {folders[0].name}: {results[0]}")
        metric = str(done[0].scores["metric"])
        recommended, is_at_edge = recommend(rates, losses)
        facts = {
            "folder": str(plan.folder),
            "steps": steps,
            "metric": metric,
            "rates": rates,
            "losses": losses,
            "scores": [result.scores.get(metric) if isinstance(result, Result) else None for result in results],
            "recommended": recommended,
            "is_at_edge": is_at_edge,
            "rule": RULE,
        }
        atomic_text(plan.folder / "lr-probe.json", json.dumps(facts, indent=1) + "\n")
        write_plots(plan.folder, facts)
    return Output(lines(facts, plan.options.recipe), facts)


def short(recipe: Recipe, steps: int) -> Recipe:
    """The recipe cut to its first steps, at a rate that stays; train.head_lr, where it is set, is as it is."""
    changes: dict[str, Any] = {
        "max_steps": steps,
        "epochs": steps,  # enough of them
        "schedule": "constant",
        "warmup": 0.1,
        "eval_every": steps,
        "checkpoint_every": None,
        "patience": None,
        "seeds": (),
    }
    train = recipe.train.model_copy(update=changes)
    return recipe.model_copy(update={"train": train, "data": recipe.data.model_copy(update={"test": None})})


def _last_loss(run: Path) -> float | None:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    value = statistics.fmean(losses[-max(1, round(LAST * len(losses))) :])
    return value if math.isfinite(value) else None


def recommend(rates: Sequence[float], losses: Sequence[float | None]) -> tuple[float, bool]:
    """The rate to train with, by RULE, and whether the lowest loss is at an end of the rates that were tried."""
    known = [i for i, loss in enumerate(losses) if loss is not None]
    lowest = min(known, key=lambda i: losses[i] or 0.0)
    around = [lowest - 1, lowest, lowest + 1]
    if lowest in (0, len(rates) - 1):
        return float(f"{rates[lowest]:.2g}"), True
    if not set(around) <= set(known):  # the next one diverged
        return float(f"{rates[lowest] / SHORT_RUNS:.2g}"), False
    x, y = np.log([rates[i] for i in around]), [float(losses[i] or 0.0) for i in around]
    curvature, slope, _ = np.polyfit(x - x[1], y, 2)
    vertex = float(np.exp(x[1] - slope / (2 * curvature))) if curvature > 0 else rates[lowest]
    return float(f"{vertex / SHORT_RUNS:.2g}"), False


def lines(facts: dict[str, Any], recipe: Path) -> list[str]:
    """The probe for a terminal."""
    rows = [
        f"{rate:<10g} {'diverged' if loss is None else f'{loss:8.4f}'}   {'' if score is None else f'{score:.4f}'}"
        for rate, loss, score in zip(facts["rates"], facts["losses"], facts["scores"], strict=True)
    ]
    return [
        f"{LR:<10} {'loss':>8}   {facts['metric']} after {facts['steps']} steps",
        *rows,
        f"recommended: {LR} = {facts['recommended']:g}",
        *(["the lowest loss is at an end of the rates: try more on that side"] if facts["is_at_edge"] else []),
        f"by {RULE}",
        f"plot: {Path(facts['folder']) / 'lr-probe.png'}",
        f"to use it: lorakit train {recipe} {LR}={facts['recommended']:g}",
    ]


def write_plots(folder: Path, facts: dict[str, Any]) -> None:
    """lr-probe.png and lr-probe.svg: the loss against the rate, the recommended one marked."""
    from lorakit.app.sweep.table import picture

    points = [(rate, loss) for rate, loss in zip(facts["rates"], facts["losses"], strict=True) if loss is not None]
    lowest = min(loss for _, loss in points)
    top = min(max(loss for _, loss in points), 3 * max(points[0][1], lowest))  # what diverged would flatten the rest
    with picture(folder, "lr-probe", (6.4, 4)) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o-", color="#c44e52")
        axes.axvline(
            facts["recommended"], color="#4c72b0", linestyle="--", label=f"recommended: {facts['recommended']:g}"
        )
        axes.set(xlabel=LR, ylabel=f"training loss after {facts['steps']} steps", xscale="log", ylim=(0, 1.05 * top))
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center")
