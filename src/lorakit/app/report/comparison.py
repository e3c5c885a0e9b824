"""Scores of runs over the same examples, and whether they differ by more than chance: what `lorakit compare` prints, and a page.

Runs whose recipes differ only in the seed form one group. Two groups are compared over pairs of runs with equal seeds.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lorakit.app.printing import Output
from lorakit.app.report.answers import short
from lorakit.app.report.charts import Chart, curves, interval_chart, points_of, scores_over_steps, smoothed
from lorakit.app.report.page import METHODS, Cell, Table, fact_rows, number, p_value, sentences
from lorakit.data.example import Columns
from lorakit.errors import ConfigError, DataError
from lorakit.tasks.metrics.bootstrap import SIGNIFICANT, Difference, difference, resample
from lorakit.training.run_files import RESAMPLES_FILE, RunFiles, Sampled, read_resamples, runs_of, sampled

# A difference of so many standard errors is detected by a test at 5 % with power 0.8.
DETECTABLE = statistics.NormalDist().inv_cdf(1 - SIGNIFICANT / 2) + statistics.NormalDist().inv_cdf(0.8)
REPORT = "predictions.jsonl"
FACTS = ("parameters trained", "size to deploy", "training time", "speed")  # in the overview of the page


@dataclass(frozen=True)
class ScoredRun:
    """A run and its resampled scores; `recipe` identifies it, without the seed."""

    path: Path
    recipe: str
    seed: int | None
    resamples: Sampled


class Group(NamedTuple):
    """Runs of one recipe, and the letter that stands for them."""

    letter: str
    runs: list[ScoredRun]

    @property
    def scores(self) -> dict[str, list[float]]:
        """Each score that all runs have, by run."""
        names = [
            name for name in self.runs[0].resamples.scores if all(name in run.resamples.scores for run in self.runs)
        ]
        return {name: [run.resamples.scores[name].value for run in self.runs] for name in names}


class GroupDifference(NamedTuple):
    """What the second group gains over the first, by score."""

    first: Group
    second: Group
    pairs: list[tuple[ScoredRun, ScoredRun]]
    metric: str  # of the verdict
    scores: dict[str, Difference]
    verdict: str


def compare_runs(paths: Sequence[Path], on: str | None = None, columns: Columns = Columns()) -> Output:
    """Compare runs on their validation examples, or on the examples in `on` by predicting them.

    A folder of several seeds counts as its runs.

    Raises:
        ConfigError: there is nothing to compare. DataError: runs were scored on different examples.
    """
    paths = [run for path in paths for run in runs_of(path)]
    if len(paths) < 2:
        raise ConfigError("compare takes at least two runs")
    runs = [_scored_run(path, read_resamples(path) if on is None else _predicted(path, on, columns)) for path in paths]
    by_recipe: dict[str, list[ScoredRun]] = {}
    for run in runs:
        by_recipe.setdefault(run.recipe, []).append(run)
    groups = [Group(chr(ord("A") + i), members) for i, members in enumerate(by_recipe.values())]
    comparisons = [_compare(groups[0], other) for other in groups[1:]]
    return Output(_lines(groups, comparisons), _facts(groups, comparisons, on))


def _predicted(path: Path, on: str, columns: Columns) -> Sampled:
    from lorakit.inference.predictor import load  # late: torch
    from lorakit.tasks.registry import check_labels

    predictor = load(path)
    examples = predictor.read_labelled(on, columns).examples
    check_labels(predictor.side.task.name, examples, predictor.side.labels)
    resamples = resample(predictor.task.evaluate(examples, predictor.answers(examples)).statistics)
    return sampled(examples, predictor.side.task.selection_metric, resamples)


def _scored_run(path: Path, resamples: Sampled) -> ScoredRun:
    defined = {name: score for name, score in resamples.scores.items() if math.isfinite(score.value)}
    resamples = replace(resamples, scores=defined)
    try:
        recipe = tomllib.loads((path / "recipe.toml").read_text(encoding="utf-8"))
        seed = recipe["train"].pop("seed")
        recipe.pop("output", None)
        return ScoredRun(path, json.dumps(recipe, sort_keys=True), seed, resamples)
    except (OSError, ValueError, KeyError):  # an adapter without a run, which forms its own group
        return ScoredRun(path, str(path.resolve()), None, resamples)


def _compare(first: Group, second: Group) -> GroupDifference:
    by_seed = {run.seed: run for run in second.runs}
    pairs = [(run, by_seed[run.seed]) for run in first.runs if run.seed in by_seed]
    if len(first.runs) == len(second.runs) == 1:  # whose seeds may differ
        pairs = [(first.runs[0], second.runs[0])]
    if not pairs:
        seeds = [", ".join(str(run.seed) for run in group.runs) for group in (first, second)]
        raise ConfigError(
            f"{first.runs[0].path} has the seeds {seeds[0]}, {second.runs[0].path} has {seeds[1]}; groups can "
            "only be compared if they share seeds"
        )
    for a, b in pairs:
        _check_same_examples(a, b)
    names = [name for name in first.scores if name in second.scores]
    headline, other = (run.resamples.metric for run in pairs[0])
    if not names:
        raise ConfigError(
            f"{pairs[0][0].path} is scored by {headline} and {pairs[0][1].path} by {other}, so they have no score in "
            "common"
        )
    metric = headline if headline in names else names[0]  # some, such as average precision, cannot be resampled
    sides = [[pair[i].resamples.scores for pair in pairs] for i in (0, 1)]
    n = pairs[0][0].resamples.n
    scores = {name: difference(*([run[name] for run in side] for side in sides)) for name in names}
    detectable = DETECTABLE * scores[metric].spread
    others = {name: gain for name, gain in scores.items() if name != metric}
    (verdict,) = sentences("difference", first.letter, second.letter, metric, scores[metric], n, detectable, others)
    return GroupDifference(first, second, pairs, metric, scores, verdict)


def _check_same_examples(first: ScoredRun, second: ScoredRun) -> None:
    if first.resamples.sha256 == second.resamples.sha256:
        return
    sides = [_texts(run.path) for run in (first, second)]
    for line, (a, b) in enumerate(zip_longest(*sides), start=1):
        if a != b:
            raise DataError(
                f"{second.path / REPORT}:{line}: {_shown(b)}, but {_shown(a)} in {first.path}; the runs were scored "
                "on different examples; compare them on the same ones with --on DATA"
            )
    raise DataError(
        f"{second.path}: scored on other examples than {first.path}; compare them on the same ones with --on DATA"
    )


def _texts(run: Path) -> list[tuple[Any, ...]]:
    """The inputs and expected answers of a run, by line; empty if they cannot be read."""
    try:
        lines = (run / REPORT).read_text(encoding="utf-8").split("\n")
        return [tuple(json.loads(line).get(key) for key in ("text", "pair", "expected")) for line in lines if line]
    except (OSError, ValueError, AttributeError):
        return []


def _shown(entry: tuple[Any, ...] | None) -> str:
    if entry is None:
        return "nothing"
    text, pair, expected = entry
    return " / ".join(repr(part)[:60] for part in (text, pair, expected) if part is not None)


def _lines(groups: Sequence[Group], comparisons: Sequence[GroupDifference]) -> list[str]:
    lines = [f"{group.letter}  {', '.join(str(run.path) for run in group.runs)}{_seeds(group)}" for group in groups]
    for group in groups:
        if len(group.runs) > 1 or not comparisons:
            lines += ["", f"{group.letter}: mean and standard deviation over {len(group.runs)} runs"]
            for name, values in group.scores.items():
                spread = "" if (deviation := _deviation(values)) is None else f" ± {deviation:.4f}"
                lines.append(f"{name:<22} {statistics.fmean(values):.4f}{spread}")
    for comparison in comparisons:
        a, b = comparison.first, comparison.second
        width = max(map(len, comparison.scores))
        lines += ["", f"{'':<{width}}  {a.letter:>7}  {b.letter:>7}  {f'{b.letter} - {a.letter}':>7}  95 % interval"]
        for name, gain in comparison.scores.items():
            sides = zip(*comparison.pairs, strict=True)
            means = [statistics.fmean(run.resamples.scores[name].value for run in side) for side in sides]
            numbers = f"{means[0]:7.4f}  {means[1]:7.4f}  {gain.value:+7.4f}"
            interval = f"[{gain.low:+.4f}, {gain.high:+.4f}]  {p_value(gain.p)}, {gain.test}"
            lines.append(
                f"{name:<{width}}  {numbers}  {interval if gain.least_p < SIGNIFICANT else 'too few examples'}"
            )
        lines.append(comparison.verdict)
    if len(comparisons) > 1:
        lines.append(
            f"{len(comparisons)} comparisons: with several of them, a p-value below 0.05 is more likely to occur by "
            "chance"
        )
    return lines


def _seeds(group: Group) -> str:
    if len(group.runs) == 1:
        return ""
    of_other_examples = len({run.resamples.sha256 for run in group.runs}) > 1
    apart = ", each scored on its own examples" if of_other_examples else ""
    return f"  (seeds {', '.join(str(run.seed) for run in group.runs)}{apart})"


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _facts(groups: Sequence[Group], comparisons: Sequence[GroupDifference], on: str | None) -> dict[str, Any]:
    return {
        "on": on,
        "groups": {
            group.letter: {
                "runs": [str(run.path) for run in group.runs],
                "seeds": [run.seed for run in group.runs],
                "scores": {
                    name: {"mean": statistics.fmean(values), "deviation": _deviation(values), "n": len(values)}
                    for name, values in group.scores.items()
                },
            }
            for group in groups
        },
        "comparisons": [
            {
                "first": comparison.first.letter,
                "second": comparison.second.letter,
                "pairs": len(comparison.pairs),
                "examples": comparison.pairs[0][0].resamples.n,
                "metric": comparison.metric,
                "differences": {name: gain._asdict() for name, gain in comparison.scores.items()},
                "verdict": comparison.verdict,
            }
            for comparison in comparisons
        ],
    }


# The page


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
    """What the page about several runs says; they have the letters of `lorakit compare`, or where it cannot
    compare, one each."""
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
        title = f"{b} minus {a}, over {comparison['examples']:,} examples"
        yield Table(f"difference-{b}-{a}", title, ("score", "difference", "95 % from", "to", "p", "test"), rows)


def _settings(by_name: Mapping[str, RunFiles]) -> Iterator[Table]:
    """The keys of the recipes that are not the same in all of them."""
    flat = [dict(_flat(run.recipe)) for run in by_name.values()]
    keys = dict.fromkeys(key for recipe in flat for key in recipe if not key.startswith("output."))
    rows = [(key, *(recipe.get(key, "not set") for recipe in flat)) for key in keys]
    if rows := [row for row in rows if len(set(row[1:])) > 1]:
        yield Table("settings", "Differences between the recipes", ("key", *by_name), rows)


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
