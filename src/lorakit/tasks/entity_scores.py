"""Scores of entities, equal to seqeval's in both of its modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorakit.data.tags import Entity, entities, strict_entities
from lorakit.tasks.base import Floats, Statistic
from lorakit.tasks.entity_errors import error_counts, semeval_scores

Tags = Sequence[str]
READERS = {"entity_f1": entities, "entity_f1_strict": strict_entities}  # conlleval's reading, and strict IOB2


def entity_scores(gold: Sequence[Tags], predicted: Sequence[Tags]) -> dict[str, Any]:
    """Micro entity precision, recall and F1, per type too, as conlleval counts and (`_strict`) in strict IOB2.

    `errors` and `semeval` tell the kinds of mistakes apart, on the entities that conlleval reads.
    """
    scores: dict[str, Any] = {}
    for reading, read in (("", entities), ("_strict", strict_entities)):
        counts = _counts(gold, predicted, read)
        total = prf(*(sum(column) for column in zip((0, 0, 0), *counts.values(), strict=True)))
        scores |= {f"entity_{part}{reading}": total[part] for part in ("f1", "precision", "recall")}
        scores[f"per_type{reading}"] = {kind: prf(*row) for kind, row in sorted(counts.items())}
    both = [[entities(tags) for tags in sentences] for sentences in (gold, predicted)]
    return {**scores, "errors": error_counts(*both), "semeval": semeval_scores(*both)}


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


def entity_statistics(gold: Sequence[Tags], predicted: Sequence[Tags]) -> dict[str, Statistic]:
    """Micro F1 as conlleval counts, and in strict IOB2, from each sentence's right, predicted and gold entities."""
    found = {}
    for name, read in READERS.items():
        pairs = [(set(read(g)), set(read(p))) for g, p in zip(gold, predicted, strict=True)]
        counts = [(len(g & p), len(p), len(g)) for g, p in pairs]
        found[name] = Statistic(np.array(counts, dtype=np.float64), _f1)
    return found


def _f1(sums: Floats) -> Floats:
    right, found, wanted = np.moveaxis(sums, -1, 0)
    value: Floats = 2 * right / np.maximum(found + wanted, 1)
    return value
