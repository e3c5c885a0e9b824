"""Runs beside each other: sentences for the page of one run, and a page of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.app.report.charts import curves, points_of, scores_over_steps, smoothed
from lorakit.app.report.drawing import BLUE, LETTER, Cell, Chart, short
from lorakit.app.report.page import METHODS, Table, difference, fact, number
from lorakit.errors import ConfigError, DataError
from lorakit.tasks.metrics.bootstrap import LOWER, SIGNIFICANT
from lorakit.training.run_files import RESAMPLES_FILE, RunFiles


@dataclass(frozen=True)
class Comparison:
    """All of the page about several runs."""

    title: str
    sentences: list[str]
    charts: list[Chart]
    all_tables: list[Table]


def tested(runs: Sequence[RunFiles]) -> dict[str, Any] | str:
    """The paired tests of `lorakit compare`, or why there are none."""
    from lorakit.app.comparing import compare_runs  # late: needs torch

    for run in runs:
        if not (run.path / RESAMPLES_FILE).is_file():
            return f"{run.name} has no {RESAMPLES_FILE}"
    try:
        return compare_runs([run.path for run in runs]).facts
    except (ConfigError, DataError) as err:  # of other examples, or with no score in common
        return str(err)


def beside(run: RunFiles, others: Sequence[RunFiles]) -> Iterator[str]:
    """How a run does against each of some others, in words."""
    for other in others:
        metric = run.scores.metric
        kind = METHODS.get(other.scores.method, other.scores.method)
        said = (
            f"{kind[0].upper()}{kind[1:]} ({short(other.name)}) has {metric} {number(other.scores.values.get(metric))}"
        )
        found = tested([other, run])
        if isinstance(found, str):
            yield f"{said}; the two cannot be tested against each other: {found}."
        elif not found["comparisons"]:
            yield f"{said}; the two differ in the seed alone."
        else:
            (comparison,) = found["comparisons"]
            yield f"{said}: this run is {_against(comparison)}."


def _against(comparison: Mapping[str, Any]) -> str:
    metric = comparison["metric"]
    found = comparison["differences"][metric]
    way = "better" if (found["value"] > 0) != (metric in LOWER) else "worse"
    low, high = sorted(math.copysign(1, found["value"]) * found[end] for end in ("low", "high"))  # of that way
    p = "p < 0.001" if found["p"] < 0.001 else f"p {found['p']:.2g}"
    test = f"95 % interval {difference(metric, low)} to {difference(metric, high)}, {p}, {found['test']}"
    if found["least_p"] >= SIGNIFICANT:
        test = f"{comparison['examples']} examples are too few for a test"
    chance = "" if found["p"] < SIGNIFICANT else ", no more than chance explains"
    return f"{way} by {difference(metric, abs(found['value']))}{chance} ({test})"


def comparison_of(runs: Sequence[RunFiles]) -> Comparison:
    """What the page about several runs says."""
    found = tested(runs)
    letters = _letters(runs, found)
    names = [f"{letter} {run.name}" for letter, run in zip(letters, runs, strict=True)]
    tables = [_overview(runs, names), *_differences(found), *_settings(runs, names)]
    legend = f"Runs: {', '.join(names)}."
    return Comparison(f"{len(runs)} runs compared", [legend, *_sentences(found)], list(_charts(runs, names)), tables)


def _letters(runs: Sequence[RunFiles], found: Mapping[str, Any] | str) -> list[str]:
    """As `lorakit compare` names them: one for all seeds of a recipe; where it cannot compare, one a run."""
    if isinstance(found, str):
        return [chr(ord("A") + i) for i in range(len(runs))]
    of = {path: letter for letter, group in found["groups"].items() for path in group["runs"]}
    return [of[str(run.path)] for run in runs]


def _sentences(found: Mapping[str, Any] | str) -> list[str]:
    if isinstance(found, str):
        return [f"No tests: {found}."]
    sentences = [comparison["verdict"] + "." for comparison in found["comparisons"]]
    for letter, group in found["groups"].items():
        if len(group["runs"]) > 1:
            name, score = next(iter(group["scores"].items()))
            spread = f", standard deviation {score['deviation']:.4f}" if score["deviation"] is not None else ""
            sentences.append(f"{letter}: mean {name} {score['mean']:.4f}{spread}, over {score['n']} seeds.")
    if len(found["comparisons"]) > 1:
        sentences.append("Several comparisons: each p stands alone, so that one below 0.05 comes by chance sooner.")
    return sentences


def _overview(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    rows: list[list[Cell]] = []
    facts = ("parameters trained", "size of what ships", "training time", "speed")
    for name, run in zip(names, runs, strict=True):
        low, high = run.scores.intervals.get(run.scores.metric, (math.nan, math.nan))
        score = [run.scores.metric, number(run.scores.values.get(run.scores.metric)), number(low), number(high)]
        rows.append(
            [name, METHODS.get(run.scores.method, run.scores.method), *score, *(fact(run, key) for key in facts)]
        )
    columns = ("run", "method", "score", "value", "95 % from", "to", *facts)
    return Table("runs", "Runs", columns, rows)


def _differences(found: Mapping[str, Any] | str) -> Iterator[Table]:
    for comparison in () if isinstance(found, str) else found["comparisons"]:
        a, b = comparison["first"], comparison["second"]
        rows = [
            (name, f"{d['value']:+.4f}", f"{d['low']:+.4f}", f"{d['high']:+.4f}", f"{d['p']:.2g}", d["test"])
            for name, d in comparison["differences"].items()
        ]
        title = f"{b} less {a}, over {comparison['examples']:,} examples"
        yield Table(f"difference-{b}-{a}", title, ("score", "difference", "95 % from", "to", "p", "test"), rows)


def _settings(runs: Sequence[RunFiles], names: Sequence[str]) -> Iterator[Table]:
    """The keys of the recipes that are not the same in all of them."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe if not key.startswith("output."))
    values = {key: [recipe.get(key, "not set") for recipe in flat] for key in keys}
    rows = [(key, *row) for key, row in values.items() if len(set(row)) > 1]
    if rows:
        yield Table("settings", "What differs in the recipes", ("key", *names), rows)


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _charts(runs: Sequence[RunFiles], names: Sequence[str]) -> Iterator[Chart]:
    metric = runs[0].scores.metric
    judged = [(name, run) for name, run in zip(names, runs, strict=True) if metric in run.scores.values]
    yield _interval_chart(metric, judged)
    titles = {"compared-loss": "Training loss, smoothed", "compared-validation": f"Validation {metric}"}
    lines = {
        "compared-loss": {name: smoothed(points_of(run.lines, "loss")) for name, run in zip(names, runs, strict=True)},
        "compared-validation": {name: scores_over_steps(run.lines, metric) for name, run in judged},
    }
    for name, series in lines.items():
        if drawn := {run: points for run, points in series.items() if len(points) > 1}:
            ends = ", ".join(f"{short(run, 30)} ends at {points[-1][1]:.4g}" for run, points in drawn.items())
            yield curves(name, titles[name], f"{ends}.", drawn)


def _interval_chart(metric: str, judged: Sequence[tuple[str, RunFiles]]) -> Chart:
    rows: list[tuple[str, float, float, float]] = []
    for name, run in judged:
        value = run.scores.values[metric]
        rows.append((name, value, *run.scores.intervals.get(metric, (value, value))))

    def draw(axes: Any) -> None:
        for i, (_, value, low, high) in enumerate(rows):
            axes.plot([low, high], [i, i], color=BLUE, linewidth=2)
            axes.plot([value], [i], "o", color=BLUE)
        axes.set_yticks(range(len(rows)), [short(row[0], 26) for row in rows], fontsize=9)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=metric)
        axes.grid(axis="x")

    alt = "; ".join(f"{short(name, 30)} {value:.4f} [{low:.4f}, {high:.4f}]" for name, value, low, high in rows) + "."
    left = 0.2 + LETTER * max((len(short(row[0], 26)) for row in rows), default=0)
    title = f"{metric} with 95 % intervals"
    return Chart(
        "compared", title, alt, ("run", metric, "low", "high"), rows, draw, left, max(1.4, 0.7 + 0.3 * len(rows))
    )
