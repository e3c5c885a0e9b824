"""Scores of labels, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.tasks.base import Statistic


def classification_scores(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro F1, scores per class, and the confusion matrix (rows gold, columns predicted)."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # late: half a second

    precision, recall, f1, support = precision_recall_fscore_support(
        gold, predicted, labels=list(labels), zero_division=0.0
    )
    per_class = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
    }
    return {
        "accuracy": sum(g == p for g, p in zip(gold, predicted, strict=True)) / len(gold),
        "macro_f1": float(f1.mean()),
        "per_class": per_class,
        "confusion": {
            "labels": list(labels),
            "matrix": confusion_matrix(gold, predicted, labels=list(labels)).tolist(),
        },
    }


def accuracy(right: Sequence[bool]) -> Statistic:
    """The share of right answers."""
    counts = np.array([(r, 1) for r in right], dtype=np.float64)
    return Statistic(counts, lambda sums: sums[..., 0] / sums[..., 1])
