"""The one record that every reader yields, and what is known of the file it came from."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorakit.data.spans import Overlaps, Span, trim
from lorakit.data.tags import OUTSIDE
from lorakit.data.text import is_utf8
from lorakit.errors import DataError

if TYPE_CHECKING:
    from lorakit.recipe import DataSection

# What a task wants of each record: a text alone, one label, several labels, a number, or words with their tags.
# Related texts are pairs (with negatives, or a number for how alike they are), or texts with the class that they are of. A
# target is a text to be written. Choices are texts of which one is right, named by its letter.
Wants = Literal["text", "label", "labels", "number", "words", "related", "target", "choices"]
Answers = Literal["name", "text", "from_0", "from_1"]  # how a file says which choice is right
OnBad = Literal["stop", "skip"]
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
    group: str | None = None  # what it belongs to: a document, a user
    is_query: bool = False  # of a text alone: whether it is to find others
    negatives: tuple[str, ...] = ()  # texts that do not belong to `text` as `pair` does
    teacher: tuple[float, ...] = ()  # how well `pair`, and each negative, answers `text`, as another model scored it
    target: str | None = None  # the text to be written of it
    choices: tuple[str, ...] = ()  # what may follow it, one of which is right: `label` is its letter


@dataclass(frozen=True, slots=True)
class Dataset:
    """The examples of one source in their order, its fingerprint, and what the user should be told about the reading."""

    source: str
    examples: Sequence[Example]
    sha256: str
    notes: Sequence[str] = field(default=())
    left_out: int = 0  # records that could not be used


@dataclass(frozen=True, slots=True)
class Columns:
    """How records are read: names of columns, where None means that the usual ones are looked for, and what is in them."""

    text: str | None = None
    pair: str | None = None
    label: str | tuple[str, ...] | None = None  # several: 0/1 columns, or shares
    negative: str | tuple[str, ...] | None = None
    choices: str | tuple[str, ...] | None = None  # one of lists, or several of one choice each
    answers: Answers | None = None  # how the label names the right choice; unset: told from the first rows
    label_separator: str = ","  # between labels in one cell
    overlaps: Overlaps = "error"  # what becomes of character spans that overlap
    group: str | None = None  # of what examples belong to; none of the usual names is looked for
    on_bad: OnBad = "stop"  # what becomes of records that cannot be used
    delimiter: str | None = None  # between the fields of a table; unset: told from the first record
    header: bool | None = None  # whether a table's first record names its columns; unset: it does
    encoding: str | None = None  # of a text file; unset: UTF-8
    columns: Mapping[str, int] | None = None  # of CoNLL lines, from 1: {"word": 2, "tag": 3}; unset: told from them

    def over(self, others: Columns, source: str | Path) -> Columns:
        """The others, but with the text, the pair, the label and the choices that are named here, for this source."""
        named = {role: name for role in ("text", "pair", "label", "choices") if (name := getattr(self, role))}
        return replace(others, **named, encoding=others.encoding_of(source))

    def encoding_of(self, source: str | Path) -> str | None:
        """The encoding, if it is that of other files than this one: a source that is valid UTF-8 is read as such."""
        is_other = self.encoding and Path(source).is_file() and is_utf8(Path(source))
        return None if is_other else self.encoding


OF_TRAINING = ("group", "on_bad")  # what a run does not ask of other files, which it answers or scores


def columns_of(data: DataSection) -> Columns:
    """The columns that a recipe names; those of them that files to answer or to score have too."""
    return Columns(
        **{field.name: getattr(data, field.name) for field in fields(Columns) if field.name not in OF_TRAINING}
    )


def examples_sha256(examples: Iterable[Example]) -> str:
    """What tells examples in their order from others: sha256 of texts, labels and tags, in hexadecimal."""
    digest = hashlib.sha256()
    for example in examples:
        more = [part for part in (example.negatives, example.target, example.choices, example.teacher) if part]
        digest.update(repr((example.text, example.pair, example.label, example.tags, *more)).encode())
    return digest.hexdigest()


def of_words(words: Sequence[str], tags: Sequence[str] = (), where: str = "") -> Example:
    """An example of words, whose text is the words joined by single spaces."""
    offsets, position = [], 0
    for word in words:
        offsets.append((position, position + len(word)))
        position += len(word) + 1
    return Example(" ".join(words), words=tuple(words), tags=tuple(tags), offsets=tuple(offsets), where=where)


# A word with inner hyphens or dots (U.S, mid-May) or commas between digits (1,000); a clitic ('s); or one other
# visible character. U+0301 stands for every character that belongs to the one before it.
WORD = re.compile(r"\w[\w\u0301]*(?:[-.]\w[\w\u0301]*|(?<=\d),\d[\w\u0301]*)*|'\w[\w\u0301]*|[^\w\s]\u0301*")
JOINERS = "\u200c\u200d"  # of Persian and Indic letters, and of emoji


def word_offsets(text: str) -> list[tuple[int, int]]:
    """Where the words of a raw text are, cut much as CoNLL files cut them; all of it but white space is in one."""
    if not text.isascii():
        text = "".join("\u0301" if c in JOINERS or unicodedata.category(c)[0] == "M" else c for c in text)
    return [match.span() for match in WORD.finditer(text)]


def of_text(text: str) -> Example:
    """An example of a raw text, cut into words; offsets point into the text."""
    offsets = tuple(word_offsets(text))
    return Example(text, words=tuple(text[start:end] for start, end in offsets), offsets=offsets)


def of_spans(
    text: str, spans: Sequence[Span], tokens: Sequence[tuple[int, int]] | None = None, where: str = ""
) -> Example:
    """An example of a text and spans that do not overlap nor begin or end with white space.

    Words are cut as `of_text` cuts them, or are the `tokens` that the file gives, and are cut at the borders of spans
    too, so that each span is exact.

    Raises:
        DataError: the tokens are not in order, or leave out some of the text.
    """
    position = 0
    for start, end in (*tokens, (len(text), len(text))) if tokens is not None else ():
        if not position <= start <= end <= len(text):
            raise DataError(f"{where}: token {start}-{end} overlaps the one before or is outside the text")
        if missed := text[position:start].strip():
            raise DataError(f"{where}: {missed!r} at {position} is in no token")
        position = end
    borders = sorted({border for span in spans for border in span[:2]})
    cut = word_offsets(text) if tokens is None else tokens
    offsets = tuple(inner for start, end in cut for piece in _cut(start, end, borders) if (inner := trim(text, *piece)))
    begun = {span.start: span for span in spans}
    tags: list[str] = []
    inside: Span | None = None
    for start, _ in offsets:
        begins = begun.get(start)
        inside = begins or (inside if inside and start < inside.end else None)
        tags.append(f"{'B' if begins else 'I'}-{inside.type}" if inside else OUTSIDE)
    words = tuple(text[start:end] for start, end in offsets)
    return Example(text, words=words, tags=tuple(tags), offsets=offsets, where=where)


def _cut(start: int, end: int, borders: Sequence[int]) -> Iterable[tuple[int, int]]:
    inner = borders[bisect_right(borders, start) : bisect_left(borders, end)]
    return pairwise([start, *inner, end])
