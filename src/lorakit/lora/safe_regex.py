"""Regular expressions from downloaded files, matched in bounded time.

Python's own matcher backtracks: `((a+))+X` or a dozen `.*` in a row take exponential time. Here all positions that a match
may have reached are tracked together (Thompson 1968, doi:10.1145/363347.363387), without backtracking. Single characters,
sets and anchors are matched by `re`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

MAX_PATTERN = 1_024  # characters
MAX_STEPS = 100_000  # positions per text
TOKEN = re.compile(
    r"\\(?:x..|u.{4}|U.{8}|N\{.*?\}|0[0-7]{,2}|.)"  # a character by number or name, \d and the like
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a set
    r"|\((?:\?(?:[:=!]|P<\w+>))?"  # the beginning of a group
    r"|[*+?]\??|\{(?:\d+|\d*,\d*)\}\??"  # how often
    r"|\w+(?![*+?{])|.",
    re.DOTALL,
)


class Part(NamedTuple):
    """A part of a pattern, and how often it may repeat."""

    token: str  # as in the pattern; for a group its beginning
    one: re.Pattern[str] | None  # characters, a set or an anchor
    group: Sequence[Sequence[Part]]  # or the alternatives in a group
    least: int
    most: int


class Pattern:
    """A regular expression without back references, look-behind and flags; with Python's meaning.

    Raises:
        re.error: it is not a regular expression, is too long, or uses an unsupported feature.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_PATTERN:
            raise re.error(f"{len(source)} characters; {MAX_PATTERN} are the most")
        try:
            re.compile(source)  # raises if it is wrong
            self.alternatives = _parse(TOKEN.findall(source)[::-1])
        except (OverflowError, RecursionError) as err:
            raise re.error(str(err)) from err

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches. Raises re.error if that takes too long."""
        return len(text) in _Match(text).ends(self.alternatives, {0})


def _parse(tokens: list[str]) -> Sequence[Sequence[Part]]:
    """The alternatives up to the end of a group or of the pattern; `tokens`, the first one last, are consumed."""
    alternatives: list[list[Part]] = [[]]
    while tokens and tokens[-1] != ")":
        token = tokens.pop()
        if token == "|":
            alternatives.append([])
            continue
        if token[0] in "*+?":
            raise re.error("flags, look-behind and possessive repeats are not supported")
        one, group = (None, _parse(tokens)) if token[0] == "(" else (re.compile(token), ())  # refuses back references
        if token[0] == "(":
            tokens.pop()  # its end
        least, most = 1, 1
        if tokens and (how_often := re.fullmatch(r"([*+?])\??|\{(\d*)(,?)(\d*)\}\??", tokens[-1])):
            tokens.pop()
            sign, low, comma, high = how_often.groups()
            least = int(sign == "+") if sign else int(low or 0)
            most = 1 if sign == "?" else int(high or (sys.maxsize if sign or comma else low))
        alternatives[-1].append(Part(token, one, group, least, most))
    return alternatives


class _Match:
    """Matching one pattern against one text. `starts` and the results are positions between characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0

    def ends(self, alternatives: Sequence[Sequence[Part]], starts: set[int]) -> set[int]:
        """The possible ends of a match of one of the alternatives."""
        positions: set[int] = set()
        for parts in alternatives:
            here = starts
            for part in parts:
                here = self._after(part, here)
            positions |= here
        return positions

    def _after(self, part: Part, starts: set[int]) -> set[int]:
        """The possible ends of a match of the part with its repeats."""
        rounds = len(self.text) + 1  # more repeats cannot add positions
        for _ in range(min(part.least, rounds)):
            starts = self._once(part, starts)
        ends, new = set(starts), starts
        for _ in range(min(part.most - part.least, rounds)):
            new = self._once(part, new) - ends
            ends |= new
            if not new:
                break
        return ends

    def _once(self, part: Part, starts: set[int]) -> set[int]:
        self.steps += len(starts)
        if self.steps > MAX_STEPS:
            raise re.error("takes too many steps to match")
        if part.one:
            match = part.one.match
            return {hit.end() for i in starts if (hit := match(self.text, i))}
        if part.token in ("(?=", "(?!"):
            return {i for i in starts if bool(self.ends(part.group, {i})) == (part.token == "(?=")}
        return self.ends(part.group, starts) if starts else starts
