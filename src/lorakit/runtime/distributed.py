"""Several processes as one run: each computes a share of every step, and all take the same step.

A plain run is the case of one, for which everything here does nothing. What the ranks must hold in common (parameters,
optimizer, scores) is the same on each of them at any time; the first one alone writes and reports.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.errors import RankError, RankLost, first_line

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
P = ParamSpec("P")
T = TypeVar("T")
TIMEOUT = timedelta(minutes=5)  # how long a rank that hangs is waited for; one that dies is noticed at once


class Ranks:
    """This process among those of the run: number `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    # The two collectives on which all else stands

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over all ranks in place."""
        if self.size > 1:
            with _peers_needed():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in their order."""
        values = [value] * self.size
        if self.size > 1:
            with _peers_needed():
                dist.all_gather_object(values, value)
        return values

    # Values

    def total(self, count: int) -> int:
        """The sum of all ranks' counts."""
        return int(self.sum_(torch.tensor(count)))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.total(int(flag)) > 0

    def first(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function gives on the first rank, which alone calls it; where it fails there, every rank fails."""
        given: Any = None
        with self.together():
            if self.is_first:
                given = function(*args, **kwargs)
        return self.gather(given)[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every rank leaves this block, or none does: the first one that fails raises its own error.

        The block itself must hold no collective.

        Raises:
            RankError: on all ranks but that one.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as err:
            failure = err
        told = None if failure is None else (str(failure), getattr(failure, "exit_code", 1))
        for rank, answer in enumerate(self.gather(told)):
            if answer is not None:
                if failure is not None and rank == self.rank:
                    raise failure
                raise RankError(f"rank {rank}: {answer[0]}", answer[1])

    # Shares

    def share(self, costs: Sequence[int]) -> list[int]:
        """Positions of this rank's share of a row of things, which the ranks cut into pieces of about equal cost.

        Each thing belongs to the rank in whose part of the total cost its middle lies, so no rank has more than its
        part and one thing; a rank may have none.
        """
        total = sum(costs)
        owners = (
            (2 * end - cost) * self.size // (2 * total) for end, cost in zip(accumulate(costs), costs, strict=True)
        )
        return [i for i, owner in enumerate(owners) if owner == self.rank]

    # Tensors

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients over all ranks in place, and give the summed loss: one all-reduce of one flat buffer.

        A number that is not finite on one rank makes the sum so on every rank, so all of them see it.
        """
        if self.size == 1:
            return loss
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has_grad = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
        flat = self.sum_(torch.cat([*(grad.flatten() for grad in grads), has_grad, loss.reshape(1)]))
        *sums, has_grad, loss = flat.split([*(p.numel() for p in parameters), len(parameters), 1])
        for parameter, grad, ranks in zip(parameters, sums, has_grad.tolist(), strict=True):
            parameter.grad = grad.view_as(parameter) if ranks else None  # what no loss reaches is not decayed either
        return loss[0]

    @torch.no_grad()
    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the first one's values, in place: another machine's SVD may have another sign."""
        if self.size > 1:
            for tensor in tensors:
                tensor.copy_(self.sum_(tensor.clone() if self.is_first else torch.zeros_like(tensor)))


ALONE = Ranks()


@contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:  # what torch.distributed raises when a connection breaks or the time is out
        reason = first_line(err, "no reason given")
        raise RankLost(f"another process of the run has ended, hangs or cannot be reached: {reason}") from err


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun or Ray has started, this process among them; alone where it has started none.

    Raises:
        RankLost: the others did not come.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    if dist.is_initialized():  # by whoever has started this process, who ends it as well
        yield Ranks(rank, size)
        return
    _end_with_parent()
    with _peers_needed():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    yield Ranks(rank, size)
    dist.destroy_process_group()  # not after a failure: it could wait for a rank that is gone


def _end_with_parent() -> None:
    """Let torchrun's death, even by SIGKILL, be a SIGTERM to this process (Linux alone can)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
