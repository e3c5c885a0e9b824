"""Greedy decoding that can write nothing but a list of the source's own words with known types, in the source's order.

The language, over tokens, as an automaton: `None`, or mentions joined by the separator; a mention is a run of the source's
words and the ending `: TYPE`; each mention begins behind the one before. So no output is malformed, invents a name or
repeats one for ever. Works for any tokenizer whose pieces do not cross from a word into what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorakit.tasks.entity_list import COLON, NONE, SEPARATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class Node(NamedTuple):
    """A place between tokens: before a mention, behind one of its words, behind its type, or at the end."""

    kind: str  # "start", "mention", "word", "type", "end"
    word: int = 0  # words of the source that lie behind this place


class Path(NamedTuple):
    """Tokens still to be written, and the place they lead to."""

    ids: Ids
    target: Node


class Language:
    """What may be written for one source sentence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, types: Sequence[str], words: Sequence[str]) -> None:
        def ids(text: str) -> Ids:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        lead = ids("x")
        self.eos: int = tokenizer.eos_token_id
        self.none = (*ids(NONE), self.eos)
        self.separator = ids(f"x{SEPARATOR}")[len(lead) :]
        self.endings = [ids(f"x{COLON} {kind}")[len(lead) :] for kind in types]
        self.first = [ids(word) for word in words]
        self.later = [ids(f" {word}") for word in words]

    def paths(self, node: Node) -> Iterable[Path]:
        """The ways on from a place."""
        kind, word = node
        rest = range(word, len(self.first))
        if kind == "start":
            yield Path(self.none, Node("end"))
        if kind in ("start", "mention"):
            yield from (Path(self.first[i], Node("word", i + 1)) for i in rest)
        if kind == "word":
            yield from (Path(ending, Node("type", word)) for ending in self.endings)
            if rest:
                yield Path(self.later[word], Node("word", word + 1))
        if kind == "type":
            yield Path((self.eos,), Node("end"))
            if rest:
                yield Path(self.separator, Node("mention", word))

    def begin(self) -> set[Path]:
        """Every path from the start."""
        return set(self._open([Path((), Node("start"))]))

    def step(self, paths: set[Path], token: int) -> set[Path]:
        """The paths that remain after a token."""
        return set(self._open(Path(path.ids[1:], path.target) for path in paths if path.ids[0] == token))

    def _open(self, paths: Iterable[Path]) -> Iterable[Path]:
        """The paths, finished ones replaced by those that lead on."""
        for path in paths:
            if path.ids:
                yield path
            elif path.target.kind != "end":
                yield from self._open(self.paths(path.target))


class Constraint:
    """A logits processor for one batch: it leaves each row the tokens that its language allows."""

    def __init__(self, languages: Sequence[Language]) -> None:
        self.languages = languages
        self.paths = [language.begin() for language in languages]
        self.started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.started:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                self.paths[row] = self.languages[row].step(self.paths[row], token)
        self.started = True
        kept = torch.full_like(scores, -torch.inf)
        for row, paths in enumerate(self.paths):
            allowed = sorted({path.ids[0] for path in paths}) or [self.languages[row].eos]
            kept[row, allowed] = scores[row, allowed]
        return kept
