"""The one record that every reader yields, and what is known of the file it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

# What a task wants of each record: a text alone, one label, several labels, a number, or words with their tags.
Wants = Literal["text", "label", "labels", "number", "words"]
# One label; a share for each label (soft); several labels; a number.
Label = str | Mapping[str, float] | tuple[str, ...] | float


@dataclass(frozen=True, slots=True)
class Example:
    """One record: a text and a label, or words and their tags (IOB2), or a text alone to predict on.

    `offsets` has each word's (start, end) in `text`, so that answers point into the original text.
    """

    text: str
    label: Label | None = None
    pair: str | None = None
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    offsets: tuple[tuple[int, int], ...] = ()
    where: str = ""  # file:line


@dataclass(frozen=True, slots=True)
class Dataset:
    """The examples of one source in their order, its fingerprint, and what the user should be told about the reading."""

    source: str
    examples: Sequence[Example]
    sha256: str
    notes: Sequence[str] = field(default=())


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns to read; None means the usual names are looked for."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None


def of_words(words: Sequence[str], tags: Sequence[str] = (), where: str = "") -> Example:
    """An example of words, whose text is the words joined by single spaces."""
    offsets, position = [], 0
    for word in words:
        offsets.append((position, position + len(word)))
        position += len(word) + 1
    return Example(" ".join(words), words=tuple(words), tags=tuple(tags), offsets=tuple(offsets), where=where)


# A word with inner hyphens or dots (U.S, mid-May) or commas between digits (1,000); a clitic ('s); or one other
# visible character.
WORD = re.compile(r"\w+(?:[-.]\w+|(?<=\d),\d\w*)*|'\w+|[^\w\s]")


def of_text(text: str) -> Example:
    """An example of a raw text, cut into words much as CoNLL files cut them; offsets point into the text."""
    offsets = tuple(match.span() for match in WORD.finditer(text))
    return Example(text, words=tuple(text[start:end] for start, end in offsets), offsets=offsets)
