"""Character spans as annotation tools write them: checked against the text, and resolved so that words can carry them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from lorakit.data.text import counted
from lorakit.errors import DataError, short

Overlaps = Literal["error", "longest"]
# Keys of a span by its part; the first that is there counts.
START = ("start", "start_offset")
END = ("end", "end_offset")
TYPE = ("label", "type", "entity_group", "labels", "entity")
ASTRAL = "\uffff"  # characters above this one are two code units in UTF-16
CODE_UNITS = "offsets count UTF-16 code units, as JavaScript does; converted to characters"  # a note
# Scripts that put no space between words, or put endings behind names: Thai and Lao, Burmese, Khmer, kana, Han, Hangul.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
ENOUGH, WRONG = 10, 0.3  # spans, and the share of them that may begin or end inside a word before all are refused


class Span(NamedTuple):
    """A typed stretch of a text: text[start:end]."""

    start: int
    end: int
    type: str
    text: str | None = None  # what the file says stands there
    where: str = ""

    def __str__(self) -> str:
        return f"span {self.start}-{self.end} ({self.type})"


class Marked(NamedTuple):
    """A text, its spans, and what its file calls it."""

    text: str
    spans: Sequence[Span]
    where: str


def is_spans(value: Any) -> bool:
    """Whether a value looks like a filled list of spans."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, Span)
            or (isinstance(item, dict) and any(key in item for key in START))
            or (_is_triple(item) and type(item[0]) is type(item[1]) is int)
            for item in value
        )
    )


def _is_triple(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 3


def spans_of(value: Any, where: str) -> list[Span]:
    """The spans in a list of [start, end, type] or of objects; an object with several labels is as many spans.

    Raises:
        DataError: the value is not such a list, an offset is not a whole number, or a type is missing.
    """
    if value is None:
        raise DataError(f"{where}: not annotated; use [] for a text without entities")
    if not isinstance(value, list):
        raise DataError(f"{where}: {short(value)} is not a list of spans")
    return [span for item in value for span in _read(item, where)]


def _read(item: Any, where: str) -> Iterable[Span]:
    if isinstance(item, Span):
        return [item]
    if _is_triple(item):
        item = dict(zip(("start", "end", "label"), item, strict=True))
    if not isinstance(item, dict):
        raise DataError(
            f"{where}: {short(item)} is not a span; expected [start, end, type] or an object with these keys"
        )
    start, end, types = (next((item[key] for key in keys if key in item), None) for keys in (START, END, TYPE))
    types = types if isinstance(types, list) else [types]
    if type(start) is not int or type(end) is not int:
        raise DataError(f"{where}: {short(item)}: start and end of a span are whole numbers of characters")
    if any(type(kind) is int for kind in types):
        raise DataError(
            f"{where}: {short(item)}: the type is a number whose name is not in the file; export with names (of doccano: "
            "JSONL with label names)"
        )
    if not types or not all(isinstance(kind, str) and kind.strip() for kind in types):
        raise DataError(f"{where}: {short(item)}: a span needs a type under one of the keys {', '.join(TYPE)}")
    own = item.get("text")
    return [Span(start, end, kind.strip(), own if isinstance(own, str) else None, where) for kind in types]


def settle(
    records: Sequence[Marked], overlaps: Overlaps, source: str
) -> tuple[list[list[Span] | DataError], list[str]]:
    """For each record its spans in order, without white space at their ends and without overlaps; and notes.

    In place of the spans of a record stands what is wrong with one: it lies outside its text, is empty, does not read as
    the file says, or overlaps another one (with `overlaps = "longest"` the longer one stays, the first of two equally long
    ones).

    Raises:
        DataError: the file counts offsets in two ways, or so many spans begin or end inside a word that their offsets
            must count something else than characters.
    """
    notes: list[str] = []
    if _counts_code_units(records):
        notes.append(f"{source}: {CODE_UNITS}")
        records = [_in_characters(record) for record in records]
    notes += _cut_words(records, source)
    resolved: list[list[Span] | DataError] = []
    trimmed, blank, left_out = [], [], []
    for record in records:
        spans = []
        try:
            for span in record.spans:
                _check(span, record.text)
                inner = trim(record.text, span.start, span.end)
                if inner is None:
                    blank.append(span.where)
                    continue
                if inner != (span.start, span.end):
                    trimmed.append(span.where)
                spans.append(span._replace(start=inner[0], end=inner[1]))
            apart = _without_overlaps(spans, overlaps)
        except DataError as err:
            resolved.append(err)
            continue
        resolved.append(apart)
        left_out += [record.where] * (len(spans) - len(apart))
    notes += counted(f"{source}: white space removed at the ends of spans", trimmed)
    notes += counted(f"{source}: spans of only white space, left out", blank)
    notes += counted(f"{source}: spans that overlap longer ones, left out", left_out)
    return resolved, notes


def inside_word(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] begins or ends between two letters or two digits of a script with spaces between words."""
    return any(
        0 < at < len(text)
        and all(map(str.isalpha if text[at].isalpha() else str.isdigit, text[at - 1 : at + 1]))
        and not re.match(f"[{UNSPACED}]", text[at])
        for at in (start, end)
    )


def _cut_words(records: Sequence[Marked], source: str) -> list[str]:
    """The note of spans that begin or end inside a word, of those whose text the file does not say itself."""
    bare = [record._replace(spans=[span for span in record.spans if span.text is None]) for record in records]
    n, cut = sum(len(record.spans) for record in bare), _inside(bare)
    if not cut:
        return []
    record, span = cut[0]
    first = f"first {span.where}: {span} reads {short(record.text[span.start : span.end])}"
    message = f"{source}: {len(cut)} of {n} spans begin or end inside a word ({first})"
    for what, convert in OTHER_OFFSETS.items():
        if len(_inside([convert(record) for record in bare])) <= WRONG * len(cut):
            message += f"; they would not if {what}"
            break
    if n >= ENOUGH and len(cut) > WRONG * n:
        raise DataError(f"{message}; offsets count characters from 0, and the end is the offset after the last one")
    return [message]


def _inside(records: Iterable[Marked]) -> list[tuple[Marked, Span]]:
    """The spans that begin or end inside a word; one that is outside of its text counts too."""
    return [
        (record, span)
        for record in records
        for span in record.spans
        if span.end > len(record.text) or inside_word(record.text, span.start, span.end)
    ]


def _counts_code_units(records: Iterable[Marked]) -> bool:
    """Whether the file's own texts of its spans are found at offsets in code units, and not at those in characters."""
    votes: dict[bool, str] = {}
    for record in records:
        if max(record.text, default="") > ASTRAL and any(span.text is not None for span in record.spans):
            characters, units = _reads(record), _reads(_in_characters(record))
            if characters != units:
                votes.setdefault(units, record.where)
    if len(votes) == 2:
        raise DataError(
            f"{votes[True]}: offsets count UTF-16 code units here, but characters at {votes[False]}; a file must use "
            "one of them"
        )
    return True in votes


def _reads(record: Marked) -> bool:
    return all(span.text is None or _alike(record.text[span.start : span.end], span.text) for span in record.spans)


def _alike(piece: str, own: str) -> bool:
    """Whether two texts are the same but for white space, which brat and Label Studio write in their own ways."""
    return piece == own or "".join(piece.replace("\\n", "").split()) == "".join(own.replace("\\n", "").split())


def _in_characters(record: Marked, width: Callable[[str], int] = lambda c: 1 + (c > ASTRAL)) -> Marked:
    """Offsets in UTF-16 code units (or others, `width` of them a character) as offsets in characters; one inside a
    character is put after the text's end."""
    index, unit = {}, 0
    for i, character in enumerate(record.text):
        index[unit] = i
        unit += width(character)
    index[unit] = len(record.text)
    outside = len(record.text) + 1
    spans = [
        span._replace(start=index.get(span.start, outside), end=index.get(span.end, outside)) for span in record.spans
    ]
    return record._replace(spans=spans)


OTHER_OFFSETS: Mapping[str, Callable[[Marked], Marked]] = {
    "offsets count UTF-16 code units (JavaScript, Java)": _in_characters,
    "offsets count bytes of UTF-8": partial(_in_characters, width=lambda c: len(c.encode("utf-8", "surrogatepass"))),
    "line ends count two characters (\\r\\n)": partial(_in_characters, width=lambda c: 1 + (c == "\n")),
    "line ends (\\r\\n) count one character": partial(_in_characters, width=lambda c: int(c != "\r")),
    "ends are those of last characters": lambda record: record._replace(
        spans=[span._replace(end=span.end + 1) for span in record.spans]
    ),
}


def _check(span: Span, text: str) -> None:
    if not 0 <= span.start <= len(text) or span.end > len(text):
        raise DataError(f"{span.where}: {span} is outside the text, which has {len(text)} characters")
    if span.end <= span.start:
        raise DataError(f"{span.where}: {span} is empty; its end is the offset after its last character")
    piece = text[span.start : span.end]
    if span.text is not None and not _alike(piece, span.text):
        own, start = span.text, span.start
        places = [at for at in (text.rfind(own, 0, start + len(own)), text.find(own, start)) if own and at >= 0]
        at = min(places, key=lambda at: abs(at - start), default=None)
        hint = "" if at is None else f"; that is at {at}-{at + len(own)}"
        raise DataError(f"{span.where}: {span} reads {short(piece)}, but should read {short(span.text)}{hint}")


def trim(text: str, start: int, end: int) -> tuple[int, int] | None:
    """A stretch of a text without the white space at its ends; None where there is nothing else."""
    piece = text[start:end]
    start, end = start + len(piece) - len(piece.lstrip()), end - (len(piece) - len(piece.rstrip()))
    return (start, end) if start < end else None


def _without_overlaps(spans: Sequence[Span], overlaps: Overlaps) -> list[Span]:
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    if overlaps == "error":
        for one, other in pairwise(ordered):
            if other.start < one.end:
                raise DataError(
                    f"{other.where}: {one} and {other} overlap, but a word can have only one tag; correct them, or "
                    "keep the longer ones with data.overlaps=longest"
                )
        return ordered
    longest: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start - span.end, span.start)):  # the longest first
        if all(span.end <= other.start or other.end <= span.start for other in longest):
            longest.append(span)
    return sorted(longest)
