"""Entities as a tag behind a sentinel for each word: `<extra_id_0> Peter <extra_id_1> spoke` -> `<extra_id_0> B-PER
<extra_id_1> O` (Raman et al. 2022, arXiv:2203.08378: "Sentinel + Tag"). No word is copied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lorakit.data.tags import OUTSIDE, entities, split_tag
from lorakit.tasks.entity_text import END, Mention, Node, Reading, Way

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
