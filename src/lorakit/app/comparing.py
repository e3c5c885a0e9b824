"""What `lorakit compare` shows: scores of runs over the same examples, and whether their differences are more than chance.

Runs whose recipes differ only in the seed form one group. Two groups are compared over pairs of runs with equal seeds.
"""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.app.printing import Output
from lorakit.app.report.page import p_value, sentences
from lorakit.data.example import Columns
from lorakit.errors import ConfigError, DataError
from lorakit.tasks.metrics.bootstrap import SIGNIFICANT, Difference, difference, resample
from lorakit.training.run_files import Sampled, read_resamples, runs_of, sampled

# A difference of so many standard errors is detected by a test at 5 % with power 0.8.
DETECTABLE = statistics.NormalDist().inv_cdf(1 - SIGNIFICANT / 2) + statistics.NormalDist().inv_cdf(0.8)
REPORT = "predictions.jsonl"


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


class Comparison(NamedTuple):
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


def _compare(first: Group, second: Group) -> Comparison:
    by_seed = {run.seed: run for run in second.runs}
    pairs = [(run, by_seed[run.seed]) for run in first.runs if run.seed in by_seed]
    if len(first.runs) == len(second.runs) == 1:  # whose seeds may differ
        pairs = [(first.runs[0], second.runs[0])]
    if not pairs:
        seeds = [", ".join(str(run.seed) for run in group.runs) for group in (first, second)]
        raise ConfigError(
            f"{first.runs[0].path} has the seeds {seeds[0]}, {second.runs[0].path} {seeds[1]}: groups are compared "
            "over pairs of equal seeds"
        )
    for a, b in pairs:
        _check_same_examples(a, b)
    names = [name for name in first.scores if name in second.scores]
    headline, other = (run.resamples.metric for run in pairs[0])
    if not names:
        raise ConfigError(
            f"{pairs[0][0].path} is judged by {headline}, {pairs[0][1].path} by {other}: they have no comparable score in common"
        )
    metric = headline if headline in names else names[0]  # some, such as average precision, cannot be resampled
    sides = [[pair[i].resamples.scores for pair in pairs] for i in (0, 1)]
    n = pairs[0][0].resamples.n
    scores = {name: difference(*([run[name] for run in side] for side in sides)) for name in names}
    detectable = DETECTABLE * scores[metric].spread
    others = {name: gain for name, gain in scores.items() if name != metric}
    (verdict,) = sentences("difference", first.letter, second.letter, metric, scores[metric], n, detectable, others)
    return Comparison(first, second, pairs, metric, scores, verdict)


def _check_same_examples(first: ScoredRun, second: ScoredRun) -> None:
    if first.resamples.sha256 == second.resamples.sha256:
        return
    sides = [_texts(run.path) for run in (first, second)]
    for number, (a, b) in enumerate(zip_longest(*sides), start=1):
        if a != b:
            raise DataError(
                f"{second.path / REPORT}:{number}: {_shown(b)}, in {first.path} {_shown(a)}: the runs were scored on "
                "different examples; --on DATA compares them on the same"
            )
    raise DataError(f"{second.path}: scored on other examples than {first.path}; --on DATA compares them on the same")


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


def _lines(groups: Sequence[Group], comparisons: Sequence[Comparison]) -> list[str]:
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
            f"{len(comparisons)} comparisons: each p stands alone, so that one below 0.05 comes by chance sooner"
        )
    return lines


def _seeds(group: Group) -> str:
    if len(group.runs) == 1:
        return ""
    of_other_examples = len({run.resamples.sha256 for run in group.runs}) > 1
    apart = ", each scored on examples of its own" if of_other_examples else ""
    return f"  (seeds {', '.join(str(run.seed) for run in group.runs)}{apart})"


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _facts(groups: Sequence[Group], comparisons: Sequence[Comparison], on: str | None) -> dict[str, Any]:
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
