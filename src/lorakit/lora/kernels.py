"""Autograd functions that do less, or keep less, than autograd would: each is here by measurement (benchmarks/)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Frozen = tuple[Tensor, Tensor | None]  # a weight and a bias


class Rescale(torch.autograd.Function):
    """The computation of `rescale`, whose backward pass takes y - b from the answer as (answer - b) / gain."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        answer = torch.lerp(y, bias.to(y.dtype), (1 - gain).to(y.dtype))
        ctx.save_for_backward(answer, gain, bias)
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        answer, gain, bias = ctx.saved_tensors
        by_y = torch.addcmul(grad, grad, (gain - 1).to(grad.dtype))
        total, weighted = (
            rows.flatten(0, -2).sum(0, dtype=gain.dtype)  # (d_out,)
            for rows in (grad, grad * answer)
        )
        usable = gain.abs() > torch.finfo(grad.dtype).eps ** 0.5
        by_gain = torch.where(usable, (weighted - bias * total) / gain, 0)
        return by_y, by_gain, None


def rescale(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """b + gain (y - b): each row of W in the answer y = W x + b of a linear layer times a gain of its own.

    The gradient of the gain needs y, which nothing else keeps: autograd would keep it, at twice the activations of plain
    LoRA over all linear layers. The answer is kept mostly anyway, by what takes it next (attention its q, k and v, GELU its
    input), so that keeping the answer costs nothing. Three prices: the bias gets no gradient (it is frozen); a gain so near
    to 0 that the division gives noise gets the gradient 0; and who changes the answer in place is stopped by autograd.

    Shapes: y (B, ..., d_out); gain and bias (d_out,).
    """
    answer: Tensor = Rescale.apply(y, gain, torch.zeros_like(gain) if bias is None else bias)
    return answer


class AdaptedLinear(torch.autograd.Function):
    """The computation of `adapted_linear`. Of its two large arrays, x and y, one is kept and each is written once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        rows, (weight, bias), dtype = x.reshape(-1, x.shape[-1]), frozen, A.dtype
        A, B = A.to(x.dtype), B.to(x.dtype)
        inner = rows @ A.T  # (N, r)
        y = F.linear(rows, weight, bias).addmm_(inner, B.T, alpha=scaling)
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, inner, weight, A, B)
        ctx.scaling, ctx.shape, ctx.dtype = scaling, x.shape, dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, A, B = ctx.saved_tensors
        by_x, _, by_A, by_B, _ = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        by_inner = (grad @ B).mul_(ctx.scaling)  # (N, r)
        return (
            (grad @ weight).addmm_(by_inner, A).view(ctx.shape) if by_x else None,
            None,
            (by_inner.T @ rows).to(ctx.dtype) if by_A else None,
            (grad.T @ inner).mul_(ctx.scaling).to(ctx.dtype) if by_B else None,
            None,
        )


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W x + b + s B A x, with W and b frozen: no pass over x or y but the matrix products themselves.

    Autograd's own way keeps and scales the product B A x, which is as large as y, adds it to y, and adds the two gradients
    of x. Here the second product is added in place to the first, both ways, and s meets arrays of width r alone.

    Shapes: x (..., d_in); weight (d_out, d_in), bias (d_out,), in the dtype of x; A (r, d_in) and B (d_out, r) in fp32.
    """
    y: Tensor = AdaptedLinear.apply(x, (weight, bias), A, B, scaling)
    return y
