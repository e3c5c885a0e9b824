"""Charts, drawn by matplotlib as SVG for a page; and which of them a run has: how it was trained, where its answers are wrong."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from lorakit.app.report.answers import Answer, printable, short
from lorakit.runtime.files import atomic_file
from lorakit.tasks.metrics.bootstrap import around_mean, wilson
from lorakit.tasks.metrics.labels import bins_of, calibration_error
from lorakit.training.run_files import Confusion, Line, RunFiles, RunScores

INK = "#000001"  # on a page it is currentColor: dark letters on light paper, light ones on dark
BLUE, RED, GREEN, AMBER = "#2f80d0", "#d9534f", "#2b9a58", "#b7791f"  # legible on both
SERIES = (BLUE, RED, GREEN, AMBER, INK)
WIDTH, HEIGHT = 4.8, 3.0  # inches; 346 points wide, so that letters stay legible on a phone
LEFT, RIGHT, TOP, BOTTOM = 0.72, 0.15, 0.12, 0.5
LETTER = 0.082  # inches
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
LENGTHS = 8  # groups of examples of similar length
POINTS = 2000  # in a scatter plot
NAMED, NUMBERED = 24, 12  # classes of a confusion matrix that still get their names, and their numbers
EPOCHS = 8  # ticks of an axis, about
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label with $ in it is a label
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
}


Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart, and what it shows in words."""

    name: str
    title: str
    alt: str
    draw: Callable[[Any], None]  # on matplotlib's axes
    left: float = LEFT  # inches for the names of the rows
    height: float = HEIGHT
    bottom: float = BOTTOM

    @property
    def svg(self) -> str:
        """An `svg` element to stand in a page."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # without pyplot: no global state, no window system

        # the salt makes ids that no other chart of a page has
        with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            figure = Figure(figsize=(WIDTH, self.height))
            FigureCanvasAgg(figure)
            figure.subplots_adjust(
                left=self.left / WIDTH,
                right=1 - RIGHT / WIDTH,
                bottom=self.bottom / self.height,
                top=1 - TOP / self.height,
            )
            self.draw(figure.subplots())
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return for_page(file.getvalue(), f"{self.title}: {self.alt}")


def for_page(svg: str, label: str) -> str:
    """matplotlib's SVG as a part of a page: its ink the page's, no size, no fonts, no ids but those it needs.

    What came from data is text in it, and is escaped again.
    """
    root = ElementTree.fromstring(svg)
    elements = list(root.iter())
    used = set(re.findall(r"#([\w-]+)", " ".join(value for e in elements for value in e.attrib.values())))
    for element in elements:
        for child in list(element):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                element.remove(child)
        element.tag = element.tag.removeprefix(SVG)
        if XLINK in element.attrib:
            element.set("href", element.attrib.pop(XLINK))
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if style := element.get("style"):
            style = re.sub(r"font-family:[^;]*;?", "", re.sub(r"font: ?(\d+px)[^;]*", r"font-size: \1", style))
            element.set("style", style.replace(INK, "currentColor"))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(label)}
    return ElementTree.tostring(root, encoding="unicode")


# Over steps


def training_charts(lines: Sequence[Line], scores: RunScores) -> Iterator[Chart]:
    """Loss in training and in validation, validation score, learning rate and norm of the gradient."""
    metric, per_epoch = scores.metric, steps_per_epoch(lines)
    losses, scored = points_of(lines, "loss"), scores_over_steps(lines, metric)
    if losses:
        smooth = smoothed(losses)
        alt = f"training from {losses[0][1]:.3g} at step {losses[0][0]} to {smooth[-1][1]:.3g} (smoothed) at step {losses[-1][0]}"
        series = {"each logged step": losses, "training, smoothed": smooth}
        if judged := scores_over_steps(lines, "loss"):
            lowest = min(judged, key=lambda point: point[1])
            alt += f"; validation lowest at step {lowest[0]}, {lowest[1]:.3g}"
            series["validation"] = judged
        yield curves("loss", "Loss", f"{alt}.", series, per_epoch)
    if scored:
        best = max((line.step for line in lines if line.is_best), default=scored[-1][0])
        of_best = scores.intervals.get(metric) if best == scores.best_step else None
        alt = f"{len(scored)} evaluations, from {scored[0][1]:.4f} to {scored[-1][1]:.4f}; the best, circled, at step {best}"
        alt += ", with its 95 % interval." if of_best else "."
        yield curves("validation", f"Validation {metric}", alt, {metric: scored}, per_epoch, mark=(best, of_best))
    for key, name in (("lr", "Learning rate"), ("grad_norm", "Norm of the gradient")):
        if points := points_of(lines, key):
            alt = f"at most {max(y for _, y in points):.3g}, {points[-1][1]:.3g} at the last logged step."
            yield curves(key, name, alt, {name: points}, per_epoch)


def scores_over_steps(lines: Sequence[Line], metric: str) -> Points:
    """A validation score at each evaluation that has it."""
    return [(line.step, line.validation[metric]) for line in lines if line.validation and metric in line.validation]


def points_of(lines: Sequence[Line], key: str) -> Points:
    """A number of the logged steps."""
    return [(line.step, getattr(line, key)) for line in lines if getattr(line, key) is not None]


def steps_per_epoch(lines: Sequence[Line]) -> float:
    """By the last logged step; 0 where none says its epoch."""
    return next((line.step / line.epoch for line in reversed(lines) if line.epoch), 0.0)


def smoothed(points: Points, weight: float = 0.9) -> Points:
    """An exponential mean of the points, corrected for its start."""
    mean, total, smooth = 0.0, 0.0, []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        smooth.append((x, mean / total))
    return smooth


def curves(
    name: str,
    title: str,
    alt: str,
    series: Mapping[str, Points],
    per_epoch: float = 0.0,
    *,
    mark: tuple[float, tuple[float, float] | None] = (-1, None),
) -> Chart:
    """Lines over steps, a tick an epoch; `each logged step` is in the background, `mark` a step and its interval."""

    def draw(axes: Any) -> None:
        colors = iter(SERIES)
        for label, points in series.items():
            faint = label == "each logged step"
            color = SERIES[0] if faint else next(colors)
            dots = "o" if len(points) < 30 and not faint else None
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                marker=dots,
                markersize=3.5,
                label="_" if faint else short(label, 28),
                alpha=0.35 if faint else 1,
                linewidth=1.0 if faint else 1.6,
            )
            for x, y in points:
                if x == mark[0]:
                    axes.plot([x], [y], "o", markersize=10, markerfacecolor="none", markeredgecolor=INK)
                    axes.vlines([x] * bool(mark[1]), *(mark[1] or (y, y)), color=color, linewidth=6, alpha=0.3)
        axes.set(xlabel="step")
        last = max(x for points in series.values() for x, _ in points)
        if per_epoch and last >= per_epoch:
            every = math.ceil(last / per_epoch / EPOCHS)
            epochs = range(0, round(last / per_epoch) + 1, every)
            axes.set_xticks([epoch * per_epoch for epoch in epochs], [str(epoch) for epoch in epochs])
            axes.set(xlabel=f"epoch (of {per_epoch:,.0f} steps)")
        axes.grid()
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=9)

    return Chart(name, title, alt, draw)


def interval_chart(metric: str, rows: Sequence[tuple[str, float, float, float]]) -> Chart:
    """The score of each run, as (name, value, low, high)."""

    def draw(axes: Any) -> None:
        for i, (_, value, low, high) in enumerate(rows):
            axes.plot([low, high], [i, i], color=BLUE, linewidth=2)
            axes.plot([value], [i], "o", color=BLUE)
        axes.set_yticks(range(len(rows)), [short(row[0], 26) for row in rows], fontsize=9)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=metric)
        axes.grid(axis="x")

    alt = "; ".join(f"{short(name, 30)} {value:.4f} [{low:.4f}, {high:.4f}]" for name, value, low, high in rows) + "."
    title, height = f"{metric} with 95 % intervals", max(1.4, 0.7 + 0.3 * len(rows))
    return Chart("compared", title, alt, draw, _room([row[0] for row in rows], 26), height)


def _room(names: Sequence[str], most: int) -> float:
    """Inches for the names of the rows."""
    return 0.2 + LETTER * max((len(short(name, most)) for name in names), default=0)


def write_loss(path: Path, lines: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> None:
    """The first two charts of a report's training, loss and validation score, beside each other."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no window system

    charts = training_charts([Line.model_validate(line) for line in lines], RunScores.model_validate(scores))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6))
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.14, top=0.9)  # a layout engine takes half a second
        FigureCanvasAgg(figure)
        for axes, chart in zip(figure.subplots(1, 2), charts, strict=False):
            chart.draw(axes)
            axes.set_title(chart.title)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format=path.suffix.removeprefix("."))


# Of the answers


def answer_charts(run: RunFiles, answers: Sequence[Answer]) -> Iterator[Chart]:
    """Those that the run's task has."""
    if run.scores.confusion is not None:
        yield confusion_chart(run.scores.confusion)
    values = [(p.expected, p.value) for p in run.predictions if p.value is not None]
    if numbers := [(x, y) for x, y in values if isinstance(x, float) and y is not None]:
        yield scatter(numbers)
    if sureness := [pair for answer in answers for pair in answer.sureness]:
        yield calibration_chart(sureness)
    if len(answers) > 1:
        yield length_chart(answers, is_share=not numbers)


def confusion_chart(confusion: Confusion) -> Chart:
    """Each cell's colour is its share of the row, so that rare labels are as easy to read as common ones."""
    labels, matrix = confusion.labels, confusion.matrix
    n, named = len(labels), len(labels) <= NAMED

    def draw(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    color, share = GREEN if i == j else RED, 0.08 + 0.52 * count / sum(row)
                    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=color, alpha=share, linewidth=0))
                if n <= NUMBERED:
                    axes.text(j, i, f"{count:,}", ha="center", va="center", fontsize=10 if n < 8 else 7)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), xlabel="answered", ylabel="expected", xticks=[], yticks=[])
        if named:
            shown = [short(label, 16) for label in labels]
            axes.set_xticks(range(n), shown, rotation=0 if n < 5 else 90, fontsize=9)
            axes.set_yticks(range(n), shown, fontsize=9)

    right, total = sum(matrix[i][i] for i in range(n)), sum(map(sum, matrix))
    alt = f"{right:,} of {total:,} on the diagonal, which is correct. The table of confused labels lists the rest."
    room = _room(labels, 16) - 0.2 if named else 0.1
    below = BOTTOM + (0 if n < 5 else room)
    height = max(HEIGHT, below + min(4.2, 0.3 * n)) if named else 4.2
    return Chart("confusion", "Confusion matrix", alt, draw, 0.4 + room, height, below)


def most_confused(confusion: Confusion, most: int = 12) -> list[tuple[str, str, int]]:
    """(expected, answered, how often), the most frequent first."""
    pairs = zip(confusion.labels, confusion.matrix, strict=True)
    cells = [(a, b, n) for a, row in pairs for b, n in zip(confusion.labels, row, strict=True) if a != b and n]
    return sorted(cells, key=lambda cell: -cell[2])[:most]


def scatter(pairs: Points) -> Chart:
    """Predicted against expected numbers."""

    def draw(axes: Any) -> None:
        ends = [min(map(min, pairs)), max(map(max, pairs))]
        shown = pairs[:: math.ceil(len(pairs) / POINTS)]
        axes.plot(ends, ends, color=INK, linewidth=1, linestyle="--", alpha=0.5)
        axes.plot(*zip(*shown, strict=True), "o", color=BLUE, alpha=0.35, markersize=3, markeredgewidth=0)
        axes.set(xlabel="expected", ylabel="answered")
        axes.grid()

    off = fmean(abs(x - y) for x, y in pairs)
    alt = f"{len(pairs):,} examples; on average {off:.3g} away from the diagonal."
    return Chart("answered-expected", "Predicted against expected", alt, draw)


class Bin(NamedTuple):
    """Answers of similar confidence."""

    confidence: float
    right: float  # share
    n: int


def grouped(pairs: Sequence[tuple[float, bool]]) -> list[Bin]:
    """The bins that hold answers, in order."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for pair, number in zip(pairs, bins_of(np.array([confidence for confidence, _ in pairs])), strict=True):
        groups.setdefault(number, []).append(pair)
    return [Bin(fmean(c for c, _ in g), fmean(r for _, r in g), len(g)) for _, g in sorted(groups.items())]


def calibration_chart(pairs: Sequence[tuple[float, bool]]) -> Chart:
    """The reliability diagram."""
    bins = grouped(pairs)
    confidence, right = np.array(pairs).T
    error = float(calibration_error(confidence, right).of(np.ones(len(pairs))))

    def draw(axes: Any) -> None:
        most, at = max(b.n for b in bins), [b.confidence for b in bins]
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", alpha=0.5)
        axes.bar(at, [0.25 * b.n / most for b in bins], width=0.03, color=INK, alpha=0.2)
        axes.plot(at, [b.right for b in bins], "o-", color=BLUE, markersize=4)
        axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.04))
        axes.grid()

    gap = float(confidence.mean() - right.mean())
    alt = (
        f"confidence {confidence.mean():.3f} on average, {right.mean():.3f} right: "
        f"{'overconfident' if gap > 0 else 'underconfident'} by {abs(gap):.3f}; expected calibration error {error:.3f}. "
        "A perfectly calibrated model is on the dashed line. Grey bars count the predictions."
    )
    return Chart("calibration", "Calibration", alt, draw)


def length_chart(answers: Sequence[Answer], *, is_share: bool) -> Chart:
    """Error by length of text, in groups of equally many examples, with 95 % intervals."""
    ordered = sorted(answers, key=lambda answer: answer.length)
    size = math.ceil(len(ordered) / LENGTHS)
    rows: list[tuple[float, float, float, float]] = []
    for group in (ordered[i : i + size] for i in range(0, len(ordered), size)):
        errors = [answer.error for answer in group]
        ends = wilson(sum(errors), len(errors)) if is_share else around_mean(errors)
        rows.append((fmean(answer.length for answer in group), fmean(errors), *ends))

    def draw(axes: Any) -> None:
        lengths, errors, lows, highs = zip(*rows, strict=True)
        bars = [[abs(e - end) for e, end in zip(errors, ends, strict=True)] for ends in (lows, highs)]
        axes.errorbar(lengths, errors, yerr=bars, color=RED, marker="o", markersize=4, linewidth=1.2, capsize=2)
        axes.set(xlabel="characters", ylabel="share wrong" if is_share else "mean absolute error", ylim=(0, None))
        axes.grid(axis="y")

    alt = f"{rows[0][1]:.3g} for the shortest texts, {rows[-1][1]:.3g} for the longest. Bars are 95 % intervals."
    return Chart("length", "Error by length of text", alt, draw)
