"""The forms in which a text-to-text model may write entities, by the names that task.format has for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lorakit.data.tags import Entity, entities, to_tags
from lorakit.errors import ConfigError
from lorakit.tasks.text2text.decoding import decode
from lorakit.tasks.text2text.entity_format import END, EntityFormat, Mention, Node, Reading, Way, find

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_format(name: str, tokenizer: PreTrainedTokenizerBase, types: Sequence[str]) -> EntityFormat:
    """The format of this name, with every delimiter and type tried out in the tokenizer.

    Raises:
        ConfigError: one of them does not come back as it was written.
    """
    form = FORMATS[name]
    others = " or ".join(repr(other) for other in FORMATS if other != name)
    where = f"task.format = {name!r}"
    for delimiter in form.delimiters:
        if (back := _back(tokenizer, delimiter)) != delimiter:
            raise ConfigError(
                f"{where}: the model's tokenizer cannot write {delimiter!r} (it decodes to {back!r}); try {others}"
            )
    for kind in types:
        words, tags = ("x", "y"), (f"B-{kind}", f"I-{kind}")
        written = form.write(words, tags)
        back = _back(tokenizer, written)
        if form.read(back, words, types).tags != tags:
            raise ConfigError(
                f"{where}: the entity type {kind!r} is not preserved: {written!r} decodes to {back!r}; "
                f"rename the type in the data, or try {others}"
            )
    return form


def _back(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return decode(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


# Entities as a list, the form of the reference system: `Peter Blackburn: PER | EU: ORG`, or `None`.


BAR, COLON, NONE = "|", ":", "None"


class Entry(NamedTuple):
    """What stands between two bars: a mention, or the name of the fault it has."""

    mention: Mention | None
    fault: str = ""


class ListFormat:
    """One mention an entity, in order, duplicates repeated; found again left to right.

    Where an entity's words stand elsewhere too and not as an entity, the list does not say which are meant.
    """

    delimiters: Sequence[str] = (BAR, COLON, NONE)
    drop_ins: Mapping[str, str] = {BAR: "/"}

    def write(self, words: Sequence[str], tags: Sequence[str]) -> str:
        entries = [f"{' '.join(words[entity.start : entity.end])}{COLON} {entity.type}" for entity in entities(tags)]
        return f" {BAR} ".join(entries) or NONE

    def read(self, output: str, words: Sequence[str], types: Sequence[str], *, ended: bool = True) -> Reading:
        entries = [] if output.strip() == NONE else [_entry(text, types) for text in output.split(BAR)]
        if entries and not ended and entries[-1].fault:
            entries.pop()
        faults = [entry.fault for entry in entries]
        mentions = tuple(entry.mention for entry in entries if entry.mention)
        entities, misordered = find_mentions(mentions, words)
        return Reading(
            tags=tuple(to_tags(entities, len(words))),
            mentions=mentions,
            malformed=faults.count("malformed"),
            unknown_type=faults.count("unknown_type"),
            invented=len(mentions) - len(entities),
            misordered=misordered,
        )

    def ways(self, node: Node, words: Sequence[str], types: Sequence[str]) -> Iterable[Way]:
        kind, at = node
        if kind == "start":
            yield Way(NONE, Node("last"))
        if kind in ("start", "bar"):  # each mention begins behind the one before
            for i in range(at, len(words)):
                yield from _word(words, i)
        elif kind == "word" and at < len(words):
            yield from _word(words, at)
        elif kind == "colon":
            yield from (Way(name, Node("type", at)) for name in types)
        elif kind in ("type", "last"):
            yield Way("", END)
            if kind == "type" and at < len(words):
                yield Way(BAR, Node("bar", at))


def _word(words: Sequence[str], i: int) -> Iterable[Way]:
    """A word inside a mention, or the one that ends it."""
    yield Way(words[i], Node("word", i + 1))
    yield Way(words[i] + COLON, Node("colon", i + 1))


def _entry(text: str, types: Sequence[str]) -> Entry:
    """A piece of an output, the type after its last colon (a surface may hold colons)."""
    surface, colon, kind = (part.strip() for part in text.rpartition(COLON))
    if not (surface and colon and kind):
        return Entry(None, "malformed")
    return Entry(Mention(surface, kind)) if kind in types else Entry(None, "unknown_type")


def find_mentions(mentions: Sequence[Mention], words: Sequence[str]) -> tuple[list[Entity], int]:
    """The mentions that are found among the words, in the order of the sentence, and how many stand before the mention
    that was written before them.

    Each word is used once. A mention takes the first free occurrence at or after the end of the one before, else the
    first free one anywhere, else the same without regard to case.
    """
    used = [False] * len(words)
    entities: list[Entity] = []
    cursor = misordered = 0
    for mention in mentions:
        place = find(mention.surface, words, used, cursor)
        if place is None:
            continue
        start, end = place
        used[start:end] = [True] * (end - start)
        entities.append(Entity(mention.type, start, end))
        misordered += start < cursor
        cursor = end
    return sorted(entities, key=lambda entity: entity.start), misordered


# Entities marked in the sentence: `[ Peter Blackburn | PER ] visits [ EU | ORG ] .` (TANL: Paolini et al. 2021,
# arXiv:2101.05779). We keep the data's own names of types, where the paper has words for them.


OPEN, CLOSE = "[", "]"


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
        for (_, mention), position in zip(
            marked.words, align_words([word for word, _ in marked.words], words), strict=True
        ):
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


def align_words(written: Sequence[str], words: Sequence[str]) -> list[int | None]:
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


FORMATS: Mapping[str, EntityFormat] = {"list": ListFormat(), "tanl": MarkupFormat()}
