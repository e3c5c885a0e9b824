"""One of the adapters that are trained together, and its part in a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorakit.engine.plan import Plan
from lorakit.engine.ranks import Ranks
from lorakit.engine.runtime import random_state
from lorakit.tasks.base import Item, Task


@dataclass(eq=False)
class Member:
    """An adapter in training: what it learns from, in which order, by which optimizer, and how far it is."""

    task: Task
    items: Sequence[Item]
    optimizer: torch.optim.Optimizer
    plan: Plan
    adapter: str = "default"
    done: int = 0  # steps
    micro_batch_size: int | None = None  # what memory has room for, where that is less than the plan's
    draws: bool = True  # whether its forwards drop anything at random
    random_state: Mapping[str, Tensor] = field(default_factory=lambda: random_state(torch.device("cpu")))
    ended: bool = False
    _batches: Iterator[Sequence[int]] | None = field(default=None, repr=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def rows(self) -> int:
        """Examples per forward."""
        return self.micro_batch_size or self.plan.micro_batch_size

    @property
    def is_alone(self) -> bool:
        """Whether its forwards have no room for others: memory is short, or dropout is to be drawn as in a plain run."""
        return self.draws or self.micro_batch_size is not None or self.plan.config.micro_batch_size is not None

    def turn(self, ranks: Ranks) -> Turn:
        """Its next batch, of which the ranks have a share each."""
        if self._batches is None:
            self._batches = self.plan.batches(self.done)
        positions = next(self._batches)
        shares = ranks.share([self.plan.lengths[i] for i in positions])
        return Turn(self, positions, [positions[i] for i in shares])


@dataclass(frozen=True)
class Turn:
    """A member's part in a step: its batch as positions of items, and this process's share of it."""

    member: Member
    positions: Sequence[int]
    own: Sequence[int]

    @property
    def tokens(self) -> int:
        """Real tokens in this process's share."""
        return sum(self.member.plan.lengths[i] for i in self.own)

    def pieces(self) -> Iterator[list[Item]]:
        """The items of this process, cut into what one forward takes of the member."""
        for j in range(0, len(self.own), self.member.rows):
            yield [self.member.items[i] for i in self.own[j : j + self.member.rows]]
