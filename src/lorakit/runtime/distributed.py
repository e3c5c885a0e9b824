"""Several processes as one run: each computes a share of every step, and all make the same update.

With one process everything here does nothing. Parameters, optimizer and scores are equal on all ranks at any time; only the
first rank writes and reports.
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
TIMEOUT = timedelta(minutes=5)  # for a rank that hangs; one that dies is noticed at once


class Ranks:
    """The processes of the run; this one is number `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    # The two collectives that everything else uses

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, summed over all ranks in place."""
        if self.size > 1:
            with _peers_needed():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in order."""
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
        """Whether the flag is set on any rank."""
        return self.total(int(flag)) > 0

    def first(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function on the first rank only and return its result on all; if it fails, every rank fails."""
        value: Any = None
        with self.together():
            if self.is_first:
                value = function(*args, **kwargs)
        return self.gather(value)[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave this block on every rank or on none: the first rank that fails raises its own error.

        The block itself must not use collectives.

        Raises:
            RankError: on all other ranks.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as err:
            failure = err
        description = None if failure is None else (str(failure), getattr(failure, "exit_code", 1))
        for rank, answer in enumerate(self.gather(description)):
            if answer is not None:
                if failure is not None and rank == self.rank:
                    raise failure
                raise RankError(f"rank {rank}: {answer[0]}", answer[1])

    # Shares

    def share(self, costs: Sequence[int]) -> list[int]:
        """Positions of this rank's share of a sequence, which is divided into consecutive parts of about equal cost.

        Each element belongs to the rank in whose part of the total cost its middle lies, so no rank exceeds its part by
        more than one element; a rank may have none.
        """
        total = sum(costs)
        owners = (
            (2 * end - cost) * self.size // (2 * total) for end, cost in zip(accumulate(costs), costs, strict=True)
        )
        return [i for i, owner in enumerate(owners) if owner == self.rank]

    # Tensors

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients over all ranks in place and return the summed loss, by one all-reduce of a flat buffer.

        A non-finite number on one rank makes the sum non-finite on every rank, so all of them see it.
        """
        if self.size == 1:
            return loss
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has_grad = torch.tensor([float(p.grad is not None) for p in parameters], device=loss.device)
        flat = self.sum_(torch.cat([*(grad.flatten() for grad in grads), has_grad, loss.reshape(1)]))
        *sums, has_grad, loss = flat.split([*(p.numel() for p in parameters), len(parameters), 1])
        for parameter, grad, ranks in zip(parameters, sums, has_grad.tolist(), strict=True):
            # without a gradient there is no weight decay either
            parameter.grad = grad.view_as(parameter) if ranks else None
        return loss[0]

    @torch.no_grad()
    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values to all ranks, in place: another machine's SVD may differ in sign."""
        if self.size > 1:
            for tensor in tensors:
                tensor.copy_(self.sum_(tensor.clone() if self.is_first else torch.zeros_like(tensor)))


ALONE = Ranks()


@contextmanager
def _peers_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:  # raised by torch.distributed when a connection breaks or times out
        reason = first_line(err, "no reason given")
        raise RankLost(f"another process of the run has ended, hangs or cannot be reached: {reason}") from err


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks started by torchrun or Ray, including this process, or only this process.

    Raises:
        RankLost: the others did not connect.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    if dist.is_initialized():  # by whoever started this process, who also ends it
        yield Ranks(rank, size)
        return
    _end_with_parent()
    with _peers_needed():
        device = torch.accelerator.current_accelerator(check_available=True)
        of_device = f",{device.type}:{dist.get_default_backend_for_device(device)}" if device else ""
        dist.init_process_group(f"cpu:gloo{of_device}", timeout=TIMEOUT)
    yield Ranks(rank, size)
    dist.destroy_process_group()  # not after a failure: it could wait for a dead rank


def _end_with_parent() -> None:
    """Send this process SIGTERM when torchrun dies, even by SIGKILL (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
