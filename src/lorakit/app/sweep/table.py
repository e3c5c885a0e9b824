"""What a sweep shows: a table, best first, and sweep.csv."""

from __future__ import annotations

import csv
import shlex
import statistics
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lorakit.app.comparing import compare_runs
from lorakit.app.printing import Output
from lorakit.errors import LorakitError
from lorakit.runtime.files import atomic_file
from lorakit.tasks.metrics.bootstrap import quantiles
from lorakit.training.run_files import read_resamples

if TYPE_CHECKING:
    from lorakit.app.sweep.study import Group, Sweep

WIDTH = 200  # letters of the table where there is no terminal


def show_sweep(sweep: Sweep) -> Output:
    """The best run, and every point, best first."""
    facts = _facts(sweep)
    return Output(_lines(sweep, facts), facts)


def _facts(sweep: Sweep) -> dict[str, Any]:
    best, metric = sweep.best(), str(sweep.metric)
    points = []
    for group in sweep.ranked():
        values = [member.scores.get(metric) for member in group.members]
        known = [float(value) for value in values if value is not None and group.status in ("paused", "done")]
        is_scored, note = len(known) == len(values), ""
        if group.status in ("failed", "waiting"):
            errors = [member.error for member in group.members if member.error]
            note = f"failed: {errors[0].partition(';')[0]}" if errors else "not trained"
        elif not is_scored:
            note = f"{metric} is undefined"
        elif group.status == "paused":
            steps = sorted({int(member.scores["step"]) for member in group.members if "step" in member.scores})
            note = f"stopped after step {', '.join(map(str, steps))}"
        points.append(
            {
                "name": group.name,
                "point": dict(group.point),
                "status": group.status,
                "score": statistics.fmean(known) if is_scored else None,
                "deviation": statistics.stdev(known) if is_scored and len(known) > 1 else None,
                "interval": _interval(sweep, group) if is_scored else None,
                "seeds": [member.seed for member in group.members],
                "runs": [str(sweep.folder / member.name) for member in group.members],
                "scores": values,
                "note": note,
            }
        )
    run = {"run": str(sweep.folder / best.name), "point": dict(best.point), "seed": best.seed}
    return {
        "folder": str(sweep.folder),
        "metric": metric,
        "best": {**run, "score": best.scores[metric]},
        "points": points,
    }


def _interval(sweep: Sweep, group: Group) -> tuple[float, float] | None:
    """95 %: of one run its own; of several that of their mean, over resamples of examples and of seeds."""
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


def _lines(sweep: Sweep, facts: dict[str, Any]) -> list[str]:
    """A table of the points, the best run, how far it can be told from the next, and its use."""
    keys, points = _keys(sweep), facts["points"]
    with_seeds = any(len(point["seeds"]) > 1 for point in points)
    table = Table(box=SIMPLE, pad_edge=False)
    for head in [*keys, facts["metric"], *(["± seeds"] if with_seeds else []), "95 % interval", "run", ""]:
        table.add_column(head, justify="left" if head in ("run", "") else "right", overflow="fold")
    for point in points:
        values = [_cell(point["point"][key]) if key in point["point"] else "" for key in keys]
        numbers = [point["score"], *([point["deviation"]] if with_seeds else [])]
        between = "" if point["interval"] is None else "[{:.3f}, {:.3f}]".format(*point["interval"])
        scores = ["" if number is None else f"{number:.4f}" for number in numbers]
        table.add_row(*values, *scores, between, point["name"], point["note"])
    width = None if Console().is_terminal else WIDTH
    console = Console(highlight=False, markup=False, color_system=None, width=width)
    with console.capture() as captured:
        console.print(table)
    text = [line for row in captured.get().split("\n") if (line := row.rstrip())]
    run, done = facts["best"]["run"], [point for point in points if point["status"] == "done"]
    text.append(f"best: {run}")
    if len(done) > 1:
        text.append(f"the best of {len(points)} points on the same examples, so a little optimistic")
        with suppress(LorakitError, IndexError):  # of other examples: each seed holds out its own
            runs = [Path(path) for point in (done[1], done[0]) for path in point["runs"]]
            comparison = compare_runs(runs).facts["comparisons"][0]
            text.append(f"against {done[1]['name']} (A), {done[0]['name']} is B: {comparison['verdict']}")
    return [*text, f'to use it: lorakit predict {shlex.quote(run)} "a text"']


def _keys(sweep: Sweep) -> list[str]:
    """The keys of the points, in the order in which they come."""
    return list(dict.fromkeys(key for member in sweep.members for key in member.point))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write_csv(sweep: Sweep) -> None:
    """sweep.csv: a row for each run, in the order of the table."""
    keys = _keys(sweep)
    scores = list(dict.fromkeys(name for member in sweep.members for name in member.scores if name != "seed"))
    with (
        atomic_file(sweep.folder / "sweep.csv") as unfinished,
        unfinished.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["run", *keys, "seed", "status", "low", "high", *scores, "error"])
        for member in (member for group in sweep.ranked() for member in group.members):
            point = [member.point.get(key, "") for key in keys]
            numbers = [member.scores.get(name, "") for name in scores]
            ends = member.interval or ("", "")
            writer.writerow([member.name, *point, member.seed, member.status, *ends, *numbers, member.error or ""])
