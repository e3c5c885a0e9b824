"""Which charts a run has: how it was trained, and where its answers are wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from lorakit.app.report.answers import Answer
from lorakit.app.report.drawing import (
    AMBER,
    BLUE,
    BOTTOM,
    GREEN,
    HEIGHT,
    INK,
    LETTER,
    QUIET,
    RED,
    SERIES,
    Cell,
    Chart,
    short,
)
from lorakit.tasks.metrics.calibration import bins_of, calibration_error
from lorakit.training.run_files import Confusion, LabelScores, Line, RunFiles

LENGTHS = 8  # groups of examples of similar length
POINTS = 2000  # in a scatter plot
NAMED, NUMBERED = 24, 12  # classes of a confusion matrix that still get their names, and their numbers
Z = 1.96  # standard errors on each side of a 95 % interval

Points = Sequence[tuple[float, float]]


def training_charts(run: RunFiles) -> list[Chart]:
    """Loss, validation score, learning rate and norm of the gradient over steps."""
    losses, metric = points_of(run.lines, "loss"), run.scores.metric
    scored = scores_over_steps(run.lines, metric)
    found = []
    if losses:
        smooth = smoothed(losses)
        alt = (
            f"from {losses[0][1]:.3g} at step {losses[0][0]} to {smooth[-1][1]:.3g} (smoothed) at step {losses[-1][0]}."
        )
        series = {"each logged step": losses, "smoothed": smooth}
        found.append(curves("loss", "Training loss", alt, series, faint="each logged step"))
    if len(scored) > 1:
        best = max((line.step for line in run.lines if line.is_best), default=scored[-1][0])
        alt = f"{len(scored)} evaluations, from {scored[0][1]:.4f} to {scored[-1][1]:.4f}; the best at step {best}."
        found.append(curves("validation", f"Validation {metric}", alt, {metric: scored}, mark=best))
    for key, name in (("lr", "Learning rate"), ("grad_norm", "Norm of the gradient")):
        if points := points_of(run.lines, key):
            top = max(y for _, y in points)
            alt = f"at most {top:.3g}, {points[-1][1]:.3g} at the last logged step."
            found.append(curves(key, name, alt, {name: points}))
    return found


def scores_over_steps(lines: Sequence[Line], metric: str) -> Points:
    """A validation score at each evaluation that has it."""
    return [(line.step, line.validation[metric]) for line in lines if line.validation and metric in line.validation]


def points_of(lines: Sequence[Line], key: str) -> Points:
    """A number of the logged steps."""
    return [(line.step, getattr(line, key)) for line in lines if getattr(line, key) is not None]


def smoothed(points: Points, weight: float = 0.9) -> Points:
    """An exponential mean of the points, corrected for its start."""
    mean, total, smooth = 0.0, 0.0, []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        smooth.append((x, mean / total))
    return smooth


def curves(
    name: str, title: str, alt: str, series: Mapping[str, Points], *, faint: str = "", mark: float | None = None
) -> Chart:
    """Lines over steps; `faint` is drawn in the background, `mark` circles the point at a step."""

    def draw(axes: Any) -> None:
        several = len(series) > 1
        for i, (label, points) in enumerate(series.items()):
            color = SERIES[i % len(SERIES)] if not faint else BLUE
            style = {"alpha": 0.35, "linewidth": 1.0} if label == faint else {"linewidth": 1.6}
            dots = "o" if len(points) < 30 and label != faint else None
            axes.plot(
                *zip(*points, strict=True), color=color, marker=dots, markersize=3.5, label=short(label, 28), **style
            )
            for x, y in points:
                if x == mark:
                    axes.plot([x], [y], "o", markersize=10, markerfacecolor="none", markeredgecolor=INK)
        axes.set(xlabel="step")
        axes.grid(axis="y")
        if several:
            axes.legend(fontsize=9)

    rows = [(label, x, y) for label, points in series.items() for x, y in points]
    return Chart(name, title, alt, ("series", "step", "value"), rows, draw)


def answer_charts(run: RunFiles, answers: Sequence[Answer]) -> Iterator[Chart]:
    """Those that the run's task has."""
    if run.scores.confusion is not None:
        yield confusion_chart(run.scores.confusion)
    if run.scores.errors:
        yield errors_chart(run.scores.errors)
    if len(run.scores.by_label) > 2:
        yield by_label_chart(run.scores.by_label)
    if numbers := [
        (p.expected, p.value) for p in run.predictions if p.value is not None and isinstance(p.expected, float)
    ]:
        yield scatter([(x, y) for x, y in numbers if y is not None])
    if any(answer.sureness for answer in answers):
        yield calibration_chart([pair for answer in answers for pair in answer.sureness])
    if len(answers) > 1:
        yield length_chart(answers, is_share=not numbers)


# Classes


def confusion_chart(confusion: Confusion) -> Chart:
    """Each cell's colour is its share of the row, so that rare labels are as easy to read as common ones."""
    labels, matrix = confusion.labels, confusion.matrix
    n, named = len(labels), len(labels) <= NAMED

    def draw(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    color = GREEN if i == j else RED
                    share = 0.08 + 0.52 * count / sum(row)
                    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=color, alpha=share, linewidth=0))
                if n <= NUMBERED:
                    axes.text(j, i, f"{count:,}", ha="center", va="center", fontsize=10 if n < 8 else 7)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), xlabel="answered", ylabel="expected")
        if named:
            shown = [short(label, 16) for label in labels]
            axes.set_xticks(range(n), shown, rotation=0 if n < 5 else 90, fontsize=9)
            axes.set_yticks(range(n), shown, fontsize=9)
        else:
            axes.set(xticks=[], yticks=[])

    right = sum(matrix[i][i] for i in range(n))
    total = sum(map(sum, matrix))
    alt = f"{right:,} of {total:,} on the diagonal, which is right. The table of most confused labels has the rest."
    cells = [(labels[i], labels[j], matrix[i][j]) for i in range(n) for j in range(n) if named or matrix[i][j]]
    room = LETTER * max(len(short(label, 16)) for label in labels) if named else 0.1
    below = BOTTOM + (0 if n < 5 else room)
    height = max(HEIGHT, below + min(4.2, 0.3 * n)) if named else 4.2
    return Chart(
        "confusion", "Confusion matrix", alt, ("expected", "answered", "count"), cells, draw, 0.4 + room, height, below
    )


def most_confused(confusion: Confusion, most: int = 12) -> list[tuple[str, str, int]]:
    """(expected, answered, how often), the most frequent first."""
    labels = confusion.labels
    cells = [
        (labels[i], labels[j], count)
        for i, row in enumerate(confusion.matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(cells, key=lambda cell: -cell[2])[:most]


def errors_chart(errors: Mapping[str, int]) -> Chart:
    """What became of the entities."""
    names = [name.replace("_", " ") for name in errors]
    counts = list(errors.values())

    def draw(axes: Any) -> None:
        axes.barh(range(len(names)), counts, color=[GREEN if name == "correct" else RED for name in names], alpha=0.75)
        for i, count in enumerate(counts):
            axes.text(count, i, f" {count:,}", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 1.15 * max(1, *counts)), xlabel="entities")

    alt = ", ".join(f"{count:,} {name}" for name, count in zip(names, counts, strict=True)) + "."
    rows = list(zip(names, counts, strict=True))
    return Chart("entity-errors", "What became of the entities", alt, ("kind", "entities"), rows, draw, left=1.6)


def by_label_chart(rows: Mapping[str, LabelScores], most: int = 30) -> Chart:
    """F1 of each label, the lowest first where they are too many."""
    chosen = sorted(rows, key=lambda name: rows[name].get("f1", 0.0))[:most]

    def draw(axes: Any) -> None:
        for kind, color, marker in (("precision", AMBER, "<"), ("recall", BLUE, ">")):
            axes.plot(
                [rows[n].get(kind, 0.0) for n in chosen], range(len(chosen)), marker, color=color, label=kind, ms=5
            )
        axes.barh(range(len(chosen)), [rows[n].get("f1", 0.0) for n in chosen], color=QUIET, alpha=0.3, label="F1")
        axes.set_yticks(range(len(chosen)), [short(name, 22) for name in chosen], fontsize=9)
        axes.set(xlim=(0, 1.02), ylim=(len(chosen) - 0.5, -0.5))
        axes.figure.legend(fontsize=9, ncols=3, loc="lower center")
        axes.grid(axis="x")

    height = max(1.6, 0.9 + 0.2 * len(chosen))
    low, high = chosen[0], max(chosen, key=lambda name: rows[name].get("f1", 0.0))
    alt = f"F1 from {rows[low].get('f1', 0.0):.3f} ({short(low)}) to {rows[high].get('f1', 0.0):.3f} ({short(high)})."
    title = "By label" if len(chosen) == len(rows) else f"The {most} labels with the lowest F1"
    left = 0.2 + LETTER * max(len(short(name, 22)) for name in chosen)
    table = [(name, *(row.get(key) for key in ("precision", "recall", "f1", "support"))) for name, row in rows.items()]
    columns = ("label", "precision", "recall", "f1", "support")
    return Chart("by-label", title, alt, columns, table, draw, left, height, 0.62)


# Numbers


def scatter(pairs: Points) -> Chart:
    """Answered against expected numbers."""
    shown = pairs[:: math.ceil(len(pairs) / POINTS)]
    ends = [min(map(min, pairs)), max(map(max, pairs))]

    def draw(axes: Any) -> None:
        axes.plot(ends, ends, color=QUIET, linewidth=1, linestyle="--")
        axes.plot(*zip(*shown, strict=True), "o", color=BLUE, alpha=0.35, markersize=3, markeredgewidth=0)
        axes.set(xlabel="expected", ylabel="answered")
        axes.grid()

    off = fmean(abs(x - y) for x, y in pairs)
    alt = f"{len(pairs):,} examples around the diagonal, {off:.3g} away from it on average."
    return Chart("answered-expected", "Answered against expected", alt, ("expected", "answered"), pairs, draw)


# Calibration


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
    most = max(b.n for b in bins)

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
        axes.bar([b.confidence for b in bins], [0.25 * b.n / most for b in bins], width=0.03, color=QUIET, alpha=0.3)
        axes.plot([b.confidence for b in bins], [b.right for b in bins], "o-", color=BLUE, markersize=4)
        axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.04))
        axes.grid()

    gap = fmean(c for c, _ in pairs) - fmean(r for _, r in pairs)
    way = "too sure" if gap > 0 else "not sure enough"
    alt = (
        f"confidence {fmean(c for c, _ in pairs):.3f} on average, {fmean(r for _, r in pairs):.3f} right: {way} by "
        f"{abs(gap):.3f}; expected calibration error {error:.3f}. On the dashed line confidence is what it says; "
        "grey bars are numbers of answers."
    )
    return Chart("calibration", "Calibration", alt, ("confidence", "share right", "answers"), bins, draw)


# Length


def length_chart(answers: Sequence[Answer], *, is_share: bool) -> Chart:
    """Error by length of text, in groups of equally many examples; Wilson's interval of a share (Wilson 1927)."""
    ordered = sorted(answers, key=lambda answer: answer.length)
    size = math.ceil(len(ordered) / LENGTHS)
    rows: list[Sequence[Cell]] = []
    for group in (ordered[i : i + size] for i in range(0, len(ordered), size)):
        errors = [answer.error for answer in group]
        low, high = wilson(sum(errors), len(errors)) if is_share else around_mean(errors)
        rows.append((fmean(answer.length for answer in group), fmean(errors), low, high, len(group)))
    return Chart(
        "length",
        "Length against error",
        f"of the shortest texts {rows[0][1]:.3g}, of the longest {rows[-1][1]:.3g}; bars are 95 % intervals.",
        ("mean length in characters", "error", "low", "high", "examples"),
        rows,
        partial(_draw_lengths, rows, "share wrong" if is_share else "mean absolute error"),
    )


def _draw_lengths(rows: Sequence[Sequence[Any]], name: str, axes: Any) -> None:
    lengths, errors, lows, highs, _ = zip(*rows, strict=True)
    down, up = ([abs(e - end) for e, end in zip(errors, ends, strict=True)] for ends in (lows, highs))
    axes.errorbar(lengths, errors, yerr=[down, up], color=RED, marker="o", markersize=4, linewidth=1.2, capsize=2)
    axes.set(xlabel="characters", ylabel=name, ylim=(0, None))
    axes.grid(axis="y")


def wilson(wrong: float, n: int) -> tuple[float, float]:
    """A 95 % interval of a share."""
    share, square = wrong / n, Z * Z / n
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def around_mean(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of a mean."""
    half = Z * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return fmean(values) - half, fmean(values) + half
