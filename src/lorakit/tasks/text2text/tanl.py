"""Entities marked in the sentence: `[ Peter Blackburn | PER ] visits [ EU | ORG ] .` (TANL: Paolini et al. 2021,
arXiv:2101.05779). We keep the data's own names of types, where the paper has words for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lorakit.data.tags import Entity, entities, to_tags
from lorakit.tasks.text2text.entity_format import END, Mention, Node, Reading, Way, find

OPEN, BAR, CLOSE = "[", "|", "]"


class MarkupFormat:
    """The sentence again, each entity in brackets with its type; aligned with the words by least edits."""

    delimiters: Sequence[str] = (OPEN, BAR, CLOSE)
    drop_ins: Mapping[str, str] = {OPEN: "(", BAR: "/", CLOSE: ")"}

    def write(self, words: Sequence[str], tags: Sequence[str]) -> str:
        spans = entities(tags)
        before = {entity.start: OPEN for entity in spans}
        after = {entity.end - 1: f"{BAR} {entity.type} {CLOSE}" for entity in spans}
        marked = [(before.get(i), word, after.get(i)) for i, word in enumerate(words)]
        return " ".join(text for word_parts in marked for text in word_parts if text)

    def read(self, output: str, words: Sequence[str], types: Sequence[str], *, ended: bool = True) -> Reading:
        marked = _Marked.of(output, ended)
        places: list[list[int]] = [[] for _ in marked.mentions]
        for (_, mention), position in zip(marked.words, align([word for word, _ in marked.words], words), strict=True):
            if mention is not None and position is not None:
                places[mention].append(position)
        known = [mention.type in types for mention in marked.mentions]
        spans = [
            Entity(mention.type, place[0], place[-1] + 1)
            for mention, place, good in zip(marked.mentions, places, known, strict=True)
            if place and good
        ]
        lost = [m for m, place, good in zip(marked.mentions, places, known, strict=True) if good and not place]
        moved = sum(find(mention.surface, words, [False] * len(words), 0) is not None for mention in lost)
        return Reading(
            tags=tuple(to_tags(spans, len(words))),
            mentions=tuple(mention for mention, good in zip(marked.mentions, known, strict=True) if good),
            malformed=marked.malformed + (ended and not marked.words),
            unknown_type=known.count(False),
            invented=len(lost) - moved,
            misordered=moved,
        )

    def ways(self, node: Node, words: Sequence[str], types: Sequence[str]) -> Iterable[Way]:
        kind, at = node
        rest = at < len(words)
        if kind in ("start", "outside"):
            yield Way(words[at], Node("outside", at + 1)) if rest else Way("", END)
        if kind in ("start", "outside") and rest:
            yield Way(OPEN, Node("open", at))
        if kind in ("open", "inside") and rest:
            yield Way(words[at], Node("inside", at + 1))
        if kind == "inside":
            yield Way(BAR, Node("bar", at))
        if kind == "bar":
            yield from (Way(name, Node("type", at)) for name in types)
        if kind == "type":
            yield Way(CLOSE, Node("outside", at))


@dataclass
class _Marked:
    """An output taken apart: its words, each with the number of its mention, the mentions, and the faults of form."""

    words: list[tuple[str, int | None]] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
    malformed: int = 0

    @classmethod
    def of(cls, output: str, ended: bool) -> _Marked:
        """Read tolerantly: what opens, ends or names a type at a wrong place is a fault, and its words stay words."""
        marked = cls()
        inside: list[str] | None = None
        kind: list[str] | None = None
        for text in (*re.sub(r"([\[|\]])", r" \1 ", output).split(), None):
            if inside is None and text not in (OPEN, BAR, CLOSE, None):
                marked.words.append((str(text), None))
            elif inside is None:
                marked.malformed += text in (BAR, CLOSE)
                inside = [] if text == OPEN else None
            elif text == CLOSE and inside and kind:
                marked._mention(inside, " ".join(kind))
                inside = kind = None
            elif text in (OPEN, CLOSE, None):  # a mention without surface, type or end
                marked.malformed += text is not None or ended
                marked.words += [(word, None) for word in inside]
                inside, kind = ([] if text == OPEN else None), None
            elif text == BAR:
                marked.malformed += kind is not None
                kind = []
            else:
                (inside if kind is None else kind).append(str(text))
        return marked

    def _mention(self, words: list[str], kind: str) -> None:
        self.words += [(word, len(self.mentions)) for word in words]
        self.mentions.append(Mention(" ".join(words), kind))


def align(written: Sequence[str], words: Sequence[str]) -> list[int | None]:
    """For each written word the word of the source that it repeats, by a shortest edit script (Levenshtein over words).

    Case counts for half an edit. Words that are inserted or replaced repeat none.
    """
    if list(written) == list(words):
        return list(range(len(words)))
    costs = [[float(j) for j in range(len(words) + 1)]]  # costs[i][j]: from written[:i] to words[:j]
    for i, word in enumerate(written, start=1):
        row = [float(i)]
        for j, other in enumerate(words, start=1):
            row.append(min(costs[-1][j - 1] + _distance(word, other), costs[-1][j] + 1, row[-1] + 1))
        costs.append(row)
    matches: list[int | None] = []
    i, j = len(written), len(words)
    while i:  # the way back through the costs, from the last written word to the first
        if j and costs[i][j] == costs[i - 1][j - 1] + (distance := _distance(written[i - 1], words[j - 1])):
            i, j = i - 1, j - 1
            matches.append(j if distance < 1 else None)
        elif j and costs[i][j] == costs[i][j - 1] + 1:
            j -= 1
        else:
            i -= 1
            matches.append(None)
    return matches[::-1]


def _distance(word: str, other: str) -> float:
    if word == other:
        return 0
    return 0.5 if word.casefold() == other.casefold() else 1
