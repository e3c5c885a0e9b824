"""Regular expressions out of foreign files, matched in bounded time.

Python's own matcher tries one way after the other: `((a+))+X` or a dozen `.*` in a row keep it busy for ever. Here all
positions that a match may have reached are carried along at once (Thompson 1968, doi:10.1145/363347.363387), as the bits of
an integer: bit i stands for "the first i characters are used up". There is nothing to go back to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 1_024  # characters
MAX_STEPS = 5_000  # parts of the pattern that are looked at for one text, again for each repetition

CATEGORIES = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class Pattern:
    """A regular expression without back references, look-behind and flags; matched as Python matches it.

    Raises:
        re.error: it is not a regular expression, is too long, or uses what is not known here.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_PATTERN:
            raise re.error(f"{len(source)} characters; {MAX_PATTERN} are the most")
        try:
            self.tree = _parser.parse(source)
        except (OverflowError, RecursionError) as err:
            raise re.error(str(err)) from err
        if self.tree.state.flags & ~re.UNICODE:
            raise re.error("flags such as (?i) are not supported")

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches. Raises re.error where that would take too long."""
        match = _Match(text)
        return bool(match.after(self.tree, 1) >> len(text))


class _Match:
    """The walk of one pattern over one text. `starts` and what each method gives are sets of positions, as bits."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0
        self.places: dict[tuple[Any, int], int] = {}  # of each character and set in the pattern, by its id

    def after(self, nodes: Iterable[tuple[Any, Any]], starts: int) -> int:
        """Where a match of `nodes`, one after the other, can end."""
        for kind, value in nodes:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise re.error("takes too many steps to match")
            starts = self._after_one(kind, value, starts)
            if not starts:
                break
        return starts

    def _after_one(self, kind: Any, value: Any, starts: int) -> int:
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            key = (kind, id(value))
            if key not in self.places:
                self.places[key] = _places(self.text, kind, value)
            return (starts & self.places[key]) << 1
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeated(starts, *value)
        if kind is op.BRANCH:
            return functools.reduce(int.__or__, (self.after(branch, starts) for branch in value[1]))
        if kind is op.SUBPATTERN and not (value[1] or value[2]):
            return self.after(value[3], starts)
        if kind is op.AT:
            return starts & _anchored(self.text, value)
        if kind in (op.ASSERT, op.ASSERT_NOT) and value[0] > 0:
            alone = (1 << i for i in range(len(self.text) + 1) if starts >> i & 1)
            return sum(bit for bit in alone if bool(self.after(value[1], bit)) == (kind is op.ASSERT))
        raise re.error(f"{str(kind).lower()} is not supported")

    def _repeated(self, starts: int, least: int, most: int, nodes: Any) -> int:
        longest = len(self.text) + 1  # after so many rounds another one changes nothing
        for _ in range(min(least, longest)):
            starts = self.after(nodes, starts)
        ends = new = starts
        for _ in range(min(most - least, longest)):
            new = self.after(nodes, new) & ~ends
            if not new:
                break
            ends |= new
        return ends


def _places(text: str, kind: Any, value: Any) -> int:
    """The positions whose character is the one, or in the set, that is asked for."""
    letters = _letters(text)
    everywhere = (1 << len(text)) - 1
    if kind is op.LITERAL:
        return letters.get(chr(value), 0)
    if kind is op.NOT_LITERAL:
        return everywhere & ~letters.get(chr(value), 0)
    if kind is op.ANY:
        return everywhere & ~letters.get("\n", 0)
    negated = value[0][0] is op.NEGATE
    found = sum(places for c, places in letters.items() if any(_is_in(c, *item) for item in value[negated:]))
    return everywhere & ~found if negated else found


def _is_in(c: str, kind: Any, value: Any) -> bool:
    """Whether a character is in one item of a set such as [a-z_\\d]."""
    if kind is op.LITERAL:
        return bool(ord(c) == value)
    if kind is op.RANGE:
        return bool(value[0] <= ord(c) <= value[1])
    return bool(CATEGORIES[value](c))


@functools.lru_cache(maxsize=4096)
def _letters(text: str) -> Mapping[str, int]:
    """Each character and the positions where it stands."""
    letters: dict[str, int] = {}
    for i, c in enumerate(text):
        letters[c] = letters.get(c, 0) | 1 << i
    return letters


def _anchored(text: str, anchor: Any) -> int:
    """The positions where ^, $, \\b and the like hold."""
    if anchor in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return 1
    if anchor is op.AT_END_STRING:
        return 1 << len(text)
    if anchor is op.AT_END:
        return 1 << len(text) | (1 << len(text) - 1 if text.endswith("\n") else 0)
    if anchor is not op.AT_BOUNDARY:
        raise re.error(f"{str(anchor).lower()} is not supported")
    words = [False, *(c.isalnum() or c == "_" for c in text), False]
    return sum(1 << i for i in range(len(text) + 1) if words[i] != words[i + 1])
