"""What a decoder may write for one source, as an automaton over tokens made from a format's automaton over texts.

Every output that it lets pass is of the format, has known types and none but the source's words; so nothing is malformed
or invented. Each text is tokenised by itself, which needs a tokenizer whose pieces do not reach across white space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from lorakit.tasks.entity_text import END, START, Node, Way

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class Path(NamedTuple):
    """Tokens still to be written, and the place they lead to."""

    ids: Ids
    target: Node


class Language:
    """What may be written for one source: `ways` gives the texts that lead on from a place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ways: Callable[[Node], Iterable[Way]]) -> None:
        self.ways = ways
        self.eos: int = tokenizer.eos_token_id
        self.ids = chunk_ids(tokenizer)
        self._opened: dict[Node, list[Path]] = {}

    def begin(self) -> set[Path]:
        """Every path from the start."""
        return set(self._paths(START))

    def step(self, paths: Iterable[Path], token: int) -> set[Path]:
        """The paths that remain after a token; none at the end."""
        remaining: set[Path] = set()
        for ids, target in paths:
            if ids[0] == token:
                remaining.update([Path(ids[1:], target)] if len(ids) > 1 else self._paths(target))
        return remaining

    def _paths(self, node: Node) -> list[Path]:
        if node not in self._opened:
            ways = self.ways(node) if node != END else ()
            self._opened[node] = [
                Path(self.ids(text, node == START) if text else (self.eos,), target) for text, target in ways
            ]
        return self._opened[node]


def chunk_ids(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, bool], Ids]:
    """A function that gives the tokens of a text at the start of an output, or behind a space."""

    def ids(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    lead = ids("x")

    @cache
    def chunk(text: str, first: bool) -> Ids:
        return ids(text) if first else ids(f"x {text}")[len(lead) :]

    return chunk


def allowed(paths: Iterable[Path]) -> set[int]:
    """The tokens that may come next."""
    return {path.ids[0] for path in paths}
