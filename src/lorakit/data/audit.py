"""What can be said of labelled examples before anything is trained: counts, lengths, and what is likely to be wrong."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorakit.data.example import Example
from lorakit.data.spans import WRONG, inside_word
from lorakit.data.tags import entities

SHOWN = 5  # places of a finding
RARE = 5  # examples of a label in the training part, below which little can be learned of it
LONG = 512  # words; hardly a model reads more tokens at once
Parts = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Finding:
    """Something to know of the data: how often, in words, and where the first of them are."""

    name: str
    count: int
    text: str
    places: list[str]
    is_problem: bool


def labels_of(example: Example) -> list[str]:
    """The labels that a record has: one, the most probable one of a soft label, several, or its entities' types."""
    label = example.label
    if isinstance(label, str):
        return [label]
    if isinstance(label, Mapping):
        return [max(label, key=lambda name: label[name])]
    return list(label) if isinstance(label, tuple) else [entity.type for entity in entities(example.tags)]


def label_counts(examples: Iterable[Example]) -> dict[str, int]:
    """How often each label stands, the most frequent first."""
    return dict(Counter(label for example in examples for label in labels_of(example)).most_common())


def numbers(examples: Iterable[Example]) -> list[float]:
    """The labels that are numbers."""
    return [float(e.label) for e in examples if isinstance(e.label, (int, float))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Quantiles of some numbers."""
    at = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: float(np.quantile(values, share)) for name, share in at.items()}


def words(example: Example) -> int:
    """The number of words of a record, both texts of a pair together, of choices the longest."""
    return len(example.words) or len(
        f"{example.text} {example.pair or ''} {max(example.choices, key=len, default='')}".split()
    )


# Findings in all parts together


def audit(parts: Parts) -> list[Finding]:
    """Everything found, problems first."""
    examples = [example for part in parts.values() for example in part]
    findings = [
        *duplicates(parts),
        *conflicts(examples),
        *overlaps(parts),
        *missing_labels(parts),
        *odd_texts(examples),
    ]
    findings += [*alike_labels(examples), *cut_words(examples)]
    return sorted(findings, key=lambda finding: not finding.is_problem)


def duplicates(parts: Parts) -> list[Finding]:
    """Texts that stand more than once in a part."""
    findings = []
    for name, part in parts.items():
        groups = [group for group in _groups(part, same_text) if len(group) > 1]
        more = sum(len(group) - 1 for group in groups)
        text = f"{name}: repeated texts: {_share(more, part)}"
        findings.append(Finding(f"duplicates in {name}", more, text, [_together(group) for group in groups], False))
    return _some(findings)


def conflicts(examples: Sequence[Example]) -> list[Finding]:
    """The same text with different labels; of numbers only said, since two people may well differ by a little."""
    groups = [group for group in _groups(examples, same_text) if len({_answer(example) for example in group}) > 1]
    pairs = [(group[0], next(e for e in group if _answer(e) != _answer(group[0]))) for group in groups]
    text = f"texts with different labels: {len(groups):,}"
    places = [f"{_together(pair)}: {_disagreement(*pair)}" for pair in pairs]
    return _some([Finding("conflicts", len(groups), text, places, not numbers(examples[:1]))])


def overlaps(parts: Parts) -> list[Finding]:
    """Texts of another part that are also in train, as they are or but for case and white space."""
    exact = {same_text(example): example for example in parts["train"]}
    folded = {_folded(example): example for example in parts["train"]}
    findings = []
    for name, part in parts.items():
        if name == "train":
            continue
        same = [(example, exact[same_text(example)]) for example in part if same_text(example) in exact]
        alike = [(e, folded[_folded(e)]) for e in part if _folded(e) in folded and same_text(e) not in exact]
        count = len(same) + len(alike)
        text = f"texts of {name} that are also in train: {_share(count, part)}"
        text += f", {len(alike):,} of them except for case or white space" if alike else ""
        places = [_together(pair) for pair in (*same, *alike)]
        findings.append(Finding(f"overlap of train and {name}", count, text, places, True))
        groups = {e.group: e for e in parts["train"] if e.group is not None}
        shared = {e.group: (e, groups[e.group]) for e in part if e.group in groups}
        text = f"groups (data.group) of {name} that are also in train: {len(shared):,}"
        places = [f"{group!r} ({_together(pair)})" for group, pair in shared.items()]
        findings.append(Finding(f"groups of train and {name}", len(shared), text, places, True))
    return _some(findings)


def missing_labels(parts: Parts) -> list[Finding]:
    """Labels that are rare in training, or stand in some parts and not in others."""
    counts = {name: label_counts(part) for name, part in parts.items()}
    known = list(dict.fromkeys(label for of_part in counts.values() for label in of_part))
    rare = [label for label in known if 0 < counts["train"].get(label, 0) < RARE]
    text = f"labels with fewer than {RARE} examples in train: {len(rare)}"
    shown = [f"{label} ({counts['train'][label]})" for label in rare]
    findings = [Finding("rare labels", len(rare), text, shown, True)]
    for name, of_part in counts.items():
        missing = [label for label in known if label not in of_part]
        text = f"labels that do not occur in {name}: {len(missing)}"
        findings.append(Finding(f"labels missing in {name}", len(missing), text, missing, name == "train"))
    return _some(findings)


def alike_labels(examples: Iterable[Example]) -> list[Finding]:
    """Labels that differ in case, in the form of a number, or in characters that cannot be seen."""
    groups = alike(label_counts(examples))
    text = f"labels that differ only in case, number format or invisible characters: {len(groups)}"
    places = [" / ".join(map(repr, group)) for group in groups]
    return _some([Finding("alike labels", len(groups), text, places, True)])


def alike(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that people would read as one."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        visible = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
        plain = " ".join(visible.casefold().split())
        with suppress(ValueError):
            plain = repr(float(plain))  # 1, 1.0 and 01
        groups[plain].append(label)
    return [group for group in groups.values() if len(group) > 1]


def cut_words(examples: Iterable[Example]) -> list[Finding]:
    """Entities that begin or end inside a word of their text, as they do where offsets count something else than characters."""
    places, n = list[str](), 0
    for example in examples:
        for entity in entities(example.tags):
            start, end = example.offsets[entity.start][0], example.offsets[entity.end - 1][1]
            n += 1
            if inside_word(example.text, start, end):
                places.append(f"{example.where}: {start}-{end} ({entity.type}) reads {example.text[start:end]!r}")
    text = f"{len(places):,} of {n:,} spans begin or end inside a word"
    return _some([Finding("spans inside words", len(places), text, places, len(places) > WRONG * n)])


def odd_texts(examples: Sequence[Example]) -> list[Finding]:
    """Texts that hold nothing, and very long ones."""
    empty = [e.where for e in examples if not e.text.strip() or (e.pair is not None and not e.pair.strip())]
    long = sorted((e for e in examples if words(e) > LONG), key=words, reverse=True)
    places = [f"{e.where} ({words(e):,} words)" for e in long]
    return _some(
        [
            Finding("empty texts", len(empty), f"empty texts: {len(empty):,}", empty, True),
            Finding("long texts", len(long), f"texts of more than {LONG} words: {len(long):,}", places, False),
        ]
    )


def verdict(findings: Iterable[Finding]) -> str:
    """Whether the data are ready to train on, in one line."""
    problems = [finding.text for finding in findings if finding.is_problem]
    if not problems:
        return "ready to train"
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}: {'; '.join(problems)}"


def _share(count: int, part: Sequence[Example]) -> str:
    return f"{count:,} ({count / len(part):.1%})"


def _some(findings: Iterable[Finding]) -> list[Finding]:
    return [replace(f, places=f.places[:SHOWN]) for f in findings if f.count]


def _groups(examples: Iterable[Example], key: Callable[[Example], Hashable]) -> list[list[Example]]:
    groups: dict[Hashable, list[Example]] = defaultdict(list)
    for example in examples:
        groups[key(example)].append(example)
    return list(groups.values())


def same_text(example: Example) -> Hashable:
    """What examples of the same text (or words, or pair of texts) have in common."""
    return example.words or (example.text, example.pair, *example.choices)


def _folded(example: Example) -> Hashable:
    return tuple(" ".join(text.casefold().split()) for text in (example.text, example.pair or "", *example.choices))


def _answer(example: Example) -> Any:
    """What a record says, in a form that can be compared."""
    label = example.label
    return tuple(sorted(label.items())) if isinstance(label, Mapping) else label if label is not None else example.tags


def _disagreement(first: Example, second: Example) -> str:
    """Two labels, or the tags of the first word that has two."""
    if not first.tags:
        return f"{_shown(first)} / {_shown(second)}"
    rows = zip(first.words, first.tags, second.tags, strict=True)
    return next(f"{word!r} {a} / {b}" for word, a, b in rows if a != b)


def _shown(example: Example) -> str:
    return ", ".join(labels_of(example)) or str(example.label)


def _together(group: Sequence[Example]) -> str:
    """The places of the first two, the file named once."""
    first, second = group[:2]
    (file, _, _), (other, _, line) = first.where.rpartition(":"), second.where.rpartition(":")
    return f"{first.where} and {line if file == other else second.where}"
