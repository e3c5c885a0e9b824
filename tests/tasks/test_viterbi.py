"""Viterbi against all sequences of tags, and the rule of IOB2."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from lorakit.data.tags import odd_tags
from lorakit.task_info import tag_names
from lorakit.tasks.tag_decoding import iob2_rule, iob2_start, viterbi

TAGS = tag_names(["LOC", "PER"])
LENGTHS = (1, 2, 4, 3)
C = len(TAGS)


def is_valid(sequence: Sequence[int]) -> bool:
    """As the reader of files sees it, which knows nothing of tables."""
    return not odd_tags([TAGS[i] for i in sequence], "IOB2")


def best_by_hand(emissions: torch.Tensor, transitions: torch.Tensor, constrained: bool) -> tuple[int, ...]:
    """The best of all sequences."""

    def total(sequence: Sequence[int]) -> Any:
        steps = pairwise(sequence)
        return sum(emissions[i, t] for i, t in enumerate(sequence)) + sum(transitions[a, b] for a, b in steps)

    every = product(range(C), repeat=len(emissions))
    return max((s for s in every if not constrained or is_valid(s)), key=total)


def padded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random emissions of sentences of different length, noise in the padding, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    emissions = 3 * torch.randn(len(LENGTHS), max(LENGTHS), C, generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return emissions, mask


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("constrained", [True, False])
def test_viterbi_finds_the_best_of_all_sequences(seed, constrained):
    emissions, mask = padded(seed)
    transitions = torch.randn(len(LENGTHS), C, C, generator=torch.Generator().manual_seed(-seed - 1))
    given, table = emissions.clone(), transitions
    if constrained:
        given[:, 0] += iob2_start(TAGS)
        table = transitions + iob2_rule(TAGS)
    found = viterbi(given, table, mask)
    for row, length in enumerate(LENGTHS):
        wanted = best_by_hand(emissions[row, :length], transitions[row], constrained)
        assert tuple(found[row, :length].tolist()) == wanted


@pytest.mark.parametrize("seed", range(5))
def test_rule_makes_valid_iob2_of_anything_and_leaves_what_is_valid(seed):
    emissions = torch.randn(300, 5, C, generator=torch.Generator().manual_seed(seed))
    argmax = emissions.argmax(-1).tolist()
    begun = torch.cat([emissions[:, :1] + iob2_start(TAGS), emissions[:, 1:]], 1)
    found = viterbi(begun, iob2_rule(TAGS).expand(300, -1, -1), torch.ones(300, 5, dtype=torch.bool)).tolist()
    assert all(map(is_valid, found))
    assert 0 < sum(map(is_valid, argmax)) < len(argmax)
    assert all(best == row for best, row in zip(found, argmax, strict=True) if is_valid(row))


def test_rule_says_what_is_valid():
    pairs = {(i, j): iob2_rule(TAGS)[i, j] == 0 for i, j in product(range(C), repeat=2)}
    starts = [iob2_start(TAGS)[i] == 0 for i in range(C)]
    assert starts == [is_valid([i]) for i in range(C)]
    assert all(allowed == is_valid([i, j]) for (i, j), allowed in pairs.items() if starts[i])
    o, b, inside = (TAGS.index(tag) for tag in ("O", "B-PER", "I-PER"))
    assert [pairs[i, inside] for i in (o, b, inside)] == [False, True, True]


def test_labels_that_are_no_tags_are_not_ruled():
    assert (iob2_rule(["LABEL_0", "LABEL_1"]) == 0).all()
