"""Answers of every task in one form: what was expected, what was given, how wrong and how sure it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from lorakit.app.report.drawing import short
from lorakit.training.run_files import Prediction, RunScores, Span

CUT = 480  # characters of a text that are shown
LEAD = 120  # of them before the first mistake


class Piece(NamedTuple):
    """A part of a text; `label` marks it as an entity, `is_wrong` as one that the other side has not."""

    text: str
    label: str = ""
    is_wrong: bool = False


class Answer(NamedTuple):
    """One validation example and what the run made of it."""

    text: str
    pair: str
    expected: str
    given: str
    error: float  # 0 or 1, or how far a number is off
    surprise: float  # the most confident, or the largest, mistake first
    sureness: Sequence[tuple[float, bool]] = ()  # how sure each thing said was, and whether it was right
    gold: Sequence[Piece] = ()  # the text with entities marked, where there are some
    found: Sequence[Piece] = ()

    @property
    def length(self) -> int:
        """Characters, of both texts."""
        return len(self.text) + len(self.pair)


def answers_of(predictions: Sequence[Prediction]) -> list[Answer]:
    """The answers, in the order of the file."""
    return [_answer(prediction) for prediction in predictions]


def _answer(p: Prediction) -> Answer:
    """Each task has keys of its own."""
    if p.generated is not None:
        return _written(p)
    if p.entities is not None:
        return _entities(p)
    if p.labels is not None:
        return _labels(p)
    if p.value is not None:
        return _number(p)
    right = p.label == p.expected
    score = 1.0 if p.score is None else p.score
    return _plain(p, str(p.expected), p.label or "no label", not right, score, [(score, right)] if p.score else [])


def _plain(
    p: Prediction, expected: str, given: str, error: float, surprise: float, sureness: Sequence[tuple[float, bool]] = ()
) -> Answer:
    return Answer(p.text, p.pair or "", expected, given, float(error), surprise, sureness)


def _written(p: Prediction) -> Answer:
    """A label written freely, or entities; what was expected is a text too, so that it is not marked."""
    given = p.generated or "nothing"
    if p.entities is None:
        right, score = p.label == p.expected, p.score or 0.0
        return _plain(p, str(p.expected), given, not right, score, [(score, right)])
    score = min((e.score for e in p.entities if e.score is not None), default=0.0)
    found = marked(p.text, p.entities, p.entities) if p.entities else ()
    return _plain(p, str(p.expected) or "nothing", given, p.generated != p.expected, score)._replace(found=found)


def _entities(p: Prediction) -> Answer:
    found, gold = p.entities or [], _spans(p.expected)
    wrong = [entity for entity in found if not _has(gold, entity)]
    missed = [entity for entity in gold if not _has(found, entity)]
    sureness = [(entity.score, _has(gold, entity)) for entity in found if entity.score is not None]
    sure = max((entity.score or 0.0 for entity in wrong), default=0.0)
    wanted, named = (", ".join(entity.entity_group for entity in side) or "nothing" for side in (gold, found))
    answer = _plain(p, wanted, named, bool(wrong or missed), sure, sureness)
    start = min((entity.start for entity in (*wrong, *missed)), default=0)
    return answer._replace(gold=marked(p.text, gold, found, start), found=marked(p.text, found, gold, start))


def _spans(expected: object) -> list[Span]:
    return [entity for entity in expected if isinstance(entity, Span)] if isinstance(expected, list) else []


def _has(side: Sequence[Span], entity: Span) -> bool:
    return any(
        (other.entity_group, other.start, other.end) == (entity.entity_group, entity.start, entity.end)
        for other in side
    )


def marked(text: str, entities: Sequence[Span], other: Sequence[Span], around: int = 0) -> list[Piece]:
    """A text in pieces, its entities marked; a long text is cut to the part around a place."""
    first = max(0, around - LEAD) if len(text) > CUT else 0
    last = min(len(text), first + CUT)
    pieces, at = [Piece("… ")] if first else [], first
    for entity in sorted(entities, key=lambda e: (e.start, e.end)):
        if at <= entity.start < entity.end <= last:
            pieces.append(Piece(text[at : entity.start]))
            pieces.append(Piece(text[entity.start : entity.end], entity.entity_group, not _has(other, entity)))
            at = entity.end
    pieces.append(Piece(text[at:last] + (" …" if last < len(text) else "")))
    return [piece for piece in pieces if piece.text]


def _labels(p: Prediction) -> Answer:
    gold = set(p.expected) if isinstance(p.expected, list) else set()
    found = set(p.labels or [])
    shares = p.probabilities or {}
    wrong = [shares.get(str(label), 1.0) for label in found - gold]
    wrong += [1 - shares.get(str(label), 0.0) for label in gold - found]
    sureness = [(max(share, 1 - share), (share >= 0.5) == (label in gold)) for label, share in shares.items()]
    wanted, named = (", ".join(sorted(map(str, side))) or "none" for side in (gold, found))
    return _plain(p, wanted, named, bool(wrong), max(wrong, default=0.0), sureness)


def _number(p: Prediction) -> Answer:
    assert isinstance(p.expected, float) and p.value is not None
    expected, value = p.expected, p.value
    distance = abs(value - expected)
    return _plain(p, f"{expected:.4g}", f"{value:.4g}", distance, distance)


def mistakes(answers: Sequence[Answer], most: int) -> list[Answer]:
    """The worst ones, the most surprising first."""
    wrong = [answer for answer in answers if answer.error > 0]
    return sorted(wrong, key=lambda answer: -answer.surprise)[:most]


class Baseline(NamedTuple):
    """What an answer that never looks at the text would score."""

    what: str
    metric: str
    score: float


def baseline(predictions: Sequence[Prediction], scores: RunScores) -> Baseline | None:
    """The commonest gold label as every answer, or the middle one of gold numbers; None where there is no such answer."""
    gold = [p.expected for p in predictions if p.entities is None and p.labels is None]
    names = [label for label in gold if isinstance(label, str)]
    numbers = [value for value in gold if isinstance(value, float)]
    if numbers and "mae" in scores.values:
        middle = median(numbers)
        return Baseline(f"the median {middle:.4g}", "mae", fmean(abs(value - middle) for value in numbers))
    if not names or len(names) < len(predictions):
        return None
    ((label, count),) = Counter(names).most_common(1)
    share = count / len(names)
    f1 = 2 * share / (1 + share)
    n_labels = max(1, len(scores.by_label))
    positive = scores.positive_label
    known = {
        "accuracy": share,
        "macro_f1": f1 / n_labels,
        "f1": f1 if positive == label else 0.0,
        "mcc": 0.0,
        "quadratic_kappa": 0.0,
    }
    metric = scores.metric if scores.metric in known else "accuracy"
    return Baseline(f"the commonest label {short(label)!r}", metric, known[metric]) if metric in scores.values else None
