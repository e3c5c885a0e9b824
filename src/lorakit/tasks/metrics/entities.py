"""Scores of entities, equal to seqeval's in both of its modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorakit.data.tags import Entity, entities, strict_entities
from lorakit.tasks.metrics.bootstrap import Statistic
from lorakit.tasks.metrics.labels import micro_f1, prf

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
    n_predicted: Counter[str] = Counter()
    n_gold: Counter[str] = Counter()
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        true, guessed = set(read(gold_tags)), set(read(predicted_tags))
        n_gold.update(entity.type for entity in true)
        n_predicted.update(entity.type for entity in guessed)
        right.update(entity.type for entity in true & guessed)
    return {kind: (right[kind], n_predicted[kind], n_gold[kind]) for kind in n_gold | n_predicted}


def entity_statistics(gold: Sequence[Tags], predicted: Sequence[Tags]) -> dict[str, Statistic]:
    """Micro F1 as conlleval counts, and in strict IOB2, from each sentence's right, predicted and gold entities."""
    statistics = {}
    for reading, read in READINGS.items():
        pairs = [(set(read(g)), set(read(p))) for g, p in zip(gold, predicted, strict=True)]
        counts = [(len(g & p), len(p), len(g)) for g, p in pairs]
        statistics[f"entity_f1{reading}"] = Statistic(np.array(counts, dtype=np.float64), micro_f1)
    return statistics


# What kinds of mistakes were made on entities: the schemas of SemEval-2013 task 9.1, and boundary against type errors.


Judge = Callable[[Entity, Entity], bool]


def _same_place(guess: Entity, entity: Entity) -> bool:
    return guess[1:] == entity[1:]


# When a guess that touches a gold entity is correct (Segura-Bedmar et al. 2013). `strict` on the entities that conlleval
# reads has the F1 that conlleval gives; `partial` is `exact` with half a point where only a part was found.
SCHEMAS: Mapping[str, Judge] = {
    "strict": lambda guess, entity: guess == entity,
    "exact": _same_place,
    "partial": _same_place,
    "type": lambda guess, entity: guess.type == entity.type,
}


class Match(NamedTuple):
    """One sentence's guesses beside its gold entities."""

    pairs: list[tuple[Entity, Entity]]  # guess, gold
    missed: list[Entity]
    spurious: list[Entity]


def match(gold: Sequence[Entity], guesses: Sequence[Entity], is_correct: Judge) -> Match:
    """Give each guess, from left to right, a gold entity that it touches and that no guess before it took.

    A correct one goes before others, and the nearest correct one before those further away; this is nervaluate's order.
    """
    left, pairs, spurious = list(gold), [], []
    for guess in guesses:
        touched = [entity for entity in left if entity.start < guess.end and guess.start < entity.end]
        correct = [entity for entity in touched if is_correct(guess, entity)]
        if touched:
            entity = min(correct, key=lambda e: abs(e.start - guess.start) + abs(e.end - guess.end), default=touched[0])
            left.remove(entity)
            pairs.append((guess, entity))
        else:
            spurious.append(guess)
    return Match(pairs, left, spurious)


def semeval_scores(gold: Sequence[Sequence[Entity]], guesses: Sequence[Sequence[Entity]]) -> dict[str, dict[str, Any]]:
    """For each schema the numbers of correct, incorrect, partial, missed and spurious entities, precision, recall, F1."""
    scores = {}
    for name, is_correct in SCHEMAS.items():
        counts: Counter[str] = Counter()
        for pairs, missed, spurious in (match(*row, is_correct) for row in zip(gold, guesses, strict=True)):
            right = sum(is_correct(*pair) for pair in pairs)
            wrong = "partial" if name == "partial" else "incorrect"
            counts.update({"correct": right, wrong: len(pairs) - right})
            counts.update(missed=len(missed), spurious=len(spurious))
        points = counts["correct"] + 0.5 * counts["partial"]
        paired = counts["correct"] + counts["incorrect"] + counts["partial"]
        shares = prf(points, paired + counts["spurious"], paired + counts["missed"])
        scores[name] = {
            **{key: counts[key] for key in ("correct", "incorrect", "partial", "missed", "spurious")},
            **{key: shares[key] for key in ("precision", "recall", "f1")},
        }
    return scores


def error_counts(gold: Sequence[Sequence[Entity]], guesses: Sequence[Sequence[Entity]]) -> dict[str, int]:
    """How many entities were right, had the wrong type, the wrong boundary or both, were missed, or were made up."""
    counts = Counter({"correct": 0, "type": 0, "boundary": 0, "type_and_boundary": 0, "missed": 0, "spurious": 0})
    for pairs, missed, spurious in (match(*row, SCHEMAS["strict"]) for row in zip(gold, guesses, strict=True)):
        counts.update(error_kind(*pair) for pair in pairs)
        counts.update(missed=len(missed), spurious=len(spurious))
    return dict(counts)


def error_kind(guess: Entity, entity: Entity) -> str:
    """What is wrong with a guess that touches a gold entity: its type, its boundary, both; or "correct"."""
    if _same_place(guess, entity):
        return "correct" if guess == entity else "type"
    return "boundary" if guess.type == entity.type else "type_and_boundary"
