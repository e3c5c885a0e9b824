"""Entities as a list, the form of the reference system: `Peter Blackburn: PER | EU: ORG`, or `None`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lorakit.data.tags import Entity, entities, to_tags
from lorakit.tasks.entity_text import END, Mention, Node, Reading, Way, find

BAR, COLON, NONE = "|", ":", "None"


class Piece(NamedTuple):
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
        pieces = [f"{' '.join(words[entity.start : entity.end])}{COLON} {entity.type}" for entity in entities(tags)]
        return f" {BAR} ".join(pieces) or NONE

    def read(self, output: str, words: Sequence[str], types: Sequence[str], *, ended: bool = True) -> Reading:
        pieces = [] if output.strip() == NONE else [_piece(text, types) for text in output.split(BAR)]
        if pieces and not ended and pieces[-1].fault:
            pieces.pop()
        faults = [piece.fault for piece in pieces]
        mentions = tuple(piece.mention for piece in pieces if piece.mention)
        found, misordered = align(mentions, words)
        return Reading(
            tags=tuple(to_tags(found, len(words))),
            mentions=mentions,
            malformed=faults.count("malformed"),
            unknown_type=faults.count("unknown_type"),
            invented=len(mentions) - len(found),
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


def _piece(text: str, types: Sequence[str]) -> Piece:
    """A piece of an output, the type after its last colon (a surface may hold colons)."""
    surface, colon, kind = (part.strip() for part in text.rpartition(COLON))
    if not (surface and colon and kind):
        return Piece(None, "malformed")
    return Piece(Mention(surface, kind)) if kind in types else Piece(None, "unknown_type")


def align(mentions: Sequence[Mention], words: Sequence[str]) -> tuple[list[Entity], int]:
    """The mentions that are found among the words, in the order of the sentence, and how many stand before the mention
    that was written before them.

    Each word is used once. A mention takes the first free occurrence at or after the end of the one before, else the
    first free one anywhere, else the same without regard to case.
    """
    used = [False] * len(words)
    found: list[Entity] = []
    cursor = misordered = 0
    for mention in mentions:
        place = find(mention.surface, words, used, cursor)
        if place is None:
            continue
        start, end = place
        used[start:end] = [True] * (end - start)
        found.append(Entity(mention.type, start, end))
        misordered += start < cursor
        cursor = end
    return sorted(found, key=lambda entity: entity.start), misordered
