"""Scores of entities, equal to seqeval's in both of its modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorakit.data.tags import Entity, entities, strict_entities
from lorakit.tasks.entity_errors import error_counts, semeval_scores
from lorakit.tasks.intervals import Statistic
from lorakit.tasks.label_scores import micro_f1, prf

Tags = Sequence[str]
READINGS = {"": entities, "_strict": strict_entities}  # by the ends of the scores' names: conlleval's, and strict IOB2


def entity_scores(gold: Sequence[Tags], predicted: Sequence[Tags]) -> dict[str, Any]:
    """Micro entity precision, recall and F1, per type too, as conlleval counts and (`_strict`) in strict IOB2.

    `errors` and `semeval` tell the kinds of mistakes apart, on the entities that conlleval reads.
    """
    scores: dict[str, Any] = {}
    for reading, read in READINGS.items():
        counts = _counts(gold, predicted, read)
        total = prf(*(sum(column) for column in zip((0, 0, 0), *counts.values(), strict=True)))
        scores |= {f"entity_{part}{reading}": total[part] for part in ("f1", "precision", "recall")}
        scores[f"per_type{reading}"] = {kind: prf(*row) for kind, row in sorted(counts.items())}
    both = [[entities(tags) for tags in sentences] for sentences in (gold, predicted)]
    return {**scores, "errors": error_counts(*both), "semeval": semeval_scores(*both)}


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
    for reading, read in READINGS.items():
        pairs = [(set(read(g)), set(read(p))) for g, p in zip(gold, predicted, strict=True)]
        counts = [(len(g & p), len(p), len(g)) for g, p in pairs]
        found[f"entity_f1{reading}"] = Statistic(np.array(counts, dtype=np.float64), micro_f1)
    return found
