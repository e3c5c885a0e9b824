"""`lorakit sweep RECIPE --lr-probe`: short runs over a grid of learning rates, and the rate that their losses speak for.

A range test (Smith 2017, arXiv:1506.01186) with a run from the same start for each rate, instead of one run whose rate
grows: the loss at a rate then owes nothing to the rates before it. All of them see the same batches in the same order.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.app.seeds import group_folder
from lorakit.app.sweep.command import Asked, check_alone, make_plan
from lorakit.app.sweep.points import SEED, Choice, Point, Range, parse_axes
from lorakit.app.sweep.training import Sweep, recipe_maker
from lorakit.errors import ConfigError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Report, ignore
from lorakit.runtime.files import atomic_file, atomic_text

LR = "train.lr"
RATES = Range(LR, 1e-5, 1e-1)
PER_DECADE = 3
LAST = 0.25  # share of the steps whose mean loss counts
SHORT_RUNS = 1.5  # by how much the best rate of some 100 steps is above that of a long run (Schulman et al. 2025)
RULE = (
    f"the lowest loss over the last quarter of the steps, between rates by the parabola through it and its neighbours, "
    f"over {SHORT_RUNS}: runs of some 100 steps like rates that much higher than long ones "
    "(Schulman et al. 2025, doi:10.64434/tml.20250929)"
)


@dataclass(frozen=True)
class Probe:
    """What the short runs say: a loss and a score for each rate (None where it diverged), and the rate to take."""

    folder: Path
    steps: int
    metric: str
    rates: list[float]
    losses: list[float | None]
    scores: list[float | None]
    recommended: float
    is_at_edge: bool


def run_probe(asked: Asked, steps: int, report: Report = ignore) -> Probe:
    """Train `steps` steps at each rate and leave lr-probe.json, .png and .svg beside the runs.

    Raises:
        ConfigError: something else than train.lr is to be tried.
    """
    ways = {"--list": asked.points, "--random": asked.random, "--optuna": asked.optuna, "--halving": asked.halving}
    if given := [name for name, value in ways.items() if value is not None]:
        raise ConfigError(f"--lr-probe and {given[0]}: name one of them")
    check_alone()
    fixed, rates = _rates(asked.words)
    plan = make_plan(Asked(asked.recipe, fixed, seeds=asked.seeds))
    if plan.axes or len(plan.seeds) > 1:
        raise ConfigError("--lr-probe tries rates alone; say one value for every other key")
    folder = Path(plan.base.output.dir or Path("runs") / f"{asked.recipe.stem}-lr-probe")
    base = short(plan.base, steps)
    recipe_of = recipe_maker(asked.recipe, plan.fixed)

    def short_recipe_of(point: Point) -> Recipe:
        return short(recipe_of(point), steps)

    sweep = Sweep(folder, short_recipe_of, {"lr-probe": base.model_dump(mode="json")}, report)
    with group_folder(folder, base, "auto" if asked.resume else None, report):
        if asked.resume:
            sweep.restore()
        sweep.train(sweep.add([{LR: rate, SEED: plan.seeds[0]} for rate in rates]))
        sweep.best()  # raises where all of them diverged
        probe = _probe(sweep, steps)
        atomic_text(folder / "lr-probe.json", json.dumps(facts(probe), indent=1) + "\n")
        write_plots(probe)
    return probe


def _rates(words: Sequence[str]) -> tuple[list[str], list[float]]:
    """The words without that of train.lr, and the rates that it asks for."""
    axes = parse_axes(words)
    others = [said for said, axis in zip(words, axes, strict=True) if axis.key != LR]
    axis = next((axis for axis in axes if axis.key == LR), RATES)
    if isinstance(axis, Choice):
        if len(axis.values) < 3 or not all(isinstance(value, (int, float)) and value > 0 for value in axis.values):
            raise ConfigError("--lr-probe: train.lr takes a range such as 1e-5..1e-1, or three rates or more")
        return others, sorted(map(float, axis.values))
    if not axis.low > 0:
        raise ConfigError(f"--lr-probe: train.lr={axis.low}..{axis.high}: a grid of ratios begins above 0")
    n = max(3, round(PER_DECADE * math.log10(axis.high / axis.low)) + 1)
    return others, [float(f"{rate:.2g}") for rate in np.geomspace(axis.low, axis.high, n)]


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


def _probe(sweep: Sweep, steps: int) -> Probe:
    metric = str(sweep.metric)
    members = sorted(sweep.members, key=lambda member: float(member.point[LR]))
    losses = [_last_loss(sweep.folder / member.name) if member.status == "done" else None for member in members]
    rates = [float(member.point[LR]) for member in members]
    recommended, is_at_edge = recommend(rates, losses)
    scores = [member.scores.get(metric) for member in members]
    return Probe(sweep.folder, steps, metric, rates, losses, scores, recommended, is_at_edge)


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


def facts(probe: Probe) -> dict[str, Any]:
    """The probe for `--json`."""
    return {
        "folder": str(probe.folder),
        "steps": probe.steps,
        "metric": probe.metric,
        "rates": probe.rates,
        "losses": probe.losses,
        "scores": probe.scores,
        "recommended": probe.recommended,
        "is_at_edge": probe.is_at_edge,
        "rule": RULE,
    }


def lines(probe: Probe, recipe: Path) -> list[str]:
    """The probe for a terminal."""
    rows = [
        f"{rate:<10g} {'diverged' if loss is None else f'{loss:8.4f}'}   {'' if score is None else f'{score:.4f}'}"
        for rate, loss, score in zip(probe.rates, probe.losses, probe.scores, strict=True)
    ]
    edge = ["the lowest loss is at an end of the rates: try more on that side"] if probe.is_at_edge else []
    return [
        f"{'train.lr':<10} {'loss':>8}   {probe.metric} after {probe.steps} steps",
        *rows,
        f"recommended: train.lr = {probe.recommended:g}",
        *edge,
        f"by {RULE}",
        f"plot: {probe.folder / 'lr-probe.png'}",
        f"to use it: lorakit train {recipe} train.lr={probe.recommended:g}",
    ]


def write_plots(probe: Probe) -> None:
    """lr-probe.png and lr-probe.svg: the loss against the rate, the recommended one marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(rate, loss) for rate, loss in zip(probe.rates, probe.losses, strict=True) if loss is not None]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o-", color="#c44e52")
    axes.axvline(probe.recommended, color="#4c72b0", linestyle="--", label=f"recommended: {probe.recommended:g}")
    lowest = min(loss for _, loss in points)
    top = min(max(loss for _, loss in points), 3 * max(points[0][1], lowest))  # what diverged would flatten the rest
    axes.set(xlabel=LR, ylabel=f"training loss after {probe.steps} steps", xscale="log", ylim=(0, 1.05 * top))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center")
    for ending in ("png", "svg"):
        with atomic_file(probe.folder / f"lr-probe.{ending}") as temporary:
            figure.savefig(temporary, dpi=120, format=ending)
