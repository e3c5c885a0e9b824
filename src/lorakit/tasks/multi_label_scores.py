"""Scores of several yes or no an example, and the thresholds that make a yes of a probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lorakit.tasks.base import Floats, Scores, Statistic
from lorakit.tasks.label_scores import Flags, accuracy, label_counts, macro_f1, micro_f1, per_label, values

HALF = 0.5


def multi_label_scores(
    gold: Flags, probabilities: Floats, labels: Sequence[str], thresholds: Mapping[str, float]
) -> Scores:
    """Macro average precision; F1 and subset accuracy at 0.5 and, where they were tuned, at the thresholds; per label.

    A label without a gold example has no average precision, and the mean is over the others; its F1 is 0 and counts.

    Shapes: gold and probabilities (N, C).
    """
    from sklearn.metrics import average_precision_score  # late: half a second

    table = per_label(gold, probabilities >= _row(labels, thresholds), labels)
    for label, row, truth, found in zip(labels, table.values(), gold.T, probabilities.T, strict=True):
        row["average_precision"] = float(average_precision_score(truth, found)) if truth.any() else None
        row["threshold"] = thresholds.get(label, HALF)
    precisions = [row["average_precision"] for row in table.values() if row["support"]]
    return {
        "macro_average_precision": sum(precisions) / len(precisions) if precisions else 0.0,
        **values(multi_label_statistics(gold, probabilities, labels, thresholds)),
        "per_label": table,
    }


def multi_label_statistics(
    gold: Flags, probabilities: Floats, labels: Sequence[str], thresholds: Mapping[str, float]
) -> dict[str, Statistic]:
    """F1 and subset accuracy at 0.5, and at the tuned thresholds; average precision is no function of sums."""
    found: dict[str, Statistic] = {}
    for at, limits in {"at_0.5": {}, **({"tuned": thresholds} if thresholds else {})}.items():
        predicted = probabilities >= _row(labels, limits)
        counts = label_counts(gold, predicted)
        found[f"micro_f1_{at}"] = Statistic(counts, micro_f1)
        found[f"macro_f1_{at}"] = Statistic(counts, macro_f1)
        found[f"subset_accuracy_{at}"] = accuracy((gold == predicted).all(axis=1))
    return found


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
