"""Answers of every task in one form: what was expected, what was answered, how wrong and how sure it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from string import ascii_uppercase
from typing import NamedTuple

from lorakit.data.tags import Entity
from lorakit.tasks.metrics.entities import SCHEMAS, error_kind, match
from lorakit.training.run_files import Prediction, RunScores, Span

CUT = 480  # the most characters of a text to show
LEAD = 120  # of them before the first mistake
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Segment(NamedTuple):
    """A segment of a text; `label` marks it as an entity, `fault` says what is wrong with it."""

    text: str
    label: str = ""
    fault: str = ""


class Answer(NamedTuple):
    """One validation example and the run's answer."""

    text: str
    pair: str
    expected: str
    answer: str
    error: float  # 0 or 1, or the absolute error of a number
    surprise: float  # the most confident, or the largest, mistake first
    sureness: Sequence[tuple[float, bool]] = ()  # the confidence of each label or entity, and whether it was right
    gold: Sequence[Segment] = ()  # the text with entities marked, where there are some
    predicted: Sequence[Segment] = ()
    written: str = ""  # by a T5, of which its entities were read

    @property
    def length(self) -> int:
        """Characters, of both texts."""
        return len(self.text) + len(self.pair)


def answer_of(p: Prediction) -> Answer:
    """The answer in a line of predictions.jsonl, of any task."""
    if p.entities is not None:
        return _entities(p, p.entities)
    expected, answer, sureness = str(p.expected), p.label or p.generated or "no label", list[tuple[float, bool]]()
    if p.labels is not None:
        gold, predicted, shares = (
            set(p.expected if isinstance(p.expected, list) else []),
            set(p.labels),
            p.probabilities or {},
        )
        wrong = [shares.get(str(label), 1.0) for label in predicted - gold]
        wrong += [1 - shares.get(str(label), 0.0) for label in gold - predicted]
        error, surprise = float(bool(wrong)), max(wrong, default=0.0)
        expected, answer = (", ".join(sorted(map(str, side))) or "none" for side in (gold, predicted))
        sureness = [(max(share, 1 - share), (share >= 0.5) == (label in gold)) for label, share in shares.items()]
    elif p.value is not None and isinstance(p.expected, float):
        expected, answer = f"{p.expected:.4g}", f"{p.value:.4g}"
        error = surprise = abs(p.value - p.expected)
    else:
        error, surprise = float((p.label or p.generated) != p.expected), 1.0 if p.score is None else p.score
        sureness = [(p.score, not error)] if p.score is not None else []
    if p.choices:
        expected, answer = (f"{name}: {p.choices[ascii_uppercase.index(name)]}" for name in (expected, answer))
    return Answer(p.text, p.pair or "", expected, answer, error, surprise, sureness)


def _entities(p: Prediction, predicted: Sequence[Span]) -> Answer:
    """Entities as tags or as written by a T5. Older runs have only the expected text of a T5: then none is marked as wrong."""
    gold = p.expected_entities if p.expected_entities is not None else p.expected
    if not isinstance(gold, list):
        error = float(p.generated != p.expected)
        segments = marked(p.text, predicted, {})
        return Answer(p.text, "", str(gold) or "nothing", p.generated or "nothing", error, 0.0, predicted=segments)
    gold = [span for span in gold if isinstance(span, Span)]
    of_gold, of_predicted = {_entity(span): "" for span in gold}, {_entity(span): "" for span in predicted}
    matched = match(list(of_gold), list(of_predicted), SCHEMAS["strict"])
    for guess, entity in matched.pairs:
        if (kind := error_kind(guess, entity)) != "correct":
            of_predicted[guess] = of_gold[entity] = outcome(kind)
    of_gold |= dict.fromkeys(matched.missed, outcome("missed"))
    of_predicted |= dict.fromkeys(matched.spurious, outcome("spurious"))
    wrong = [(span, fault) for span in predicted if (fault := of_predicted[_entity(span)])]
    sureness = [(span.score, not of_predicted[_entity(span)]) for span in predicted if span.score is not None]
    start = min(
        (entity.start for side in (of_gold, of_predicted) for entity, fault in side.items() if fault), default=0
    )
    expected, answer = (", ".join(span.entity_group for span in side) or "nothing" for side in (gold, predicted))
    return Answer(
        p.text,
        "",
        expected,
        answer,
        float(any(of_gold.values()) or any(of_predicted.values())),
        max((span.score or 0.0 for span, _ in wrong), default=0.0),
        sureness if p.generated is None else (),  # a T5 has a single number for the whole output
        marked(p.text, gold, of_gold, start),
        marked(p.text, predicted, of_predicted, start),
        p.generated or "",
    )


def outcome(kind: str) -> str:
    """A kind of `errors` in scores.json, in the words of a page."""
    words = {"correct": "right", "missed": "missed", "spurious": "not there"}
    return words.get(kind) or f"other {kind}".replace("_", " ")


def _entity(span: Span) -> Entity:
    return Entity(span.entity_group, span.start, span.end)


def marked(text: str, spans: Sequence[Span], faults: Mapping[Entity, str], around: int = 0) -> list[Segment]:
    """A text in segments, its entities marked; a long text is cut around a position."""
    first = max(0, around - LEAD) if len(text) > CUT else 0
    last = min(len(text), first + CUT)
    segments, at = [Segment("… ")] if first else [], first
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        if at <= span.start < span.end <= last:
            segments.append(Segment(text[at : span.start]))
            segments.append(Segment(text[span.start : span.end], span.entity_group, faults.get(_entity(span), "")))
            at = span.end
    segments.append(Segment(text[at:last] + (" …" if last < len(text) else "")))
    return [segment for segment in segments if segment.text]


class Baseline(NamedTuple):
    """The score of a constant answer."""

    what: str
    metric: str
    score: float


def baseline(predictions: Sequence[Prediction], scores: RunScores) -> Baseline | None:
    """The most common gold label, or the median of gold numbers, as every answer; None if there is none."""
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
    known = {
        "accuracy": share,
        "macro_f1": f1 / max(1, len(scores.by_label)),
        "f1": f1 if scores.positive_label == label else 0.0,
        "mcc": 0.0,
        "quadratic_kappa": 0.0,
    }
    metric = scores.metric if scores.metric in known else "accuracy"
    return (
        Baseline(f"the most frequent label {short(label)!r}", metric, known[metric])
        if metric in scores.values
        else None
    )


def printable(text: str) -> str:
    """A text without the characters that no XML or HTML may hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def short(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(printable(text[: most + 1]).split())
    return line if len(text) <= most else f"{line[: most - 1]}…"
