"""The best sequence of tags under scores for neighbours, and the rule of IOB2 as such scores.

Shapes: B sentences, W words of the longest, C tags.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


# A linear-chain conditional random field over the words of a sentence.
#
# log p(y | x) = sum_t e_t(y_t) + sum_t A(y_t-1, y_t) - log Z(x) (Lafferty, McCallum & Pereira 2001). e are the model's
# log-probabilities of each word's tags, A is learned and starts at zero, where p is the plain tagger's. Departure from the
# paper: nothing is added at the beginning and at the end, so that a window in the middle of a text is a sentence like others.
#
# Shapes: B sentences, W words of the longest, C tags; transitions (B, C, C) go from row to column; mask (B, W) is True at
# the words, which come before the padding.


CRF = "crf"  # of the module in the model, and so in the adapter's file


class Crf(nn.Module):
    """The table A. Its forward takes one row a sentence, so that adapters can share a batch."""

    def __init__(self, n_tags: int) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(n_tags, n_tags))

    def forward(self, emissions: Tensor) -> Tensor:
        """The transitions that each sentence is under. Shapes: emissions (B, W, C), (B, C, C)."""
        return self.transitions.expand(len(emissions), -1, -1)


def log_likelihood(emissions: Tensor, transitions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """log p of the tags of each sentence; 0 where it has no word. Shapes: emissions (B, W, C), tags (B, W), (B,)."""
    log_p = path_score(emissions, transitions, tags, mask) - log_partition(emissions, transitions, mask)
    return torch.where(mask[:, 0], log_p, 0.0)


def path_score(emissions: Tensor, transitions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """The sum of the emissions and transitions along the tags. Shapes: emissions (B, W, C), tags (B, W), (B,)."""
    rows = torch.arange(len(tags), device=tags.device)[:, None]
    words = emissions.gather(2, tags[..., None])[..., 0]  # (B, W)
    steps = transitions[rows, tags[:, :-1], tags[:, 1:]]  # (B, W - 1)
    return (words * mask).sum(1) + (steps * mask[:, 1:]).sum(1)


def log_partition(emissions: Tensor, transitions: Tensor, mask: Tensor) -> Tensor:
    """log Z, the scores of all paths summed in log space. Shapes: emissions (B, W, C), (B,)."""
    return _forward(emissions, transitions, mask)[:, -1].logsumexp(1)


def marginals(emissions: Tensor, transitions: Tensor, mask: Tensor) -> Tensor:
    """p(y_t | x) of each word by itself, over all paths (the forward-backward algorithm). Shapes: (B, W, C)."""
    after = [torch.zeros_like(emissions[:, 0])]  # (B, C): of all paths from each tag of the word to the end
    for emission, there in zip(
        reversed(emissions[:, 1:].unbind(1)), reversed(mask[:, 1:, None].unbind(1)), strict=True
    ):
        step = (transitions + (emission + after[-1])[:, None, :]).logsumexp(2)
        after.append(torch.where(there, step, after[-1]))
    return (_forward(emissions, transitions, mask) + torch.stack(after[::-1], 1)).softmax(-1)


def _forward(emissions: Tensor, transitions: Tensor, mask: Tensor) -> Tensor:
    """The scores of all paths to each tag of each word; padding repeats the last word's. Shapes: (B, W, C)."""
    alphas = [emissions[:, 0]]
    for emission, there in zip(emissions[:, 1:].unbind(1), mask[:, 1:, None].unbind(1), strict=True):
        step = (alphas[-1][:, :, None] + transitions).logsumexp(1) + emission
        alphas.append(torch.where(there, step, alphas[-1]))
    return torch.stack(alphas, 1)
