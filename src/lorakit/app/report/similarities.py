"""What an embedding run puts near each other among its validation texts: charts, and rows of tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lorakit.app.report.answers import short
from lorakit.app.report.charts import BLUE, INK, RED, SERIES, Chart
from lorakit.tasks.metrics.bootstrap import Floats
from lorakit.training.run_files import Prediction, RunFiles

BINS = 40
SHOWN = 12  # rows of a table
COLORED = 4  # labels of a map
Row = tuple[str | float, ...]


@dataclass(frozen=True)
class Similarities:
    """The first validation examples, and the vectors of their texts, of length 1. Shapes: vectors (n, texts of an example, d)."""

    predictions: Sequence[Prediction]
    vectors: Floats
    has_scores: bool  # of pairs, for how alike they are

    @classmethod
    def of(cls, run: RunFiles) -> Similarities | None:
        """Those of a run that has vectors of at least two examples."""
        if run.vectors is None or len(run.vectors) < 2 or len(run.vectors) > len(run.predictions):
            return None
        vectors = run.vectors.astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-12)
        return cls(run.predictions[: len(vectors)], vectors, run.scores.metric in ("spearman", "pearson"))

    @property
    def is_pairs(self) -> bool:
        """Whether an example is two texts; else it is one, with its class."""
        return bool(self.vectors.shape[1] == 2)

    @cached_property
    def cosines(self) -> Floats:
        """Between each first text and each second one; of texts with classes between each and each. Shapes: (n, n)."""
        cosines: Floats = self.vectors[:, 0] @ self.vectors[:, -1].T
        return cosines

    @cached_property
    def belong(self) -> Any:
        """Whether two texts are of one pair or one class. Shapes: (n, n)."""
        if not self.is_pairs:
            return _equal([prediction.expected for prediction in self.predictions])
        return _equal([p.text for p in self.predictions]) | _equal([p.pair for p in self.predictions])

    def charts(self) -> Iterator[Chart]:
        """Similarities of pairs that belong together and of others, or against their scores; and a map of all texts."""
        yield self._against_scores() if self.has_scores else self._histogram()
        yield self._map()

    def _histogram(self) -> Chart:
        itself = np.eye(len(self.vectors), dtype=bool)
        own = self.cosines[itself if self.is_pairs else self.belong & ~itself]
        others = self.cosines[~self.belong]

        def draw(axes: Any) -> None:
            ends = min(own.min(initial=1), others.min(initial=1)), max(own.max(initial=-1), others.max(initial=-1))
            for values, color, label in ((others, RED, "all others"), (own, BLUE, "belong together")):
                counts, edges = np.histogram(values, BINS, ends)
                shares = counts / max(1, len(values))
                axes.stairs(shares, edges, fill=True, alpha=0.45, color=color, label=label)
            axes.set(xlabel="cosine", ylabel="share of pairs")
            _legend(axes)
            axes.grid(axis="y")

        alt = "no two texts of which any belong together."
        if len(own) and len(others):
            above = float((others > np.median(own)).mean())
            alt = (
                f"{len(own):,} pairs that belong together have {own.mean():.3f} on average, {len(others):,} others "
                f"{others.mean():.3f}; {above:.1%} of the others are above the median of those that belong together."
            )
        return Chart("similarities", "Similarity of pairs", alt, draw)

    def _against_scores(self) -> Chart:
        scores, own = self._scores, self.cosines.diagonal()

        def draw(axes: Any) -> None:
            axes.plot(
                scores, own, "o", color=BLUE, alpha=0.35 if len(own) > 200 else 0.7, markersize=3.5, markeredgewidth=0
            )
            axes.set(xlabel="score in the data", ylabel="cosine")
            axes.grid()

        low, high = own[scores <= np.median(scores)], own[scores > np.median(scores)]
        alt = f"{len(own):,} pairs; the lower half by score has a cosine of {low.mean():.3f} on average"
        alt += f", the upper half {high.mean():.3f}." if len(high) else "."
        return Chart("similarities", "Similarity against score", alt, draw)

    @property
    def _scores(self) -> Floats:
        return np.array([p.expected if isinstance(p.expected, float) else 0.0 for p in self.predictions])

    def _map(self) -> Chart:
        n, texts, d = self.vectors.shape
        flat = self.vectors.reshape(n * texts, d)
        centered = flat - flat.mean(0)
        _, spread, directions = np.linalg.svd(centered, full_matrices=False)
        places = (centered @ directions[:2].T).reshape(n, texts, -1)  # (n, texts, 2)
        share = float((spread[:2] ** 2).sum() / max((spread**2).sum(), 1e-12))
        labels = [str(prediction.expected) for prediction in self.predictions]
        common = [label for label, _ in Counter(labels).most_common(COLORED)]

        def draw(axes: Any) -> None:
            dots = {"marker": "o", "markersize": 3.5, "markeredgewidth": 0, "linestyle": "", "alpha": 0.7}
            if self.is_pairs:
                axes.plot(*places.transpose(2, 1, 0), color=INK, linewidth=0.5, alpha=0.15)
                for side, (name, color) in enumerate((("first texts", BLUE), ("second texts", RED))):
                    axes.plot(*places[:, side].T, color=color, label=name, **dots)
            else:
                for label in (None, *common):
                    own = [each == label if label is not None else each not in common for each in labels]
                    color = INK if label is None else SERIES[common.index(label)]
                    legend = "others" if label is None else short(label, 24)
                    axes.plot(*places[own, 0].T, color=color, label=legend if any(own) else "_", **dots)
            axes.set(xticks=[], yticks=[])
            _legend(axes)

        lines = "; a line joins the texts of a pair" if self.is_pairs else ""
        alt = f"the two directions in which the vectors differ most, with {share:.0%} of their variance{lines}."
        return Chart("map", "Map of the texts", alt, draw)

    def worst(self) -> tuple[Sequence[str], list[Row]]:
        """Names of columns, and the rows that are furthest from what they should be, the worst first."""
        own, texts = self.cosines.diagonal(), [_cell(p.text) for p in self.predictions]
        seconds, expected = [_cell(p.pair) for p in self.predictions], [str(p.expected) for p in self.predictions]
        if self.has_scores:
            scores = self._scores
            off = np.abs(own.argsort().argsort() - scores.argsort().argsort())
            return ("text", "second text", "score", "cosine"), [
                (texts[i], seconds[i], f"{scores[i]:.3g}", f"{own[i]:.3f}")
                for i in (-off).argsort(kind="stable")[:SHOWN]
            ]
        if not self.is_pairs:
            near = self._nearest()[:, 0]
            wrong = [(i, j) for i, j in enumerate(near) if not self.belong[i, j]]
            wrong.sort(key=lambda pair: -self.cosines[pair])
            return ("text", "label", "nearest text", "its label", "cosine"), [
                (texts[i], expected[i], texts[j], expected[j], f"{self.cosines[i, j]:.3f}") for i, j in wrong[:SHOWN]
            ]
        others = np.where(self.belong, -np.inf, self.cosines)
        nearer, best = (others > own[:, None]).sum(1), others.argmax(1)
        order = [(i, best[i]) for i in np.lexsort((own - others.max(1), -nearer))[:SHOWN]]
        return ("text", "its own text", "cosine", "place", "nearest other text", "cosine of that"), [
            (texts[i], seconds[i], f"{own[i]:.3f}", str(1 + nearer[i]), seconds[j], f"{others[i, j]:.3f}")
            for i, j in order
            if np.isfinite(others[i, j])
        ]

    def neighbours(self) -> list[Row]:
        """The first texts, each with the texts nearest to it among all second ones, or all others."""
        texts = [p.pair if self.is_pairs else p.text for p in self.predictions]
        return [
            (_cell(self.predictions[i].text), *(f"{self.cosines[i, j]:.2f} {_cell(texts[j])}" for j in row[:3]))
            for i, row in enumerate(self._nearest()[:SHOWN])
        ]

    def _nearest(self) -> Any:
        """The places of the other texts, the nearest first. Shapes: (n, n)."""
        itself = np.eye(len(self.vectors)) if not self.is_pairs else 0
        return (-self.cosines + 3 * itself).argsort(1, kind="stable")


def _legend(axes: Any) -> None:
    """A legend above what is drawn."""
    rows = math.ceil(len(axes.get_legend_handles_labels()[1]) / 2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.11 * rows * (high - low))
    axes.legend(fontsize=9, ncols=2, loc="upper left", borderaxespad=0)


def _cell(text: str | None) -> str:
    return short(text or "", 100)


def _equal(names: Sequence[Any]) -> Any:
    """Shapes: (n,), to (n, n)."""
    _, numbers = np.unique([str(name) for name in names], return_inverse=True)
    return numbers[:, None] == numbers
