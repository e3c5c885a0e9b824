"""The text form of entities that the reference system uses: `Peter Blackburn: PER | EU: ORG`, or `None`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorakit.data.tags import Entity

SEPARATOR, COLON, NONE = " | ", ":", "None"


class Mention(NamedTuple):
    """An entity as it was written: its surface and its type."""

    surface: str
    type: str


@dataclass(frozen=True)
class Parsed:
    """What one output says: mentions in order, and how many pieces were no mention or had an unknown type."""

    mentions: tuple[Mention, ...]
    malformed: int
    unknown_type: int


@dataclass(frozen=True)
class Aligned:
    """Mentions found again among the words; `invented` of them stand nowhere in the sentence."""

    entities: tuple[Entity, ...]
    invented: int


def write(words: Sequence[str], found: Sequence[Entity]) -> str:
    """The target text of a sentence: one mention an entity, in order, duplicates repeated."""
    pieces = [f"{' '.join(words[entity.start : entity.end])}{COLON} {entity.type}" for entity in found]
    return SEPARATOR.join(pieces) or NONE


def parse(output: str, types: Sequence[str]) -> Parsed:
    """Read an output tolerantly: pieces split at |, the type after the last colon (a surface may hold colons)."""
    mentions, malformed, unknown = [], 0, 0
    pieces = [] if output.strip() in ("", NONE) else output.split(SEPARATOR.strip())
    malformed += output.strip() == ""
    for piece in pieces:
        surface, colon, kind = (part.strip() for part in piece.rpartition(COLON))
        if not surface or not colon or not kind:
            malformed += 1
        elif kind not in types:
            unknown += 1
        else:
            mentions.append(Mention(surface, kind))
    return Parsed(tuple(mentions), malformed, unknown)


def align(mentions: Sequence[Mention], words: Sequence[str]) -> Aligned:
    """Find each mention among the words, left to right, each word used once.

    A mention takes the first free occurrence at or after the end of the one before, else the first free one
    anywhere, else the same without regard to case; surfaces are compared with white space removed, since a
    tokenizer may join or split words.
    """
    used = [False] * len(words)
    found: list[Entity] = []
    cursor = 0
    for mention in mentions:
        place = _find(mention.surface, words, used, cursor)
        if place is None:
            continue
        start, end = place
        used[start:end] = [True] * (end - start)
        found.append(Entity(mention.type, start, end))
        cursor = end
    return Aligned(tuple(sorted(found, key=lambda entity: entity.start)), len(mentions) - len(found))


def _find(surface: str, words: Sequence[str], used: Sequence[bool], cursor: int) -> tuple[int, int] | None:
    for fold in (str, str.casefold):
        wanted, *there = (fold("".join(text.split())) for text in (surface, *words))
        for start in (*range(cursor, len(words)), *range(cursor)):
            end = _match(wanted, there, start)
            if end is not None and not any(used[start:end]):
                return start, end
    return None


def _match(wanted: str, words: Sequence[str], start: int) -> int | None:
    """The end of the words from `start` that spell exactly `wanted`, if any do."""
    rest = wanted
    for position in range(start, len(words)):
        if not rest.startswith(words[position]):
            return None
        rest = rest[len(words[position]) :]
        if not rest:
            return position + 1
    return None
