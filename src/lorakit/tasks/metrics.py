"""Scores that tasks share. Classification is scikit-learn's; entity F1 equals seqeval's in both of its modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lorakit.data.tags import Entity, entities, strict_entities

Tags = Sequence[str]


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


def entity_scores(gold: Sequence[Tags], predicted: Sequence[Tags]) -> dict[str, Any]:
    """Micro entity precision, recall and F1 as conlleval counts, per type too, and F1 in strict IOB2 beside it."""
    loose = _counts(gold, predicted, entities)
    strict = _counts(gold, predicted, strict_entities)
    total = prf(*(sum(column) for column in zip(*loose.values(), strict=True))) if loose else prf(0, 0, 0)
    strict_total = prf(*(sum(column) for column in zip(*strict.values(), strict=True))) if strict else prf(0, 0, 0)
    return {
        "entity_f1": total["f1"],
        "entity_precision": total["precision"],
        "entity_recall": total["recall"],
        "entity_f1_strict": strict_total["f1"],
        "per_type": {kind: prf(*counts) for kind, counts in sorted(loose.items())},
    }


def prf(right: int, found: int, wanted: int) -> dict[str, float]:
    """Precision, recall and F1 from counts of right, predicted and gold entities; 0 where a denominator is 0."""
    return {
        "precision": right / found if found else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "f1": 2 * right / (found + wanted) if found + wanted else 0.0,
        "support": wanted,
    }


def _counts(
    gold: Sequence[Tags], predicted: Sequence[Tags], read: Callable[[Tags], list[Entity]]
) -> dict[str, tuple[int, int, int]]:
    """type -> numbers of right, predicted and gold entities."""
    right: Counter[str] = Counter()
    found: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        true, guessed = set(read(gold_tags)), set(read(predicted_tags))
        wanted.update(entity.type for entity in true)
        found.update(entity.type for entity in guessed)
        right.update(entity.type for entity in true & guessed)
    return {kind: (right[kind], found[kind], wanted[kind]) for kind in wanted | found}
