"""Texts with character spans, drawn by hypothesis, and what a reader found, in the same form."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from hypothesis import strategies as st

from lorakit.data.example import Example
from lorakit.data.spans import ENOUGH
from lorakit.data.tags import entities


def refusal(where: object, message: str) -> str:
    """The pattern of an error that begins with this place and says this."""
    return "^" + re.escape(f"{where}: {message}")


TYPES = ("PER", "creative-work", "O")
# quotes, line ends, separators, an emoji of two code units, one of three characters, a combining accent, an Indic vowel
ODD = [
    '"',
    "'",
    "\\",
    "\n",
    "\r",
    "\t",
    " ",
    "\u2028",
    "\x85",
    "\u00a0",
    "😀",
    "\u200d",
    "e\u0301",
    "हि",
    "\ufeff",
    "{",
    "]",
]
PIECES = st.one_of(st.sampled_from(["a", "B", "1", ".", ",", "-", "Peter", "U.S", *ODD]), st.characters(codec="utf-8"))
TEXTS = st.lists(PIECES, min_size=1, max_size=12).map("".join).filter(lambda text: text.strip() and "\0" not in text)


class Document(NamedTuple):
    """A text and its spans (start, end, type), in order and without overlaps or white space at their ends."""

    text: str
    spans: tuple[tuple[int, int, str], ...]


@st.composite
def documents(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> Document:
    text = draw(texts)
    borders = draw(st.lists(st.integers(0, len(text)), unique=True, max_size=6).map(sorted))
    stretches = [(start, end) for start, end in zip(borders[::2], borders[1::2], strict=False)]
    if draw(st.booleans()):  # neighbours that touch
        stretches = list(itertools.pairwise(borders))
    clean = [(start, end) for start, end in stretches if text[start:end].strip() == text[start:end]]
    return Document(text, tuple((start, end, draw(st.sampled_from(TYPES))) for start, end in clean))


# of ENOUGH spans most must not begin or end inside a word; those of the anchor and of no text count too
FILES = st.lists(documents(), min_size=1, max_size=4).filter(lambda file: sum(len(d.spans) for d in file) < ENOUGH - 2)
# so that a file holds a span, from which the column of spans is told, and offsets differ by how they are counted
ANCHOR = Document("😀 Peter spoke", ((2, 7, "PER"),))


def found(example: Example) -> Document:
    """What a reader made of a document."""
    spans = [(example.offsets[e.start][0], example.offsets[e.end - 1][1], e.type) for e in entities(example.tags)]
    assert example.words == tuple(example.text[start:end] for start, end in example.offsets)
    return Document(example.text, tuple(spans))


def code_units(text: str, offset: int) -> int:
    """An offset as JavaScript counts it."""
    return len(text[:offset].encode("utf-16-le", "surrogatepass")) // 2
