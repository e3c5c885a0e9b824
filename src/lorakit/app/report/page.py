"""The report of one run, from its files, in the order of a reader's questions. The prose is in the templates."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar, NamedTuple

from lorakit.app.arguments import next_folder
from lorakit.app.report.answers import Answer, answer_of, baseline, outcome, printable, short
from lorakit.app.report.charts import (
    Chart,
    Points,
    answer_charts,
    most_confused,
    points_of,
    scores_over_steps,
    smoothed,
    training_charts,
)
from lorakit.app.report.similarities import Similarities
from lorakit.data.audit import alike
from lorakit.runtime.files import atomic_text
from lorakit.tasks.metrics.bootstrap import FEW, LOWER, SIGNIFICANT
from lorakit.training.run_files import RunFiles, keeps_last, read_run, runs_of

FILE = "report.html"
WORST = 20  # mistakes that are shown
SAMPLES = 8  # answers that are shown, right or wrong
FEW_STEPS = 100  # with fewer, a run that scores less than its linear probe is advised to train longer
RISES, RISEN = 3, 1.05  # evaluations with a validation loss this many times the lowest one, where a run over-fits
METHODS = {"head": "a linear probe", "full": "full fine-tuning", "lora": "LoRA"}


Cell = str | float | None


class Table(NamedTuple):
    """A table of the page; the first column names its rows."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Verdict(NamedTuple):
    """The first part of the page: the score compared with chance and a trivial baseline."""

    metric: str
    value: str
    about: str
    sentences: list[str]
    next_steps: list[str]  # what would most likely help, the first one first

    @property
    def lines(self) -> list[str]:
        """What a terminal shows of it: with the one thing that would help most."""
        return [f"{self.metric} {self.value} ({self.about})", *self.sentences, self.next_steps[0]]


@dataclass(frozen=True)
class Content:
    """The content of a run's page."""

    template: ClassVar[str] = "run.html.jinja"
    run: RunFiles
    verdict: Verdict
    scores: Table
    training: list[Chart]
    quality: list[Chart]
    tables: list[Table]
    near: list[Table]
    answers: list[Answer]
    facts: Table
    hashes: Table

    @property
    def sentences(self) -> list[str]:
        """The verdict."""
        return self.verdict.sentences

    @property
    def n_wrong(self) -> int:
        """The number of wrong answers."""
        return sum(answer.error > 0 for answer in self.answers)

    @property
    def worst(self) -> list[Answer]:
        """Wrong answers, the most confident first."""
        wrong = [answer for answer in self.answers if answer.error > 0]
        return sorted(wrong, key=lambda answer: -answer.surprise)[:WORST]

    @property
    def notes(self) -> list[str]:
        """What is left out of the page."""
        pictures = [] if self.architecture.is_file() else [self.architecture.name]
        return [
            f"{name} is missing from the run folder, so the part it would show is left out"
            for name in self.run.missing + pictures
        ]

    @property
    def architecture(self) -> Path:
        """The picture of the model."""
        return self.run.path / "architecture.svg"

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        return f"lorakit train {shlex.quote(str(self.run.path / 'recipe.toml'))} output.dir=again"

    @property
    def json(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "metric": self.verdict.metric,
            "value": self.run.scores.values.get(self.verdict.metric),
            "verdict": self.sentences,
            "wrong": self.n_wrong,
            "notes": self.notes,
        }


def write_report(path: Path) -> Path:
    """Write report.html into a run folder, from its files.

    Raises:
        OutputError: it is not a finished run, a file in it is damaged, or it cannot be written to.
    """
    atomic_text(path / FILE, html(content_of(read_run(path))))
    return path / FILE


def content_of(run: RunFiles) -> Content:
    """The page of a run."""
    answers = [answer_of(prediction) for prediction in run.predictions if prediction.is_judged]
    near = Similarities.of(run)
    return Content(
        run=run,
        verdict=verdict(run),
        scores=score_table(run),
        training=list(training_charts(run.lines, run.scores)),
        quality=[*answer_charts(run, answers), *(near.charts() if near else ())],
        tables=list(_tables(run)),
        near=near_tables(near) if near else [],
        answers=answers,
        facts=Table("facts", "Facts", ("", "value"), list(fact_rows(run))),
        hashes=Table("hashes", "Fingerprints", ("what", "sha256 or version"), list(hash_rows(run))),
    )


def verdict(run: RunFiles) -> Verdict:
    """The score in words, and what to try next."""
    scores, between = run.scores, ""
    if interval := scores.intervals.get(scores.metric):
        between = f"95 % interval {number(interval[0])} to {number(interval[1])}, "
    n = scores.examples.get("validation", len(run.predictions))
    judged = "examples in cross-validation" if scores.folds else "validation example" + "s" * (n != 1)
    base, course = baseline(run.predictions, scores), course_of(run)
    return Verdict(
        scores.metric,
        number(scores.values.get(scores.metric)),
        f"{between}{n:,} {judged}",
        sentences("verdict", run, base, course),
        sentences("next_steps", run, base, course, next_folder(run.path)),
    )


def verdict_in(folder: Path) -> Verdict:
    """The verdict of the run in a folder; for several seeds their mean, then that of the run in the middle."""
    runs = [read_run(path) for path in runs_of(folder)]
    metric = runs[0].scores.metric
    runs.sort(key=lambda run: run.scores.values.get(metric, -math.inf))
    middle = runs[(len(runs) - 1) // 2]
    of_middle = verdict(replace(middle, path=folder))  # the next command is for all seeds
    if len(runs) == 1:
        return of_middle
    values = [run.scores.values.get(metric, math.nan) for run in runs]
    over = f"mean of {len(runs)} seeds, standard deviation {number(stdev(values))}"
    about = f"{over}; what follows is of {middle.name}: {of_middle.value}, {of_middle.about}"
    return of_middle._replace(value=number(fmean(values)), about=about)


class Course(NamedTuple):
    """How a run went, as far as its verdict needs it."""

    only: str | None  # the answer to every validation example, if the gold answers differ
    keeps_last: bool  # whether too few examples were held out to choose a step
    evaluations: int
    best: int  # step, by the metric
    last: int  # evaluated step
    fell: bool  # whether the last evaluation was worse than the best, and the interval does not hold both
    rises: bool  # whether it was better than the one before
    alike: Sequence[str] = ()  # groups of labels that people would read as one
    turned: tuple[int, float] | None = None  # step and validation loss from which on that rose while training's fell
    last_loss: float = 0.0  # on the validation examples


def course_of(run: RunFiles) -> Course:
    """What the answers and the evaluations say."""
    metric, n = run.scores.metric, len(run.predictions)
    answers = (answer_of(prediction) for prediction in run.predictions if prediction.is_judged)
    first = next(answers, None)
    is_one = first is not None and n > 1 and all(answer.answer == first.answer for answer in answers)
    is_one = is_one and len({str(prediction.expected) for prediction in run.predictions}) > 1
    scored = scores_over_steps(run.lines, metric)
    sign = -1 if metric in LOWER else 1
    best = max(scored, key=lambda point: sign * point[1], default=(0, 0.0))
    ends = (scored[-1][1], best[1]) if scored else ()
    low, high = run.scores.intervals.get(metric, (math.inf, -math.inf))
    return Course(
        only=first.answer if first is not None and is_one else None,
        keeps_last=keeps_last(
            run.section("data").get("validation"), run.scores.folds, run.section("train").get("patience"), n
        ),
        evaluations=len(scored),
        best=round(best[0]),
        last=round(scored[-1][0]) if scored else 0,
        fell=len(set(ends)) > 1 and not all(low <= end <= high for end in ends),
        rises=len(scored) > 1 and sign * scored[-1][1] > sign * scored[-2][1],
        alike=[" / ".join(map(repr, group)) for group in alike(run.scores.by_label)],
        turned=_turned(losses := scores_over_steps(run.lines, "loss"), smoothed(points_of(run.lines, "loss"))),
        last_loss=losses[-1][1] if losses else 0.0,
    )


def _turned(judged: Points, trained: Points) -> tuple[int, float] | None:
    """Where the validation loss was lowest, if it is clearly above that in all of several evaluations at the end."""
    step, lowest = min(judged, key=lambda point: point[1], default=(0, 0.0))
    later = [loss for at, loss in judged if at > step][-RISES:]
    at_turn = next((loss for at, loss in trained if at >= step), None)
    has_fallen = at_turn is not None and trained[-1][1] < at_turn
    return (round(step), lowest) if len(later) == RISES and min(later) > RISEN * lowest and has_fallen else None


# Tables


def score_table(run: RunFiles) -> Table:
    """Every score with its interval, and its value on the test examples."""
    rows: list[Sequence[Cell]] = []
    for name, value in run.scores.values.items():
        ends = [number(end) for end in run.scores.intervals.get(name, ())] or ["", ""]
        test = run.scores.test.get(name)
        tested = [number(test) if isinstance(test, float) else ""] if run.scores.test else []
        rows.append([name, number(value), *ends, *tested])
    return Table("scores", "All scores", ("score", "value", "95 % from", "to", *["test"] * bool(run.scores.test)), rows)


def label_rows(run: RunFiles) -> list[list[str]]:
    """Each label with its precision, recall, F1 and number of examples."""
    return [
        [name, *(f"{row.get(key, 0):.3f}" for key in ("precision", "recall", "f1")), f"{row.get('support', 0):,.0f}"]
        for name, row in run.scores.by_label.items()
    ]


def _tables(run: RunFiles) -> Iterator[Table]:
    if rows := label_rows(run):
        yield Table("by-label-table", "Scores by label", ("label", "precision", "recall", "f1", "support"), rows)
    if run.scores.confusion is not None and (cells := most_confused(run.scores.confusion)):
        yield Table("most-confused", "Labels that are often confused", ("expected", "answered", "times"), cells)
    if errors := run.scores.errors:
        rows = [[outcome(kind), f"{n:,}"] for kind, n in errors.items()]
        yield Table("entity-errors", "Entities: right, wrong and missed", ("", "entities"), rows)


def near_tables(near: Similarities) -> list[Table]:
    """What vectors put in the wrong order, and what they put near each other."""
    columns, rows = near.worst()
    names = ("text", "nearest", "second", "third")
    every = [
        Table("worst-pairs", "Worst pairs", columns, rows),
        Table("nearest", "Nearest texts", names, near.neighbours()),
    ]
    return [table for table in every if table.rows]


def fact_rows(run: RunFiles) -> Iterator[tuple[str, Cell]]:
    """Facts and costs of the run, by name."""
    scores, side, unknown = run.scores, run.side, "not recorded"
    yield "task", str(run.section("task").get("name", unknown)).replace("_", " ")
    yield "method", METHODS.get(scores.method, scores.method)
    if side is not None:
        yield "base model", side.base.name + (f" at {side.base.revision}" if side.base.revision else "")
        if side.begins_from:
            yield "starts from", f"{Path(side.begins_from['adapter']).name}, head {side.begins_from['head']}"
    yield "base model stored in", scores.dtype + (f", {side.quantize}" if side and side.quantize != "none" else "")
    for part, n in scores.examples.items():
        yield f"{part} examples", f"{n:,}"
    counts = scores.parameters
    if "trainable" in counts and counts.get("total"):
        share = counts["trainable"] / counts["total"]
        yield "parameters trained", f"{counts['trainable']:,} of {counts['total']:,} ({share:.2%})"
        yield "in LoRA matrices", f"{counts.get('lora', 0):,}"
        yield "in whole modules", f"{counts.get('saved', 0):,}"
    for name, folder in (("size to deploy", run.shipped), ("size of checkpoints", run.path / "checkpoints")):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        yield name, _bytes(size) if folder.is_dir() else "none"
    yield "finished", scores.ended or unknown
    yield "machine", scores.machine or unknown
    yield "best step", f"{scores.best_step:,}"
    yield "training time", unknown if scores.train_seconds is None else duration(scores.train_seconds)
    yield "speed", f"{scores.examples_per_s:.1f} examples/s" if scores.examples_per_s else unknown
    yield "peak memory", unknown if scores.memory_bytes is None else _bytes(scores.memory_bytes)
    yield "padding", unknown if scores.padding is None else f"{scores.padding:.1%} of the tokens"


def hash_rows(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Hashes of the base model, the data and the adapter, and versions of libraries."""
    if run.side is None:
        return
    yield f"base model {run.side.base.name}", run.side.base.sha256
    yield from run.side.data.items()
    yield from ((f"{run.shipped.name}/{name}", sha256) for name, sha256 in run.side.files.items())
    yield from run.side.versions.items()


# Numbers in words


def bare(metric: str, value: float, sign: str = "") -> str:
    """A difference in points of a hundred, or in the score's own unit."""
    return f"{value:{sign}.3g}" if metric in LOWER else f"{100 * value:{sign}.1f}"


def amount(metric: str, value: float) -> str:
    """The same with its unit."""
    return bare(metric, value) + ("" if metric in LOWER else " points")


def number(value: float | None) -> str:
    """Four digits of a score."""
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.4f}"


def p_value(p: float) -> str:
    """A p-value in words."""
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def duration(seconds: float) -> str:
    """Seconds, from two minutes on hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{seconds:.1f} s" if seconds < 120 else f"{hours}{minutes % 60} min {rest} s"


def _bytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


# Templates


def cut(text: str, most: int = 480) -> str:
    """The beginning of a text, and how much was left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def as_address(path: Path) -> str:
    """An SVG file as an address, for the `img` element, in which no script can run."""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorakit.app.report", ""),
        autoescape=lambda name: name not in ("sentences.jinja", "card.md.jinja"),  # which produce plain text
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"quoted": shlex.quote}
    environment.filters |= {
        "short": short,
        "cut": cut,
        "number": number,
        "as_address": as_address,
        "duration": duration,
    }
    environment.globals |= {
        "METHODS": METHODS,
        "FEW": FEW,
        "FEW_STEPS": FEW_STEPS,
        "LOWER": LOWER,
        "SIGNIFICANT": SIGNIFICANT,
        "WORST": WORST,
        "SAMPLES": SAMPLES,
    }
    environment.globals |= {"amount": amount, "bare": bare, "p_value": p_value}
    return environment


def template(name: str, **filters: Callable[..., str]) -> Any:
    """A template of this folder, with filters beside its own."""
    environment = _templates().overlay()
    environment.filters = {**environment.filters, **filters}
    return environment.get_template(name)


def html(content: Any) -> str:
    """A page that needs no other file, no script and no network; every text from data is escaped."""
    text: str = _templates().get_template(content.template).render(page=content)
    return text


def sentences(macro: str, *arguments: Any) -> list[str]:
    """What a macro of sentences.jinja says, a line each."""
    text = str(getattr(_templates().get_template("sentences.jinja").module, macro)(*arguments))
    return [line.strip() for line in text.split("\n") if line.strip()]
