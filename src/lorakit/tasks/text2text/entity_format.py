"""Entities as text: what every form of it offers, and what is read out of an output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Mention(NamedTuple):
    """An entity as it was written: its surface and its type."""

    surface: str
    type: str


@dataclass(frozen=True)
class Reading:
    """What one output says of the words it was written for, and what is wrong with it.

    `malformed` counts pieces that are not of the form, `unknown_type` pieces with a type that training did not have,
    `invented` mentions of what does not stand in the source, `misordered` mentions of what stands before the mention
    that was written before them. A last piece that the length limit cut off is no fault of these.
    """

    tags: tuple[str, ...]  # a tag for each word
    mentions: tuple[Mention, ...]  # well-formed pieces of known type, in the order of writing
    malformed: int = 0
    unknown_type: int = 0
    invented: int = 0
    misordered: int = 0


class Node(NamedTuple):
    """A place in an output that is being written; the kinds are the format's own, but for "start" and "end"."""

    kind: str
    word: int = 0  # words of the source that lie behind this place


START, END = Node("start"), Node("end")


class Way(NamedTuple):
    """What may be written next, and the place it leads to: a text without outer spaces, "" for the end of the output.

    Texts are joined by single spaces, so that a tokenizer whose pieces keep within white space writes each by itself.
    """

    text: str
    target: Node


class EntityFormat(Protocol):
    """A form in which entities are written. Words are taken in the tokenizer's spelling (`Spelling`)."""

    @property
    def delimiters(self) -> Sequence[str]:
        """Texts that the tokenizer must be able to write."""
        ...

    @property
    def drop_ins(self) -> Mapping[str, str]:
        """Characters that no word may hold, and what stands for each in the source and the output."""
        ...

    def write(self, words: Sequence[str], tags: Sequence[str]) -> str:
        """The text that the model should write, of words and IOB2 tags."""
        ...

    def read(self, output: str, words: Sequence[str], types: Sequence[str], *, ended: bool = True) -> Reading:
        """What an output says; `ended` is False where the length limit cut it off. Never fails."""
        ...

    def ways(self, node: Node, words: Sequence[str], types: Sequence[str]) -> Iterable[Way]:
        """The automaton of outputs without fault: the ways on from a place."""
        ...


def find(surface: str, words: Sequence[str], used: Sequence[bool], cursor: int) -> tuple[int, int] | None:
    """The first free words at or after `cursor` that spell the surface, else the first free ones before it, else the
    same without regard to case; white space is left out, since a tokenizer may join or split words."""
    for fold in (str, str.casefold):
        target, *there = (fold("".join(text.split())) for text in (surface, *words))
        for start in (*range(cursor, len(words)), *range(cursor)):
            end = _match(target, there, start)
            if end is not None and not any(used[start:end]):
                return start, end
    return None


def _match(target: str, words: Sequence[str], start: int) -> int | None:
    """The end of the words from `start` that spell exactly `wanted`, if any do."""
    rest = target
    for position in range(start, len(words)):
        if not rest.startswith(words[position]):
            return None
        rest = rest[len(words[position]) :]
        if not rest:
            return position + 1
    return None
