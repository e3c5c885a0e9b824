"""Scores of several yes or no an example, and the thresholds that make a yes of a probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorakit.tasks.intervals import Floats, Ranking, Scores, Statistic
from lorakit.tasks.label_scores import Flags, accuracy, label_counts, macro_f1, micro_f1, per_label, values

HALF = 0.5


def multi_label_scores(
    gold: Flags, probabilities: Floats, labels: Sequence[str], thresholds: Mapping[str, float]
) -> Scores:
    """The statistics' values; per label, what is at the thresholds, and the average precision where it has an example.

    Shapes: gold and probabilities (N, C).
    """
    table = per_label(gold, probabilities >= _row(labels, thresholds), labels)
    for label, row, truth, found in zip(labels, table.values(), gold.T, probabilities.T, strict=True):
        row["average_precision"] = (
            float(average_precision(truth, found).of(np.ones(len(gold)))) if truth.any() else None
        )
        row["threshold"] = thresholds.get(label, HALF)
    return {**values(multi_label_statistics(gold, probabilities, labels, thresholds)), "per_label": table}


def multi_label_statistics(
    gold: Flags, probabilities: Floats, labels: Sequence[str], thresholds: Mapping[str, float]
) -> dict[str, Statistic | Ranking]:
    """Macro average precision; F1 and subset accuracy at 0.5 and, where they were tuned, at the thresholds.

    A label without a gold example has no average precision, and the mean is over the others; its F1 is 0 and counts.

    Shapes: gold and probabilities (N, C).
    """
    found: dict[str, Statistic | Ranking] = {"macro_average_precision": macro_average_precision(gold, probabilities)}
    for at, limits in {"at_0.5": {}, **({"tuned": thresholds} if thresholds else {})}.items():
        predicted = probabilities >= _row(labels, limits)
        counts = label_counts(gold, predicted)
        found[f"micro_f1_{at}"] = Statistic(counts, micro_f1)
        found[f"macro_f1_{at}"] = Statistic(counts, macro_f1)
        found[f"subset_accuracy_{at}"] = accuracy((gold == predicted).all(axis=1))
    return found


def macro_average_precision(gold: Flags, probabilities: Floats) -> Ranking:
    """The mean of the labels' average precision over those that have a gold example, NaN where none has."""
    each = [average_precision(truth, found) for truth, found in zip(gold.T, probabilities.T, strict=True)]

    def of(weights: Floats) -> Floats:
        found = np.stack([label.of(weights) for label in each])  # (C, ...)
        n = (~np.isnan(found)).sum(axis=0)
        value: Floats = np.where(n > 0, np.nansum(found, axis=0) / np.maximum(n, 1), np.nan)
        return value

    return Ranking(len(gold), of)


def average_precision(gold: Flags, probabilities: Floats) -> Ranking:
    """The mean over gold examples of the precision among all that are at least as probable; NaN where none is gold.

    It is the area under the steps of precision over recall (Manning et al. 2008, section 8.4). Shapes: (N,).
    """
    order = np.argsort(-probabilities)
    rising, is_gold = -probabilities[order], gold[order]
    last = np.searchsorted(rising, rising[is_gold], "right") - 1  # for each gold one, the last that is as probable
    last_gold = is_gold.cumsum()[last] - 1  # the same among the gold ones

    def of(weights: Floats) -> Floats:
        drawn = weights[..., order]
        right = drawn[..., is_gold]
        precision = right.cumsum(axis=-1)[..., last_gold] / np.maximum(drawn.cumsum(axis=-1)[..., last], 1)
        with np.errstate(invalid="ignore"):
            value: Floats = (right * precision).sum(axis=-1) / right.sum(axis=-1)
        return value

    return Ranking(len(gold), of)


def _row(labels: Sequence[str], thresholds: Mapping[str, float]) -> Floats:
    return np.array([thresholds.get(label, HALF) for label in labels])


def best_threshold(gold: Flags, probabilities: Floats) -> float:
    """The threshold of the highest F1; of several the nearest to 0.5, and 0.5 itself where nothing is better.

    Each lies halfway between two probabilities that differ, so that it decides other examples as it decides these.

    Shapes: (N,).
    """
    order = np.argsort(-probabilities)
    falling = probabilities[order]
    cuts = np.append((falling[:-1] + falling[1:]) / 2, falling[-1] / 2)  # the i-th lets i + 1 examples through
    usable = np.append(falling[:-1] > falling[1:], True)
    f1 = 2 * gold[order].cumsum() / (np.arange(len(gold)) + 1 + gold.sum())
    half = 2 * (gold & (probabilities >= HALF)).sum() / max(1, (probabilities >= HALF).sum() + gold.sum())
    best = f1[usable].max()
    if best <= half:
        return HALF
    candidates = cuts[usable & (f1 == best)]
    return float(candidates[np.abs(candidates - HALF).argmin()])
