"""The best sequence of tags under scores for neighbours, and the rule of IOB2 as such scores.

Shapes: B sentences, W words of the longest, C tags.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.data.tags import OUTSIDE, split_tag


def iob2_rule(tags: Sequence[str]) -> Tensor:
    """0 where the tag of the column may follow that of the row, else -inf: I-X follows B-X and I-X alone.

    Shapes: (C, C). What may begin a sentence is what may follow O.
    """
    table = torch.zeros(len(tags), len(tags))
    for j, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        if prefix == "I":
            for i, before in enumerate(tags):
                if split_tag(before)[1] != kind:
                    table[i, j] = -torch.inf
    return table


def iob2_start(tags: Sequence[str]) -> Tensor:
    """0 where a sentence may begin with the tag, else -inf. Shapes: (C,)."""
    return iob2_rule((*tags, OUTSIDE))[-1, :-1]


def viterbi(emissions: Tensor, transitions: Tensor, mask: Tensor) -> Tensor:
    """The tags whose emissions and transitions have the largest sum (Viterbi 1967), all sentences at once.

    Shapes: emissions (B, W, C); transitions (B, C, C) from row to column; mask (B, W), True at the words, which come
    before the padding; tags (B, W), where padding repeats the last word's.
    """
    best = emissions[:, 0]  # (B, C): of all paths to each tag of the word
    same = torch.arange(emissions.shape[-1], device=emissions.device)
    pointers = []  # (B, C): the tag before, at each word but the first
    for emission, there in zip(emissions[:, 1:].unbind(1), mask[:, 1:, None].unbind(1), strict=True):
        score, pointer = (best[:, :, None] + transitions).max(1)
        best = torch.where(there, score + emission, best)
        pointers.append(torch.where(there, pointer, same))
    path = [best.argmax(-1, keepdim=True)]  # (B, 1), from the last word to the first
    for pointer in reversed(pointers):
        path.append(pointer.gather(1, path[-1]))
    return torch.cat(path[::-1], 1)
