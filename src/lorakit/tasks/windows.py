"""A text longer than the model's limit as overlapping windows, each word answered where it has most context."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """The sub-words [start, end) that the model reads at once, and the words [first, last) that it answers for."""

    start: int
    end: int
    first: int
    last: int


def windows(words: Sequence[tuple[int, int]], length: int, size: int, overlap: int) -> list[Window]:
    """Windows over a text of `length` sub-words; each word belongs to exactly one, which holds its first sub-word.

    `words` has the sub-words [start, end) of each word, in order; a word without a sub-word has start == end.
    All windows of a text have `size` sub-words, so the last one may overlap the one before by more than `overlap`.
    Where two windows hold a word, it goes to the one whose middle is nearer (to the earlier of two as near): that one
    has more text on the word's shorter side. What lies beyond the text's ends is nobody's context.
    """
    starts = [*range(0, max(length - size, 0), size - overlap), max(length - size, 0)]
    ends = [min(start + size, length) for start in starts]
    owners: list[int] = []
    for begin, stop in words:
        owner = owners[-1] if owners else 0
        while owner + 1 < len(starts) and _is_nearer(begin, stop, starts[owner + 1], ends[owner]):
            owner += 1
        owners.append(owner)
    found: list[Window] = []
    first = 0
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        last = bisect_right(owners, number)
        if last > first or not words:
            found.append(Window(start, end, first, last))
        first = last
    return found


def _is_nearer(begin: int, stop: int, start: int, end: int) -> bool:
    """Whether a word's middle is beyond that of the overlap [start, end), and its first sub-word not before it."""
    return begin >= start and begin + stop > start + end
