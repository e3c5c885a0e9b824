"""Autograd functions that compute or save less than plain autograd; each justified by measurement (benchmarks/)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Frozen = tuple[Tensor, Tensor | None]  # a weight and a bias


class Rescale(torch.autograd.Function):
    """The computation of `rescale`, whose backward pass recovers y - b from the output as (output - b) / gain."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, bias: Tensor, again: Callable[[], Tensor]) -> Tensor:
        answer = torch.lerp(y, bias.to(y.dtype), (1 - gain).to(y.dtype))
        ctx.save_for_backward(answer)
        ctx.gain, ctx.bias, ctx.again = gain, bias, again
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gain, divisor = ctx.gain, ctx.gain
        try:
            (y,) = ctx.saved_tensors
            ctx.again = None  # and everything it refers to
        except RuntimeError:  # the output was changed in place, or the graph was freed
            if ctx.again is None:
                raise
            y, divisor = ctx.again(), torch.ones_like(gain)
        by_y = torch.addcmul(grad, grad, (gain - 1).to(grad.dtype))
        total, weighted = (
            rows.flatten(0, -2).sum(0, dtype=gain.dtype)  # (d_out,)
            for rows in (grad, grad * y)
        )
        usable = divisor.abs() > torch.finfo(grad.dtype).eps ** 0.5
        by_gain = torch.where(usable, (weighted - ctx.bias * total) / divisor, 0)
        return by_y, by_gain, None, None


def rescale(y: Tensor, gain: Tensor, bias: Tensor | None, again: Callable[[], Tensor]) -> Tensor:
    """b + gain (y - b): scale each row of W in the output y = W x + b of a linear layer.

    The gradient of the gain needs y. Autograd would save it, which doubles the activations of LoRA over all linear layers.
    The output is mostly saved anyway by the next operation (attention saves q, k and v, GELU its input), so saving the
    output costs nothing. Three limits: the bias gets no gradient (it is frozen); a gain so near 0 that the division gives
    noise gets the gradient 0; and if the output is changed in place, as in DeBERTa and Longformer, the backward pass
    computes y again by `again`.

    Shapes: y and the result of `again` (B, ..., d_out); gain and bias (d_out,).
    """
    answer: Tensor = Rescale.apply(y, gain, torch.zeros_like(gain) if bias is None else bias, again)
    return answer


class Update(NamedTuple):
    """The update of `n` consecutive examples of a batch: s B A x, or none if A is None."""

    n: int
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0


class Group(NamedTuple):
    """Consecutive updates with equal rank, scaling and number of rows, computed by one batched product."""

    start: int  # the first row
    updates: int
    rows: int  # of each
    scaling: float

    def of(self, rows: Tensor) -> Tensor:
        """Their part of all rows. Shapes: (N, d) to (updates, rows, d)."""
        return rows[self.start : self.start + self.updates * self.rows].view(self.updates, self.rows, rows.shape[-1])


class AdaptedLinear(torch.autograd.Function):
    """The computation of `adapted_linear`. Of its two large arrays, x and y, one is saved and each is written once.

    The narrow products are arranged to have r rows, not r columns: CPUs compute those 1.2 to 8 times as fast.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, frozen: Frozen, groups: Sequence[Group], *factors: Tensor) -> Tensor:
        weight, bias = frozen
        y = F.linear(rows, weight, bias)
        arrays: list[Tensor] = []
        rest = iter(factors)
        for group in groups:
            own = list(islice(rest, 2 * group.updates))
            A, B = (torch.stack(own[i::2]).to(rows.dtype) for i in (0, 1))  # (updates, r, d_in), (updates, d_out, r)
            inner = torch.bmm(A, group.of(rows).mT).mul_(group.scaling)  # (updates, r, rows)
            group.of(y).baddbmm_(inner.mT, B.mT)
            arrays += [inner, A, B]
        trains_A = any(ctx.needs_input_grad[3::2])
        ctx.save_for_backward(rows if trains_A else None, weight, *arrays)
        ctx.groups, ctx.dtypes = groups, [factor.dtype for factor in factors]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *arrays = ctx.saved_tensors
        by_x = grad @ weight if ctx.needs_input_grad[0] else None
        by_factors: list[Tensor] = []
        for group, inner, A, B in zip(ctx.groups, arrays[::3], arrays[1::3], arrays[2::3], strict=True):
            by_y = group.of(grad)
            by_inner = torch.bmm(B.mT, by_y.mT).mul_(group.scaling)  # (updates, r, rows)
            if by_x is not None:
                group.of(by_x).baddbmm_(by_inner.mT, A)
            by_A = A if rows is None else torch.bmm(by_inner, group.of(rows))  # A is a placeholder, not used
            by_B = torch.bmm(inner, by_y).mT
            by_factors += chain.from_iterable(zip(by_A, by_B, strict=True))
        typed = [
            by.to(dtype) if needed else None
            for by, dtype, needed in zip(by_factors, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        ]
        return (by_x, None, None, *typed)


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """W x + b + s B A x, with W and b frozen, and A, B and s of each example's own update.

    Plain autograd saves and scales the product B A x, which is as large as y, adds it to y, and adds the two gradients of x.
    Here the second product is accumulated in place into the first, forward and backward, and s scales arrays of width r, so
    only the matrix products read or write x and y. The updates apply to consecutive examples.

    Shapes: x (examples, ..., d_in); weight (d_out, d_in), bias (d_out,), in the dtype of x; A (r, d_in), B (d_out, r) in fp32.
    """
    width = math.prod(x.shape[1:-1])  # rows of an example
    groups: list[Group] = []
    start, before = 0, Update(0)
    for update in updates:
        rows = update.n * width
        if update.A is not None:  # consecutive updates that are alike are computed by one product
            alike = before.A is not None and before.A.shape == update.A.shape and before.scaling == update.scaling
            if alike and before.n == update.n:
                groups[-1] = groups[-1]._replace(updates=groups[-1].updates + 1)
            else:
                groups.append(Group(start, 1, rows, update.scaling))
        start, before = start + rows, update
    factors = chain.from_iterable((update.A, update.B) for update in updates if update.A is not None)
    # reshaped here, since a view created inside cannot be changed in place afterwards
    y: Tensor = AdaptedLinear.apply(x.reshape(-1, x.shape[-1]), (weight, bias), groups, *factors)
    return y.view(*x.shape[:-1], -1)
