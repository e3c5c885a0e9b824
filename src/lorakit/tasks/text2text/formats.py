"""The forms in which a text-to-text model may write entities, by the names that task.format has for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lorakit.data.tags import Entity, entities, to_tags
from lorakit.errors import ConfigError
from lorakit.tasks.text2text.entity_format import END, EntityFormat, Mention, Node, Reading, Way, find
from lorakit.tasks.text2text.spelling import decode
from lorakit.tasks.text2text.tanl import MarkupFormat

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
        entities, misordered = align(mentions, words)
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


def align(mentions: Sequence[Mention], words: Sequence[str]) -> tuple[list[Entity], int]:
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


FORMATS: Mapping[str, EntityFormat] = {"list": ListFormat(), "tanl": MarkupFormat()}
