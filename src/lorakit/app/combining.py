"""`lorakit combine`: one adapter out of several, with weights that are given or searched for on held-out examples.

The search sees one half of the examples, the reported scores are of the other half, which had no part in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.app.arguments import check_free
from lorakit.data.batches import split
from lorakit.data.example import Columns, Example
from lorakit.errors import ConfigError
from lorakit.inference.adapter_folder import load_shipped, read_side, shipped_folder, write_side
from lorakit.inference.answer import answer_all, batches_of
from lorakit.inference.predictor import Predictor
from lorakit.inference.side import Side
from lorakit.lora import (
    Combined,
    Prefix,
    adapter_parameters,
    combine,
    delete_adapter,
    frozen_blocks,
    load_adapter,
    read_adapter_config,
    rename_adapter,
    save_adapter,
    set_adapter,
)
from lorakit.models import save_tokenizer
from lorakit.runtime.device import DTYPES, cast_frozen_, pick_device, to_device
from lorakit.runtime.events import Note, Report, ignore
from lorakit.runtime.files import atomic_folder
from lorakit.tasks.base import inputs_of
from lorakit.tasks.metrics.bootstrap import Difference, Resampled, difference, goodness, interval, resample
from lorakit.tasks.registry import check_labels, make_task
from lorakit.training.prepare import Part

INTO = "combined"
FIRST_STEP, LAST_STEP = 0.5, 0.05  # of a weight, in the search
SAME = ("task", "labels", "quantize", "max_length", "dtype", "pooling")  # of the adapters


@dataclass(frozen=True)
class Way:
    """How adapters are made one, besides their weights; see `lorakit.lora.combine`."""

    method: str = "linear"
    density: float | None = None
    r: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Judge:
    """Labelled examples, and how many weights may be tried on them."""

    data: str
    columns: Columns = field(default_factory=Columns)
    trials: int = 32


class Row(NamedTuple):
    """One combination in the report; its score is of the examples that the search has not seen."""

    name: str
    weights: tuple[float, ...]
    score: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """What was found and written."""

    weights: tuple[float, ...]
    metric: str | None
    rows: list[Row]
    searched: int  # weights tried
    sizes: tuple[int, int]  # examples searched on, and told about
    gain: Difference | None  # of the weights found over the best single adapter
    largest_error: float  # of a layer, where a rank was cut
    r: int
    out: Path | None


class Several:
    """One base model with several adapters in it."""

    def __init__(self, runs: Sequence[Path], way: Way, allow_base_mismatch: bool = False) -> None:
        if len(runs) < 2:
            raise ConfigError("combine takes two runs at least")
        self.runs, self.way = runs, way
        self.folders = [shipped_folder(run) for run in runs]
        self.sides = [read_side(folder) for folder in self.folders]
        _check_alike(runs, self.sides)
        self.side = self.sides[0].model_copy(update={"tuned": {}})
        base = load_shipped(self.folders[0], self.side, allow_base_mismatch=allow_base_mismatch)
        self.model, self.names = base.model, [f"a{i}" for i in range(len(runs))]
        rename_adapter(self.model, "default", self.names[0])
        for folder, name in zip(self.folders[1:], self.names[1:], strict=True):
            load_adapter(self.model, folder, name)
        cast_frozen_(self.model, DTYPES[self.side.dtype])
        self.device = pick_device()
        self.model.to(self.device).eval()
        self.task = make_task(self.side.task, base.tokenizer, self.side.labels, self.side.max_length)

    def read(self, judge: Judge) -> tuple[list[Example], dict[str, str]]:
        """The labelled examples, and their source's sha256."""
        dataset = Predictor(self.model, self.task, self.side, self.device).read_labelled(judge.data, judge.columns)
        check_labels(self.task.name, dataset.examples, self.task.labels)
        return list(dataset.examples), {dataset.source: dataset.sha256}

    def keep_prefix(self, parts: Sequence[Part], report: Report) -> None:
        """Compute what the blocks below all of the adapters answer once for each text."""
        for name in self.names:
            for parameter in adapter_parameters(self.model, name).values():
                parameter.requires_grad_(True)
        items = [item for part in parts for item in part.flat]
        if blocks := frozen_blocks(self.model):
            batches = (
                self.task.collate([items[i] for i in b]) for b in batches_of(self.model, self.task, items, self.device)
            )
            prefix = Prefix(self.model, blocks)
            prefix.fill(
                (to_device(inputs_of(batch), self.device) for batch in batches),
                sum(len(item["input_ids"]) for item in items),
            )
            report(Note(str(prefix)))

    def answers(self, weights: Sequence[float], part: Part) -> list[Any]:
        """Answers of the combination with these weights; of an adapter as it is where it has the only one, 1."""
        alone = [name for name, weight in zip(self.names, weights, strict=True) if weight]
        if len(alone) == 1 and sum(weights) == 1:
            set_adapter(self.model, alone[0])
            return self._answers(part)
        self.combine(weights)
        try:
            return self._answers(part)
        finally:
            delete_adapter(self.model, INTO)

    def _answers(self, part: Part) -> list[Any]:
        return answer_all(self.model, self.task, part.examples, part.items, self.device)

    def combine(self, weights: Sequence[float]) -> Combined:
        """Put the combination into the model, and make it the active adapter; weights of 0 take no part of its rank."""
        way, shares = self.way, {name: weight for name, weight in zip(self.names, weights, strict=True) if weight}
        options = {"method": way.method, "density": way.density, "r": way.r, "seed": way.seed}
        return combine(self.model, list(shares), list(shares.values()), INTO, **options)  # type: ignore[arg-type]


def _check_alike(runs: Sequence[Path], sides: Sequence[Side]) -> None:
    for run, side in zip(runs, sides, strict=True):
        if side.method == "full":
            raise ConfigError(f"{run}: the whole model was trained, there is no adapter to combine")
        for key in SAME:
            ours, theirs = getattr(sides[0], key), getattr(side, key)
            if ours != theirs:
                raise ConfigError(
                    f"{run}: its {key} is {theirs!r}, that of {runs[0]} {ours!r}: adapters of one task and base "
                    "can be combined"
                )
        if differences := sides[0].base.fingerprint.differences(side.base.fingerprint):
            raise ConfigError(f"{run}: trained over another base than {runs[0]}: {'; '.join(differences)}")


def combine_runs(
    runs: Sequence[Path],
    weights: Sequence[float] | None = None,
    judge: Judge | None = None,
    way: Way = Way(),
    out: Path | None = None,
    *,
    allow_base_mismatch: bool = False,
    report: Report = ignore,
) -> Outcome:
    """Combine runs with given weights, or with those that a search finds on one half of the examples of `judge`.

    Raises:
        ConfigError: the adapters cannot be combined, or there are neither weights nor examples.
        OutputError: `out` exists or cannot be written.
    """
    if out is not None:
        check_free(out)
    if weights is None and judge is None:
        raise ConfigError("say --weights, or --on DATA to search them on")
    if weights is not None and len(weights) != len(runs):
        raise ConfigError(f"--weights: {len(weights)} weights for {len(runs)} runs")
    if weights is not None and not any(weights):
        raise ConfigError("--weights: all of them are 0")
    several = Several(runs, way, allow_base_mismatch)
    if judge is None:
        assert weights is not None
        return _write(several, Outcome(tuple(weights), None, [], 0, (0, 0), None, 0.0, 0, None), out, {}, {})
    examples, source = several.read(judge)
    if len(examples) < 4:
        raise ConfigError(f"--on {judge.data}: {len(examples)} examples are too few to search on one half of them")
    halves = split(examples, 0.5, way.seed) if weights is None else ([], examples)
    seen, unseen = (Part(half, several.task.encode(half) if half else ()) for half in halves)
    several.keep_prefix((seen, unseen), report)
    tried = 0
    if weights is None:
        weights, tried = _search(several, seen, judge.trials, report)
    return _write(
        several, _judged(several, tuple(weights), seen, unseen, tried), out, _tuned(several, weights, seen), source
    )


# The search


def _search(several: Several, part: Part, trials: int, report: Report) -> tuple[tuple[float, ...], int]:
    """The best weights found, and how many were tried."""
    metric = several.task.metric

    def value(weights: tuple[float, ...]) -> float:
        try:
            return goodness(several.task.score(part.examples, several.answers(weights, part)), metric)
        except ConfigError:  # a DoRA gain of 0 or less, for these weights
            return float("-inf")

    k = len(several.names)
    starts = [(1 / k,) * k, *(tuple(float(i == j) for i in range(k)) for j in range(k))]
    if trials < len(starts):
        raise ConfigError(f"--search {trials}: {k} adapters alone and their mean are {len(starts)} already")
    weights, tried = search_weights(value, starts, trials)
    report(Note(f"{tried} weights tried on {len(part.examples)} examples"))
    return weights, tried


def search_weights(
    value: Callable[[tuple[float, ...]], float], starts: Sequence[tuple[float, ...]], trials: int
) -> tuple[tuple[float, ...], int]:
    """The best of the starts, moved along one weight at a time as long as that helps; each point is tried once.

    Compass search (Kolda, Lewis & Torczon 2003, SIAM Review 45): a round over all weights without a better point halves
    the step. A tie keeps the earlier point.
    """
    known = {start: _finite(value(start)) for start in starts}
    best = max(known, key=lambda point: known[point])
    step = FIRST_STEP
    while step >= LAST_STEP and len(known) < trials:
        before = best
        for i in range(len(best)):
            for move in (step, -step):
                point = (*best[:i], round(best[i] + move, 6), *best[i + 1 :])
                if point not in known and any(point) and len(known) < trials:
                    known[point] = _finite(value(point))
                    best = point if known[point] > known[best] else best
        if best == before:
            step /= 2
    return best, len(known)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else float("-inf")


# What is reported and written


def _judged(several: Several, weights: tuple[float, ...], seen: Part, unseen: Part, tried: int) -> Outcome:
    """Each adapter alone, equal weights and these ones, on the examples that had no part in the search."""
    k = len(several.names)
    combinations = {str(run): tuple(float(i == j) for j in range(k)) for i, run in enumerate(several.runs)}
    combinations["equal weights"] = (1 / k,) * k
    combinations["found" if tried else "these weights"] = weights
    metric = several.task.metric
    sampled = {name: _resampled(several, of_name, unseen)[metric] for name, of_name in combinations.items()}
    rows = [
        Row(name, combinations[name], score.value, tuple(interval(score, len(unseen.examples))))  # type: ignore[arg-type]
        for name, score in sampled.items()
    ]
    alone = max(list(sampled.values())[:k], key=lambda score: goodness({metric: score.value}, metric))
    gain = difference([alone], [sampled[rows[-1].name]])
    return Outcome(weights, metric, rows, tried, (len(seen.examples), len(unseen.examples)), gain, 0.0, 0, None)


def _resampled(several: Several, weights: Sequence[float], part: Part) -> dict[str, Resampled]:
    found = resample(several.task.statistics(part.examples, several.answers(weights, part)))
    if several.task.metric not in found or not math.isfinite(found[several.task.metric].value):
        raise ConfigError(f"task.metric = {several.task.metric!r} has no interval; combine judges by one that has")
    return found


def _tuned(several: Several, weights: Sequence[float], seen: Part) -> Mapping[str, Any]:
    """Thresholds and the like, on the examples that were searched on."""
    return several.task.tune(seen.examples, several.answers(weights, seen)) if seen.examples else {}


def _write(
    several: Several, outcome: Outcome, out: Path | None, tuned: Mapping[str, Any], source: Mapping[str, str]
) -> Outcome:
    made = several.combine(outcome.weights)
    outcome = replace(outcome, largest_error=max(made.errors.values(), default=0.0), r=made.r, out=out)
    if out is None:
        return outcome
    info = read_adapter_config(several.folders[0])[1]
    data = {name: sha256 for side in several.sides for name, sha256 in side.data.items()}
    about = {
        "runs": [str(run) for run in several.runs],
        "weights": list(outcome.weights),
        **dataclasses.asdict(several.way),
    }
    scores = {outcome.metric: outcome.rows[-1].score} if outcome.metric else {}
    found = {"tuned": dict(tuned), "data": {**data, **source}, "scores": scores, "combined": about}
    with atomic_folder(out) as folder:
        save_adapter(several.model, folder, made.config, info, INTO)
        save_tokenizer(several.task.tokenizer, folder)
        write_side(folder, several.sides[0].model_copy(update=found))
    return outcome


def lines(outcome: Outcome) -> list[str]:
    """The outcome for a terminal."""
    shown = []
    if outcome.metric:
        width = max(len(row.name) for row in outcome.rows)
        shown.append(f"{'':<{width}}  {outcome.metric:>10}   95 % interval    weights")
        for row in outcome.rows:
            weights = " ".join(f"{weight:g}" for weight in row.weights)
            shown.append(
                f"{row.name:<{width}}  {row.score:>10.4f}   [{row.interval[0]:.3f}, {row.interval[1]:.3f}]   {weights}"
            )
        seen, unseen = outcome.sizes
        half = (
            f"the {unseen} examples that the search over {seen} others has not seen" if seen else f"{unseen} examples"
        )
        shown.append(f"scores on {half}" + (f"; {outcome.searched} weights tried" if seen else ""))
    if outcome.gain is not None:
        gain = outcome.gain
        shown.append(
            f"against the best single adapter: {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}, "
            + (f"p {gain.p:.2g} ({gain.test})" if gain.least_p < 1 else "too few examples for a test")
        )
    cut = f", at most {outcome.largest_error:.1%} of a layer's update lost" if outcome.largest_error else ""
    shown.append(f"combined adapter: r {outcome.r}{cut}")
    return [*shown, *([f"adapter: {outcome.out}"] if outcome.out else [])]


def facts(outcome: Outcome) -> dict[str, Any]:
    """The outcome for `--json`."""
    return {
        "out": None if outcome.out is None else str(outcome.out),
        "weights": list(outcome.weights),
        "metric": outcome.metric,
        "combinations": [row._asdict() for row in outcome.rows],
        "searched": outcome.searched,
        "examples": {"searched": outcome.sizes[0], "scored": outcome.sizes[1]},
        "gain": None if outcome.gain is None else outcome.gain._asdict(),
        "r": outcome.r,
        "largest_error": outcome.largest_error,
    }
