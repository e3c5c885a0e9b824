"""`lorakit combine`: one adapter from several, with fixed weights or weights searched for on held-out examples.

The search uses one half of the examples; the reported scores are of the other half.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.app.arguments import RUN, check_free, named_columns
from lorakit.app.printing import Output
from lorakit.data.example import Columns
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lorakit.inference.side import Side
    from lorakit.lora import Combined
    from lorakit.runtime.events import Report
    from lorakit.tasks.metrics.bootstrap import Resampled
    from lorakit.training.prepare import Part

INTO = "combined"
FIRST_STEP, LAST_STEP = 0.5, 0.05  # of a weight, in the search
UNUSABLE = -1e9  # the value of weights that give no valid adapter or score
SAME = ("task", "labels", "quantize", "max_length", "dtype")  # of the adapters


def _weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(","))
    except ValueError as err:
        raise click.BadParameter(f"{text!r}: numbers with commas, for example 0.7,0.3") from err


@click.command()
@click.argument("runs", type=RUN, nargs=-1, metavar="RUN RUN [RUN ...]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write the adapter to; unset: only print.")
@click.option("--on", metavar="DATA", help="Labelled examples: one half to search on, the other to score.")
@click.option("--search", type=click.IntRange(min=1), default=32, show_default=True, help="The most weights to try.")
@click.option("--weights", callback=_weights, metavar="W,W,...", help="Use these weights; no search.")
@click.option("--method", default="linear", show_default=True, help="linear, ties, dare, dare_ties, magnitude_prune.")
@click.option("--density", type=float, help="Share of entries to keep, for all methods but linear.")
@click.option("--rank", type=click.IntRange(min=1), help="Approximate the result at this rank; unset: exact.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the two halves and of dare's random drops."
)
@click.option("--text", help="Column of the text; unset: as in training.")
@click.option("--pair", help="Column of the second text of pairs; unset: as in training.")
@click.option("--label", help="Column of the label; unset: as in training.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load adapters onto a base model they were not trained on.")
def combine(
    runs: tuple[Path, ...], out: Path | None, on: str | None, weights: tuple[float, ...] | None, **options: Any
) -> None:
    """Combine several RUNs of one task and base into one adapter, with fixed weights or the best of a search.

    \b
    lorakit combine runs/a runs/b --on validation.csv --out runs/ab
    lorakit combine runs/a runs/b --weights 0.5,0.5 --out runs/ab
    """
    from lorakit.app.console import Screen

    columns = named_columns(options["text"], options["pair"], options["label"])
    judge = None if on is None else Judge(on, columns, options["search"])
    way = Way(options["method"], options["density"], options["rank"], options["seed"])
    mismatch = options["allow_base_mismatch"]
    output = combine_runs(runs, weights, judge, way, out, allow_base_mismatch=mismatch, report=Screen())
    output.show(options["as_json"])


@dataclass(frozen=True)
class Way:
    """How adapters are combined, apart from their weights; see `lorakit.lora.combine`."""

    method: str = "linear"
    density: float | None = None
    r: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Judge:
    """Labelled examples, and the most weights to try on them."""

    data: str
    columns: Columns = field(default_factory=Columns)
    trials: int = 32


def combine_runs(
    runs: Sequence[Path],
    weights: Sequence[float] | None = None,
    judge: Judge | None = None,
    way: Way = Way(),
    out: Path | None = None,
    *,
    allow_base_mismatch: bool = False,
    report: Report | None = None,
) -> Output:
    """Combine runs with given weights, or with those that a search finds on one half of the examples of `judge`.

    Raises:
        ConfigError: the adapters cannot be combined, or there are neither weights nor examples.
        OutputError: `out` exists or cannot be written.
    """
    from lorakit.data.batches import split
    from lorakit.runtime.events import Note, ignore
    from lorakit.training.prepare import Part

    report = report or ignore
    if out is not None:
        check_free(out)
    if weights is None and judge is None:
        raise ConfigError("pass --weights, or --on DATA to search for them")
    if weights is not None and len(weights) != len(runs):
        raise ConfigError(f"--weights: {len(weights)} weights for {len(runs)} runs")
    if weights is not None and not any(weights):
        raise ConfigError("--weights: all of them are 0")
    several = Several(runs, way, allow_base_mismatch)
    seen, unseen, tried = Part([], ()), Part([], ()), 0
    comparison = Output([], {"metric": None, "combinations": [], "gain": None})
    written: dict[str, Any] = {"data": {name: sha256 for side in several.sides for name, sha256 in side.data.items()}}
    if judge is not None:
        dataset = several.read(judge)
        examples = list(dataset.examples)
        if len(examples) < 4:
            raise ConfigError(
                f"--on {judge.data}: {len(examples)} examples are too few: one half is used for the search"
            )
        halves = split(examples, 0.5, way.seed) if weights is None else ([], examples)
        seen, unseen = (Part(half, several.task.encode(half) if half else ()) for half in halves)
        if weights is None:
            weights, tried = several.search(seen, judge.trials)
            report(Note(f"{tried} weights tried on {len(seen.examples)} examples"))
        comparison = several.compare(weights, unseen, searched_on=len(seen.examples), tried=tried)
        written["data"][dataset.source] = dataset.sha256
        written["scores"] = {several.side.task.selection_metric: comparison.facts["combinations"][-1]["score"]}
        if seen.examples:  # thresholds and the like
            tuned = several.task.evaluate(seen.examples, several.answers(weights, seen)).tuned
            written["tuned"] = {**several.side.tuned, **tuned}
    assert weights is not None
    made = several.combine(weights)
    if out is not None:
        several.write(out, made, weights, written)
    error = max(made.errors.values(), default=0.0)  # of a layer, where a rank was cut
    cut = f", at most {error:.1%} of a layer's update lost" if error else ""
    lines = [f"combined adapter: r {made.r}{cut}", *([f"adapter: {out}"] if out else [])]
    facts = {
        "out": out and str(out),
        "weights": list(weights),
        "metric": comparison.facts["metric"],
        "combinations": comparison.facts["combinations"],
        "searched": tried,
        "examples": {"searched": len(seen.examples), "scored": len(unseen.examples)},
        "gain": comparison.facts["gain"],
        "r": made.r,
        "largest_error": error,
    }
    return Output([*comparison.lines, *lines], facts)


class Several:
    """One base model with several adapters in it."""

    def __init__(self, runs: Sequence[Path], way: Way, allow_base_mismatch: bool = False) -> None:
        from lorakit.inference.adapter_folder import load_shipped, read_side, shipped_folder
        from lorakit.lora import load_adapter, rename_adapter
        from lorakit.runtime.device import DTYPES, cast_frozen_, pick_device
        from lorakit.tasks.registry import make_task

        if len(runs) < 2:
            raise ConfigError("combine takes at least two runs")
        self.runs, self.way = runs, way
        self.folders = [shipped_folder(run) for run in runs]
        self.sides = [read_side(folder) for folder in self.folders]
        _check_alike(runs, self.sides)
        # what was tuned on a run's answers is tuned anew; the units of numbers belong to the heads
        units = dict(self.sides[0].tuned) if self.sides[0].task.info.wants == "number" else {}
        self.side = self.sides[0].model_copy(update={"tuned": units})
        base = load_shipped(self.folders[0], self.side, allow_base_mismatch=allow_base_mismatch)
        self.model, self.tokenizer, self.names = base.model, base.tokenizer, [f"a{i}" for i in range(len(runs))]
        rename_adapter(self.model, "default", self.names[0])
        for folder, name in zip(self.folders[1:], self.names[1:], strict=True):
            load_adapter(self.model, folder, name)
        if units:
            for side, name in zip(self.sides[1:], self.names[1:], strict=True):
                _convert_units(self.model, name, side.tuned, units)
        cast_frozen_(self.model, DTYPES[self.side.dtype])
        self.device = pick_device()
        self.model.to(self.device).eval()
        self.task = make_task(self.side.task, base.tokenizer, self.side.labels, self.side.max_length, units)
        k = len(runs)
        self.alone = [tuple(float(i == j) for j in range(k)) for i in range(k)]
        self.equal = (1 / k,) * k

    def read(self, judge: Judge) -> Any:
        """The labelled examples."""
        from lorakit.inference.predictor import Predictor
        from lorakit.tasks.registry import check_labels

        predictor = Predictor(self.model, self.task, self.side, self.device, self.tokenizer)
        dataset = predictor.read_labelled(judge.data, judge.columns)
        check_labels(self.side.task.name, dataset.examples, self.side.labels)
        return dataset

    def combine(self, weights: Sequence[float]) -> Combined:
        """Put the combination into the model, and make it the active adapter; weights of 0 add nothing to its rank."""
        from lorakit.lora import combine

        shares = {name: weight for name, weight in zip(self.names, weights, strict=True) if weight}
        options: dict[str, Any] = dataclasses.asdict(self.way)
        return combine(self.model, list(shares), list(shares.values()), INTO, **options)

    def answers(self, weights: Sequence[float], part: Part) -> list[Any]:
        """Answers of the combination with these weights; with a single weight of 1, of that adapter unchanged."""
        from lorakit.inference.answer import answer_all
        from lorakit.lora import delete_adapter, set_adapter

        is_single = tuple(weights) in self.alone
        if is_single:
            set_adapter(self.model, self.names[self.alone.index(tuple(weights))])
        else:
            self.combine(weights)
        try:
            return answer_all(self.model, self.task, part.examples, part.items, self.device)
        finally:
            if not is_single:
                delete_adapter(self.model, INTO)

    def search(self, part: Part, trials: int) -> tuple[tuple[float, ...], int]:
        """The best weights, and how many were tried."""
        from lorakit.tasks.metrics.bootstrap import goodness

        metric = self.side.task.selection_metric

        def value(weights: tuple[float, ...]) -> float:
            try:
                return goodness(self.task.evaluate(part.examples, self.answers(weights, part)).scores, metric)
            except ConfigError:  # a DoRA gain of 0 or less, for these weights
                return UNUSABLE

        if trials <= len(self.alone):
            raise ConfigError(
                f"--search {trials}: {len(self.alone)} adapters and their mean already make {len(self.alone) + 1}"
            )
        return search_weights(value, [self.equal, *self.alone], trials)

    def compare(self, weights: Sequence[float], part: Part, *, searched_on: int, tried: int) -> Output:
        """Each adapter alone, equal weights and these weights, on examples that the search did not use."""
        from lorakit.tasks.metrics.bootstrap import difference, goodness, interval

        metric = self.side.task.selection_metric
        combinations = dict(zip(map(str, self.runs), self.alone, strict=True))
        combinations |= {"equal weights": self.equal, "found" if tried else "these weights": tuple(weights)}
        sampled = [self._resampled(each, part) for each in combinations.values()]
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "weights": each,
                "score": score.value,
                "interval": tuple(interval(score, len(part.examples))),
            }
            for (name, each), score in zip(combinations.items(), sampled, strict=True)
        ]
        best = max(sampled[: len(self.runs)], key=lambda score: goodness({metric: score.value}, metric))
        gain = difference([best], [sampled[-1]])
        width = max(map(len, combinations))
        lines = [f"{'':<{width}}  {metric:>10}   95 % interval    weights"]
        for row in rows:
            low, high = row["interval"]
            shown = " ".join(f"{weight:g}" for weight in row["weights"])
            lines.append(f"{row['name']:<{width}}  {row['score']:>10.4f}   [{low:.3f}, {high:.3f}]   {shown}")
        n = len(part.examples)
        lines.append(
            f"scores on the {n} examples that the search over {searched_on} others has not seen; {tried} weights tried"
            if searched_on
            else f"scores on {n} examples"
        )
        lines.append(
            f"against the best single adapter: {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}, "
            + (f"p {gain.p:.2g} ({gain.test})" if gain.least_p < 1 else "too few examples for a test")
        )
        return Output(lines, {"metric": metric, "combinations": rows, "gain": gain._asdict()})

    def _resampled(self, weights: Sequence[float], part: Part) -> Resampled:
        from lorakit.tasks.metrics.bootstrap import resample

        metric = self.side.task.selection_metric
        scores = resample(self.task.evaluate(part.examples, self.answers(weights, part)).statistics)
        if metric not in scores or not math.isfinite(scores[metric].value):
            raise ConfigError(f"task.metric = {metric!r} has no confidence interval, which combine needs")
        return scores[metric]

    def write(self, out: Path, made: Combined, weights: Sequence[float], more: dict[str, Any]) -> None:
        """Write the combination as an adapter folder that records its parts."""
        from lorakit.inference.adapter_folder import write_side
        from lorakit.lora import read_adapter_config, save_adapter
        from lorakit.runtime.files import atomic_folder

        runs = {"runs": [str(run) for run in self.runs], "weights": list(weights), **dataclasses.asdict(self.way)}
        side = self.side.model_copy(update={"scores": {}, **more, "combined": runs})
        with atomic_folder(out) as folder:
            save_adapter(self.model, folder, made.config, read_adapter_config(self.folders[0])[1], INTO)
            self.tokenizer.save_pretrained(folder)
            write_side(folder, side)


def _convert_units(model: nn.Module, adapter: str, units: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Let an adapter's head for numbers, which answers (y - mean) / spread, do so in the units of another one."""
    from torch import nn

    from lorakit.lora import SavedModule, hosts

    saved = [host.adapters[adapter] for _, host in hosts(model) if isinstance(host, SavedModule)]
    head = [layer for module in saved for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    scale = units["spread"] / target["spread"]
    head.weight.data.mul_(scale)
    head.bias.data.mul_(scale).add_((units["mean"] - target["mean"]) / target["spread"])


def _check_alike(runs: Sequence[Path], sides: Sequence[Side]) -> None:
    for run, side in zip(runs, sides, strict=True):
        if side.method == "full":
            raise ConfigError(f"{run}: fully fine-tuned: it has no adapter to combine")
        for key in SAME:
            ours, theirs = getattr(sides[0], key), getattr(side, key)
            if ours != theirs:
                raise ConfigError(
                    f"{run}: its {key} is {theirs!r}, that of {runs[0]} {ours!r}: only adapters of one task and base "
                    "can be combined"
                )
        if differences := sides[0].base.fingerprint.differences(side.base.fingerprint):
            raise ConfigError(f"{run}: trained over another base than {runs[0]}: {'; '.join(differences)}")


def search_weights(
    value: Callable[[tuple[float, ...]], float], starts: Sequence[tuple[float, ...]], trials: int
) -> tuple[tuple[float, ...], int]:
    """The best weights, by Nelder and Mead's simplex from the best of the starts, and how many were tried, each once.

    Ties keep the earlier weights.
    """
    import numpy as np
    from scipy.optimize import minimize

    known: dict[tuple[float, ...], float] = {}

    def loss(x: Sequence[float]) -> float:
        point = tuple(round(float(weight), 6) for weight in x)
        if point not in known and any(point):
            known[point] = score if math.isfinite(score := value(point)) else UNUSABLE
        return -known.get(point, UNUSABLE)

    best = np.array(min(starts, key=loss))
    simplex = np.vstack([best, best + FIRST_STEP * np.eye(len(best))])
    if trials > len(starts):
        limits = {"maxfev": trials - len(starts) + 1, "xatol": LAST_STEP, "fatol": 0.0}  # the first is known
        minimize(loss, best, method="Nelder-Mead", options={"initial_simplex": simplex, **limits})
    return max(known, key=lambda point: known[point]), len(known)
