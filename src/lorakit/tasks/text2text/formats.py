"""The forms in which a text-to-text model may write entities, by the names that task.format has for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lorakit.data.tags import OUTSIDE, Entity, entities, split_tag, to_tags
from lorakit.errors import ConfigError
from lorakit.tasks.text2text.entity_format import END, EntityFormat, Mention, Node, Reading, Way, find
from lorakit.tasks.text2text.spelling import decode
from lorakit.tasks.text2text.tanl import MarkupFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FORMATS: Mapping[str, Callable[[PreTrainedTokenizerBase], EntityFormat]] = {
    "list": lambda _: ListFormat(),
    "tanl": lambda _: MarkupFormat(),
    "sentinel": lambda tokenizer: SentinelFormat(count_sentinels(tokenizer)),
}


def make_format(name: str, tokenizer: PreTrainedTokenizerBase, types: Sequence[str]) -> EntityFormat:
    """The format of this name, with every delimiter and type tried out in the tokenizer.

    Raises:
        ConfigError: one of them does not come back as it was written.
    """
    form = FORMATS[name](tokenizer)
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


def count_sentinels(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of <extra_id_0>, <extra_id_1>, ... the vocabulary has.

    Raises:
        ConfigError: it has none.
    """
    vocabulary = tokenizer.get_vocab()
    count = 0
    while f"<extra_id_{count}>" in vocabulary:
        count += 1
    if not count:
        raise ConfigError(
            "task.format = 'sentinel': the tokenizer of this model has no <extra_id_0>; try 'list' or 'tanl'"
        )
    return count


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

    name = "list"
    delimiters: Sequence[str] = (BAR, COLON, NONE)
    drop_ins: Mapping[str, str] = {BAR: "/"}
    longest = None

    def source(self, words: Sequence[str]) -> str:
        return " ".join(words)

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
        kind, at, _ = node
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


# Entities as a tag behind a sentinel for each word: `<extra_id_0> Peter <extra_id_1> spoke` -> `<extra_id_0> B-PER
# <extra_id_1> O` (Raman et al. 2022, arXiv:2203.08378: "Sentinel + Tag"). No word is copied.


SENTINEL = re.compile(r"<extra_id_(\d{1,6})>")


class SentinelFormat:
    """A tag for each word, numbered by sentinels; a sentence of more words than there are sentinels is read in windows,
    which lose nothing: an I- tag at the start of a window goes on with the entity before it."""

    name = "sentinel"
    drop_ins: Mapping[str, str] = {}

    def __init__(self, sentinels: int) -> None:
        self.longest = sentinels
        self.delimiters: Sequence[str] = (_sentinel(0), _sentinel(sentinels - 1))

    def source(self, words: Sequence[str]) -> str:
        return " ".join(f"{_sentinel(i)} {word}" for i, word in enumerate(words))

    def write(self, words: Sequence[str], tags: Sequence[str]) -> str:
        return " ".join(f"{_sentinel(i)} {tag}" for i, tag in enumerate(tags))

    def read(self, output: str, words: Sequence[str], types: Sequence[str], *, ended: bool = True) -> Reading:
        before, *parts = SENTINEL.split(output)
        numbered = [(int(number), tag.strip()) for number, tag in zip(parts[::2], parts[1::2], strict=True)]
        if not ended and numbered and not _is_tag(numbered[-1][1], types):
            numbered.pop()
        tags: dict[int, str] = {}
        malformed = unknown = invented = misordered = 0
        for number, tag in numbered:
            misordered += number < max(tags, default=0)
            if number >= len(words) or number in tags:
                invented += 1
                continue
            kind = split_tag(tag)[1]
            unknown += bool(kind) and kind not in types
            malformed += tag != OUTSIDE and not re.match("[BI]-.", tag)
            tags[number] = tag if _is_tag(tag, types) else OUTSIDE
        malformed += bool(before.strip()) + (ended and len(tags) < len(words))
        every = tuple(tags.get(i, OUTSIDE) for i in range(len(words)))
        mentions = [Mention(" ".join(words[e.start : e.end]), e.type) for e in entities(every)]
        return Reading(every, tuple(mentions), malformed, unknown, invented, misordered)

    def ways(self, node: Node, words: Sequence[str], types: Sequence[str]) -> Iterable[Way]:
        kind, at, inside = node
        if kind == "sentinel":
            yield Way(OUTSIDE, Node("tag", at + 1))
            yield from (Way(f"B-{name}", Node("tag", at + 1, name)) for name in types)
            going_on = types if at == 0 else [inside] if inside else []  # a window may begin inside an entity
            yield from (Way(f"I-{name}", Node("tag", at + 1, name)) for name in going_on)
        elif at < len(words):
            yield Way(_sentinel(at), Node("sentinel", at, inside))
        else:
            yield Way("", END)


def _sentinel(number: int) -> str:
    return f"<extra_id_{number}>"


def _is_tag(tag: str, types: Sequence[str]) -> bool:
    prefix, kind = split_tag(tag)
    return tag == OUTSIDE or (prefix in ("B", "I") and kind in types)
