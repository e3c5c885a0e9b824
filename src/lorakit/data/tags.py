"""IOB tags: which scheme a file uses, and its conversion to IOB2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"


class Entity(NamedTuple):
    """A typed stretch of words: words[start:end]."""

    type: str
    start: int
    end: int


def split_tag(tag: str) -> tuple[str, str]:
    """The prefix and the type of a tag: `B-PER` gives ("B", "PER"), `O` gives ("O", "")."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def is_tag(tag: str) -> bool:
    """Whether this is `O`, `B-TYPE` or `I-TYPE`."""
    prefix, kind = split_tag(tag)
    return tag == OUTSIDE or (prefix in ("B", "I") and bool(kind))


def starts_entity(tag: str, previous: str) -> bool:
    """Whether an entity begins here as conlleval reads it: at B-, and at I- after O or after another type."""
    prefix, kind = split_tag(tag)
    return prefix == "B" or (prefix == "I" and split_tag(previous)[1] != kind)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities in a sequence of tags, read as conlleval does (so IOB1, IOB2, IO and broken sequences have an answer)."""
    found: list[Entity] = []
    previous = OUTSIDE
    for i, tag in enumerate(tags):
        if starts_entity(tag, previous):
            found.append(Entity(split_tag(tag)[1], i, i + 1))
        elif tag != OUTSIDE:
            found[-1] = found[-1]._replace(end=i + 1)
        previous = tag
    return found


def strict_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities in strict IOB2: they begin at B- only, and an I- that continues nothing is no entity."""
    found: list[Entity] = []
    inside = ""  # type of the entity that the previous word belongs to
    for i, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        if prefix == "B":
            found.append(Entity(kind, i, i + 1))
            inside = kind
        elif prefix == "I" and kind == inside:
            found[-1] = found[-1]._replace(end=i + 1)
        else:
            inside = ""
    return found


def to_tags(spans: Iterable[Entity], length: int) -> list[str]:
    """IOB2 tags of non-overlapping entities over `length` words."""
    tags = [OUTSIDE] * length
    for kind, start, end in spans:
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


def scheme(sentences: Iterable[Sequence[str]]) -> str:
    """IOB2, IOB1, IO or mixed: what the tags of a whole file are consistent with.

    IO has no B- at all. In IOB2 every entity begins with B-. In IOB1 a B- stands only where an entity touches
    another of its type. Anything else is mixed, and read as conlleval reads it.
    """
    b_needed = b_needless = i_starts = 0
    for tags in sentences:
        previous = OUTSIDE
        for tag in tags:
            prefix, kind = split_tag(tag)
            touches = split_tag(previous)[1] == kind and kind != ""
            b_needed += prefix == "B" and touches
            b_needless += prefix == "B" and not touches
            i_starts += prefix == "I" and not touches
            previous = tag
    if not i_starts:
        return "IOB2"
    if not b_needless:
        return "IOB1" if b_needed else "IO"
    return "mixed"
