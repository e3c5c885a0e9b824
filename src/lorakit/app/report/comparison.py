"""Runs beside each other, on a page of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lorakit.app.comparing import compare_runs
from lorakit.app.report.charts import curves, interval_chart, points_of, scores_over_steps, smoothed
from lorakit.app.report.drawing import Chart, short
from lorakit.app.report.page import METHODS, Cell, Table, fact_rows, number, sentences
from lorakit.errors import ConfigError, DataError
from lorakit.training.run_files import RESAMPLES_FILE, RunFiles

FACTS = ("parameters trained", "size of what ships", "training time", "speed")


@dataclass(frozen=True)
class Comparison:
    """All of the page about several runs."""

    template: ClassVar[str] = "comparison.html.jinja"
    title: str
    sentences: list[str]
    charts: list[Chart]
    tables: list[Table]

    @property
    def json(self) -> dict[str, Any]:
        """The same for a program."""
        return {"verdict": self.sentences}


def tested(runs: Sequence[RunFiles]) -> dict[str, Any] | str:
    """The paired tests of `lorakit compare`, or why there are none."""
    for run in runs:
        if not (run.path / RESAMPLES_FILE).is_file():
            return f"{run.name} has no {RESAMPLES_FILE}"
    try:
        return compare_runs([run.path for run in runs]).facts
    except (ConfigError, DataError) as err:  # of other examples, or with no score in common
        return str(err)


def comparison_of(runs: Sequence[RunFiles]) -> Comparison:
    """What the page about several runs says; they have the letters of `lorakit compare`, or where it cannot compare, one each."""
    tests = tested(runs)
    letters = {str(run.path): chr(ord("A") + i) for i, run in enumerate(runs)}
    if not isinstance(tests, str):
        letters = {path: letter for letter, group in tests["groups"].items() for path in group["runs"]}
    by_name = {f"{letters[str(run.path)]} {run.name}": run for run in runs}
    legend = f"Runs: {', '.join(by_name)}."
    reason, facts = (tests, None) if isinstance(tests, str) else ("", tests)
    return Comparison(
        f"{len(runs)} runs compared",
        [legend, *sentences("compared", reason, facts)],
        list(_charts(by_name)),
        [_overview(by_name), *_differences(facts or {"comparisons": []}), *_settings(by_name)],
    )


def _overview(by_name: Mapping[str, RunFiles]) -> Table:
    rows: list[list[Cell]] = []
    for name, run in by_name.items():
        scores, facts = run.scores, dict(fact_rows(run))
        values = (scores.values.get(scores.metric), *scores.intervals.get(scores.metric, (math.nan, math.nan)))
        method = METHODS.get(scores.method, scores.method)
        rows.append([name, method, scores.metric, *map(number, values), *(facts.get(key, "") for key in FACTS)])
    return Table("runs", "Runs", ("run", "method", "score", "value", "95 % from", "to", *FACTS), rows)


def _differences(tests: Mapping[str, Any]) -> Iterator[Table]:
    for comparison in tests["comparisons"]:
        a, b = comparison["first"], comparison["second"]
        rows = [
            (name, f"{d['value']:+.4f}", f"{d['low']:+.4f}", f"{d['high']:+.4f}", f"{d['p']:.2g}", d["test"])
            for name, d in comparison["differences"].items()
        ]
        title = f"{b} less {a}, over {comparison['examples']:,} examples"
        yield Table(f"difference-{b}-{a}", title, ("score", "difference", "95 % from", "to", "p", "test"), rows)


def _settings(by_name: Mapping[str, RunFiles]) -> Iterator[Table]:
    """The keys of the recipes that are not the same in all of them."""
    flat = [dict(_flat(run.recipe)) for run in by_name.values()]
    keys = dict.fromkeys(key for recipe in flat for key in recipe if not key.startswith("output."))
    rows = [(key, *(recipe.get(key, "not set") for recipe in flat)) for key in keys]
    if rows := [row for row in rows if len(set(row[1:])) > 1]:
        yield Table("settings", "What differs in the recipes", ("key", *by_name), rows)


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _charts(by_name: Mapping[str, RunFiles]) -> Iterator[Chart]:
    metric = next(iter(by_name.values())).scores.metric
    judged = {name: run for name, run in by_name.items() if metric in run.scores.values}
    values = {name: run.scores.values[metric] for name, run in judged.items()}
    yield interval_chart(
        metric,
        [(name, value, *judged[name].scores.intervals.get(metric, (value, value))) for name, value in values.items()],
    )
    losses = {name: smoothed(points_of(run.lines, "loss")) for name, run in by_name.items()}
    scores = {name: scores_over_steps(run.lines, metric) for name, run in judged.items()}
    for name, title, series in (
        ("compared-loss", "Training loss, smoothed", losses),
        ("compared-validation", f"Validation {metric}", scores),
    ):
        if drawn := {run: points for run, points in series.items() if len(points) > 1}:
            ends = ", ".join(f"{short(run, 30)} ends at {points[-1][1]:.4g}" for run, points in drawn.items())
            yield curves(name, title, f"{ends}.", drawn)
