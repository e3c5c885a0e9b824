"""How the differences that several adapters make to one tensor become one difference. A method is one line in METHODS.

A method prunes each difference by itself and then adds the pruned ones up. It knows tensors alone, not what they belong to.
Shapes: difference (...), K adapters, weighted differences (K, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Pruning: (difference, density, generator) -> the difference with some entries set to 0. Density: the share kept, in (0, 1].


def keep(difference: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """All of it."""
    return difference


def trim(difference: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The largest entries by magnitude (TIES: Yadav et al. 2023, arXiv:2306.01708, algorithm 1, step 1).

    Departure: the paper ranks the entries of all layers together, this one tensor at a time, as peft does.
    """
    size = difference.abs().flatten()
    kept = math.ceil(density * len(size))
    return difference * (difference.abs() >= size.kthvalue(len(size) - kept + 1).values)


def drop(difference: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Entries drawn at random, divided by the density so that the mean over draws is the whole difference.

    DARE: Yu et al. 2023, arXiv:2311.03099, eq. 1, with drop rate p = 1 - density.
    """
    drawn = torch.rand(difference.shape, generator=generator) < density  # on the CPU: the same seed, the same draw
    return difference * drawn.to(difference.device) / density


# Merging: weighted differences (K, ...) -> one


def add(differences: Tensor) -> Tensor:
    """Their sum (task arithmetic: Ilharco et al. 2022, arXiv:2212.04089)."""
    return differences.sum(0)


def elect(differences: Tensor) -> Tensor:
    """The mean of those that have the sign of the sum, entry by entry (TIES, algorithm 1, steps 2 and 3).

    With one weight for all, this is the paper's lambda times its merged vector. Departures for weights that differ: they
    count in the election too (peft elects before it weighs, so that a negative weight votes the wrong way).
    """
    agree = differences.sign() == differences.sum(0).sign()
    return (differences * agree).sum(0) / agree.sum(0).clamp_min(1)


Prune = Callable[[Tensor, float, torch.Generator], Tensor]
Merge = Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """One way to combine: what is left of each difference, and how the weighted ones become one."""

    prune: Prune
    merge: Merge


METHODS: Mapping[str, Method] = {
    "linear": Method(keep, add),
    "magnitude_prune": Method(trim, add),
    "ties": Method(trim, elect),
    "dare": Method(drop, add),
    "dare_ties": Method(drop, elect),
}
