"""The report of one run: what its files say, put in the order in which a reader asks for it."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.app.report.answers import Answer, answers_of, baseline, mistakes
from lorakit.app.report.charts import answer_charts, most_confused, training_charts
from lorakit.app.report.drawing import COLORS, Cell, Chart, printable, short
from lorakit.app.report.label_errors import Suspect
from lorakit.runtime.files import atomic_text
from lorakit.tasks.metrics.bootstrap import LOWER
from lorakit.training.run_files import RunFiles, read_run

FILE = "report.html"
WORST = 20  # mistakes that are shown
SUSPECTS = 30
UNASKED = "not looked for while training; lorakit report RUN looks where the extra lorakit[cleanlab] is installed"
SAMPLES = 8  # answers of a model that writes
METHODS = {"head": "a linear probe", "full": "full fine-tuning", "lora": "LoRA"}


class Table(NamedTuple):
    """A table of the page; the first column names its rows."""

    name: str  # of its CSV file
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Verdict(NamedTuple):
    """The first thing to be read."""

    metric: str
    value: str
    about: str
    sentences: list[str]


@dataclass(frozen=True)
class Content:
    """All of a run's page."""

    run: RunFiles
    verdict: Verdict
    scores: Table
    training: list[Chart]
    quality: list[Chart]
    tables: list[Table]
    mistakes: list[Answer]
    n_wrong: int
    samples: list[Answer]
    architecture: str
    facts: Table
    hashes: Table
    command: str
    suspects: Table | str  # or why there is none
    notes: list[str] = field(default_factory=list)

    @property
    def about_mistakes(self) -> str:
        """Which ones are shown."""
        if any(p.value is not None for p in self.run.predictions):
            return f"The {len(self.mistakes)} answers that are furthest off, of {len(self.run.predictions):,}."
        shown = f"{len(self.mistakes)} of the {self.n_wrong:,} validation examples with a mistake, the surest first."
        marked = any(answer.gold for answer in self.mistakes)
        return shown + " Entities of one side alone have a dashed outline." * marked

    @property
    def charts(self) -> list[Chart]:
        """Every chart."""
        return [*self.training, *self.quality]

    @property
    def all_tables(self) -> list[Table]:
        """Every table."""
        suspects = [self.suspects] if isinstance(self.suspects, Table) else []
        return [self.scores, *self.tables, *suspects, self.facts, self.hashes]


def write_report(path: Path) -> Path:
    """Write report.html into a run folder, from what lies there.

    Raises:
        OutputError: it is no finished run, a file in it is damaged, or it cannot be written to.
    """
    atomic_text(path / FILE, html(content_of(read_run(path))))
    return path / FILE


def content_of(run: RunFiles, beside: Sequence[str] = (), suspects: Sequence[Suspect] | str = UNASKED) -> Content:
    """What the page of a run says; `beside` are sentences about other runs."""
    answers = answers_of(run.predictions)
    wrong = [answer for answer in answers if answer.error > 0]
    return Content(
        run=run,
        verdict=verdict(run, beside),
        scores=score_table(run),
        training=training_charts(run),
        quality=list(answer_charts(run, answers)),
        tables=list(_tables(run)),
        mistakes=mistakes(answers, WORST),
        n_wrong=len(wrong),
        samples=answers[:SAMPLES] if any(p.generated is not None for p in run.predictions) else [],
        architecture=_picture(run.path / "architecture.svg"),
        facts=Table("facts", "What it is and what it cost", ("", "value"), list(fact_rows(run))),
        hashes=Table("hashes", "Fingerprints", ("what", "sha256 or version"), list(hash_rows(run))),
        command=f"lorakit train {shlex.quote(str(run.path / 'recipe.toml'))} output.dir=again",
        suspects=_suspect_table(suspects),
        notes=[f"{name} is not in the run folder; what it would show is left out" for name in _missing(run)],
    )


def _missing(run: RunFiles) -> Iterator[str]:
    yield from run.missing
    if not (run.path / "architecture.svg").is_file():
        yield "architecture.svg"


def _suspect_table(suspects: Sequence[Suspect] | str) -> Table | str:
    if isinstance(suspects, str):
        return suspects
    if not suspects:
        return "none found"
    columns = ("line", "text", "label", "the run says", "confidence")
    rows = [(*suspect[:4], round(suspect.probability, 4)) for suspect in suspects[:SUSPECTS]]
    return Table("suspects", f"{len(suspects)} suspected, the most suspect first", columns, rows)


# The verdict


def verdict(run: RunFiles, beside: Sequence[str]) -> Verdict:
    """The score in words: against chance, against an answer that never looks, against other runs."""
    scores = run.scores
    value = scores.values.get(scores.metric, math.nan)
    n = scores.examples.get("validation", len(run.predictions))
    interval = scores.intervals.get(scores.metric)
    between = f"95 % interval {number(interval[0])} to {number(interval[1])}, " if interval else ""
    sentences = [*_against_baseline(run), *_of_entities(scores.errors), *beside]
    if isinstance(scores.test.get(scores.metric), float):
        sentences.append(f"On the test examples: {scores.metric} {number(scores.test[scores.metric])}.")
    if scores.evaluations > 1:
        sentences.append(
            f"The best of {scores.evaluations} evaluations on the same validation examples, so a little optimistic."
        )
    return Verdict(scores.metric, number(value), f"{between}{n:,} validation examples", sentences)


def _against_baseline(run: RunFiles) -> Iterator[str]:
    found = baseline(run.predictions, run.scores)
    if found is None:
        return
    value, interval = run.scores.values[found.metric], run.scores.intervals.get(found.metric)
    low, high = interval or (value, value)
    gain = (found.score - value) if found.metric in LOWER else (value - found.score)
    amount = difference(found.metric, abs(gain))
    said = f"Always answering {found.what} gives {found.metric} {number(found.score)}"
    if low <= found.score <= high:
        yield f"{said}: the run ({number(value)}) is not better than that by more than chance."
    elif gain > 0:
        yield f"{said}: the run ({number(value)}) is better by {amount}, more than chance explains."
    else:
        yield f"{said}: the run ({number(value)}) is worse than that, by {amount}."


def _of_entities(errors: Mapping[str, int]) -> Iterator[str]:
    gold = sum(count for kind, count in errors.items() if kind != "spurious")
    if gold:
        right, missed, extra = (errors.get(kind, 0) for kind in ("correct", "missed", "spurious"))
        yield (
            f"Of {gold:,} entities {right:,} were found as they are, {gold - right - missed:,} with another type or other "
            f"ends, {missed:,} not at all; {extra:,} were found where there is none."
        )


def difference(metric: str, value: float) -> str:
    """A difference in points of a hundred, or in the score's own unit."""
    return f"{value:.3g}" if metric in LOWER else f"{100 * value:.1f} points"


def number(value: float | None) -> str:
    """Four digits of a score."""
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.4f}"


# Tables


def score_table(run: RunFiles) -> Table:
    """Every score with its interval."""
    rows: list[Sequence[Cell]] = []
    for name, value in run.scores.values.items():
        low, high = run.scores.intervals.get(name, (None, None))
        test = run.scores.test.get(name)
        row = [name, number(value), *(number(end) if end is not None else "" for end in (low, high))]
        rows.append([*row, number(test)] if isinstance(test, float) else row)
    more = ["test"] if run.scores.test else []
    return Table("scores", "All scores", ("score", "value", "95 % from", "to", *more), rows)


def _tables(run: RunFiles) -> Iterator[Table]:
    if run.scores.by_label:
        columns = ("precision", "recall", "f1", "support")
        rows = [
            [name, *(f"{row.get(key, 0):.3f}" for key in columns[:3]), f"{row.get('support', 0):,.0f}"]
            for name, row in run.scores.by_label.items()
        ]
        yield Table("by-label-table", "Scores by label", ("label", *columns), rows)
    if run.scores.confusion is not None and (cells := most_confused(run.scores.confusion)):
        yield Table("most-confused", "Most often confused", ("expected", "answered", "times"), cells)


def fact_rows(run: RunFiles) -> Iterator[tuple[str, Cell]]:
    """What the run is and what it cost, by name."""
    scores, side = run.scores, run.side
    yield "task", str(run.section("task").get("name", "not told")).replace("_", " ")
    yield "method", METHODS.get(scores.method, scores.method)
    if side is not None:
        yield "base model", side.base.name + (f" at {side.base.revision}" if side.base.revision else "")
    yield "weights of the base in", scores.dtype + (f", {side.quantize}" if side and side.quantize != "none" else "")
    for part, n in scores.examples.items():
        yield f"{part} examples", f"{n:,}"
    counts = scores.parameters
    if "trainable" in counts and counts.get("total"):
        yield (
            "parameters trained",
            f"{counts['trainable']:,} of {counts['total']:,} ({counts['trainable'] / counts['total']:.2%})",
        )
        yield "of them LoRA", f"{counts.get('lora', 0):,}"
        yield "of them in whole modules", f"{counts.get('saved', 0):,}"
    yield "size of what ships", _size(run.shipped)
    yield "size of the checkpoints", _size(run.path / "checkpoints")
    yield "best step", f"{scores.best_step:,}"
    yield "training time", _duration(scores.train_seconds)
    yield "speed", f"{scores.examples_per_s:.1f} examples/s" if scores.examples_per_s else "not recorded"
    yield "peak memory", "not recorded" if scores.memory_bytes is None else _bytes(scores.memory_bytes)
    yield "padding", "not recorded" if scores.padding is None else f"{scores.padding:.1%} of the tokens"


def fact(run: RunFiles, name: str) -> Cell:
    """One row of the table of facts."""
    return next((row[1] for row in fact_rows(run) if row[0] == name), "")


def _size(folder: Path) -> str:
    return (
        _bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())) if folder.is_dir() else "none"
    )


def _bytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{seconds:.1f} s" if seconds < 120 else f"{minutes // 60} h {minutes % 60} min {rest} s".removeprefix("0 h ")
    )


def hash_rows(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Of the base model, the data, what ships, and the versions of libraries."""
    if run.side is None:
        return
    yield f"base model {run.side.base.name}", run.side.base.sha256
    yield from run.side.data.items()
    yield from ((f"{run.shipped.name}/{name}", sha256) for name, sha256 in run.side.files.items())
    yield from run.side.versions.items()


def _picture(path: Path) -> str:
    """An SVG as an address, for the `img` element, in which nothing of it can run."""
    if not path.is_file():
        return ""
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


# HTML


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("lorakit.app.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"short": short, "cut": cut}
    found.globals |= {"colors": COLORS}
    return found


def html(content: Any, template: str = "run.html.jinja") -> str:
    """A page that needs no other file, no script and no network; every text from data is escaped."""
    text: str = _templates().get_template(template).render(page=content)
    return text


def cut(text: str, most: int = 480) -> str:
    """The beginning of a text, with what is left out said."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def facts(content: Content) -> dict[str, Any]:
    """The same for a program."""
    return {
        "metric": content.verdict.metric,
        "value": content.run.scores.values.get(content.verdict.metric),
        "verdict": content.verdict.sentences,
        "wrong": content.n_wrong,
        "notes": content.notes,
    }
