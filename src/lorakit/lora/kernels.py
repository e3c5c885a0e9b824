"""Autograd functions that keep less for the backward pass than autograd would: each is here by measurement (benchmarks/)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
