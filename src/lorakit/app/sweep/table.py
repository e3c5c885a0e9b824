"""What a sweep shows: a table, best first, sweep.csv, and a picture of the score against each key."""

from __future__ import annotations

import csv
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lorakit.app.comparing import compare_runs
from lorakit.app.sweep.training import Group, Sweep
from lorakit.errors import LorakitError
from lorakit.runtime.files import atomic_file
from lorakit.tasks.metrics.bootstrap import LOWER, quantiles
from lorakit.training.run_files import read_resamples

WIDTH = 200  # letters of the table where there is no terminal


class Found(NamedTuple):
    """What a point of the sweep is worth."""

    group: Group
    score: float | None  # the mean over its seeds
    deviation: float | None  # sample standard deviation over its seeds
    interval: tuple[float, float] | None  # 95 %, over examples and seeds
    note: str  # how it ended, where that is not with a score


def found(sweep: Sweep) -> list[Found]:
    """Every point, best first."""
    return [_found(sweep, group) for group in sweep.ranked()]


def _found(sweep: Sweep, group: Group) -> Found:
    members, metric = group.members, sweep.metric
    if group.status in ("failed", "waiting") or metric is None:
        errors = [member.error for member in members if member.error]
        return Found(group, None, None, None, f"failed: {errors[0].partition(';')[0]}" if errors else "not trained")
    if any(member.scores.get(metric) is None for member in members):
        return Found(group, None, None, None, f"{metric} is undefined")
    values = [float(member.scores[metric]) for member in members]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    steps = sorted({int(member.scores["step"]) for member in members if "step" in member.scores})
    note = f"stopped after step {', '.join(map(str, steps))}" if group.status == "paused" else ""
    return Found(group, statistics.fmean(values), deviation, _interval(sweep, group), note)


def _interval(sweep: Sweep, group: Group) -> tuple[float, float] | None:
    """Of one run its own; of several the one of their mean, over resamples of examples and of seeds."""
    members = group.members
    if group.status != "done":
        return None
    if len(members) == 1:
        return None if members[0].interval is None else (members[0].interval[0], members[0].interval[1])
    try:
        runs = [read_resamples(sweep.folder / member.name) for member in members]
        values = np.stack([run.scores[str(sweep.metric)].values for run in runs])  # (seeds, RESAMPLES)
    except (LorakitError, KeyError):  # average precision, say, cannot be resampled
        return None
    drawn = np.random.RandomState(1).randint(0, len(values), values.shape)
    return tuple(quantiles(np.take_along_axis(values, drawn, 0).mean(0)))  # type: ignore[return-value]


def keys_of(sweep: Sweep) -> list[str]:
    """The keys of the points, in the order in which they come."""
    return list(dict.fromkeys(key for member in sweep.members for key in member.point))


def said(value: Any) -> str:
    """A value as a cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def table(sweep: Sweep) -> str:
    """The points as a table for a terminal."""
    keys, rows = keys_of(sweep), found(sweep)
    grid = Table(box=SIMPLE, pad_edge=False)
    with_seeds = any(len(row.group.members) > 1 for row in rows)
    heads = [*keys, str(sweep.metric), *(["± seeds"] if with_seeds else []), "95 % interval", "run", ""]
    for head in heads:
        grid.add_column(head, justify="left" if head in ("run", "") else "right", overflow="fold")
    for row in rows:
        score = "" if row.score is None else f"{row.score:.4f}"
        spread = [] if not with_seeds else ["" if row.deviation is None else f"{row.deviation:.4f}"]
        between = "" if row.interval is None else f"[{row.interval[0]:.3f}, {row.interval[1]:.3f}]"
        point = [said(row.group.point[key]) if key in row.group.point else "" for key in keys]
        grid.add_row(*point, score, *spread, between, row.group.name, row.note)
    console = Console(highlight=False, markup=False, color_system=None)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, color_system=None, width=WIDTH)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().split("\n")).strip("\n")


def closing_lines(sweep: Sweep) -> list[str]:
    """The best run and how to use it, and how far it can be told from the next."""
    best, ranked = sweep.best(), sweep.ranked()
    run = sweep.folder / best.name
    done = [group for group in ranked if group.status == "done"]
    lines = [f"best: {run}"]
    if len(done) > 1:
        lines.append(f"the best of {len(sweep.groups)} points on the same examples, so a little optimistic")
        lines += _against_next(sweep, done[0], done[1])
    return [*lines, f'to use it: lorakit predict {shlex.quote(str(run))} "a text"']


def _against_next(sweep: Sweep, first: Group, second: Group) -> list[str]:
    paths = [sweep.folder / member.name for group in (second, first) for member in group.members]
    try:
        comparison = compare_runs(paths).facts["comparisons"][0]
    except (LorakitError, IndexError):  # of other examples: each seed holds out its own
        return []
    return [f"against {second.name} (A), {first.name} is B: {comparison['verdict']}"]


def facts(sweep: Sweep) -> dict[str, Any]:
    """The sweep for `--json`: the best run, and every point."""
    best = sweep.best()
    return {
        "folder": str(sweep.folder),
        "metric": sweep.metric,
        "best": {
            "run": str(sweep.folder / best.name),
            "point": dict(best.point),
            "seed": best.seed,
            "score": best.scores[str(sweep.metric)],
        },
        "points": [
            {
                "name": row.group.name,
                "point": dict(row.group.point),
                "status": row.group.status,
                "score": row.score,
                "deviation": row.deviation,
                "interval": row.interval,
                "seeds": [member.seed for member in row.group.members],
                "runs": [str(sweep.folder / member.name) for member in row.group.members],
                "scores": [member.scores.get(str(sweep.metric)) for member in row.group.members],
                "note": row.note,
            }
            for row in found(sweep)
        ],
    }


def write_csv(sweep: Sweep, path: Path) -> None:
    """A row for each run, in the order of the table."""
    keys = keys_of(sweep)
    scores = list(dict.fromkeys(name for member in sweep.members for name in member.scores if name != "seed"))
    with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *keys, "seed", "status", "low", "high", *scores, "error"])
        for member in (member for group in sweep.ranked() for member in group.members):
            point = [member.point.get(key, "") for key in keys]
            numbers = [member.scores.get(name, "") for name in scores]
            low, high = member.interval or ("", "")
            writer.writerow([member.name, *point, member.seed, member.status, low, high, *numbers, member.error or ""])


def write_plots(sweep: Sweep) -> None:
    """sweep.png and sweep.svg: the score against each key, a point for each run, and the mean as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = str(sweep.metric)
    done = [member for member in sweep.members if member.status == "done"]
    keys = [key for key in keys_of(sweep) if len({said(member.point.get(key)) for member in done}) > 1] or [SEED_AXIS]
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for key, axes in zip(keys, grid.flat, strict=False):
        pairs = [(m.seed if key == SEED_AXIS else m.point.get(key), m.scores.get(metric)) for m in done]
        _draw(axes, key, [(value, score) for value, score in pairs if score is not None and math.isfinite(score)])
    for row in grid:
        row[0].set_ylabel(f"{metric}{' (less is better)' if metric in LOWER else ''}")
    for ending in ("png", "svg"):
        with atomic_file(sweep.folder / f"sweep.{ending}") as temporary:
            figure.savefig(temporary, dpi=120, format=ending)


SEED_AXIS = "train.seed"


def _draw(axes: Any, key: str, pairs: Sequence[tuple[Any, float]]) -> None:
    """One panel: numbers where they are, on a log scale where they span more than a decade; other values side by side."""
    is_number = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value, _ in pairs)
    names = list(dict.fromkeys(said(value) for value, _ in pairs))
    at = {said(value): float(value) if is_number else names.index(said(value)) for value, _ in pairs}
    means = {name: statistics.fmean(score for value, score in pairs if said(value) == name) for name in names}
    axes.plot([at[said(value)] for value, _ in pairs], [score for _, score in pairs], "o", color="#4c72b0", alpha=0.6)
    line = sorted((at[name], mean) for name, mean in means.items())
    axes.plot(*zip(*line, strict=True), "-", color="#c44e52", linewidth=1.5)
    axes.set_xlabel(key)
    axes.grid(alpha=0.25)
    if not is_number:
        axes.set_xticks(list(at.values()), list(at), rotation=20, ha="right")
    elif min(at.values()) > 0 and max(at.values()) >= 10 * min(at.values()):
        axes.set_xscale("log")
