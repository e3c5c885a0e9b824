"""Muon: momentum whose direction is made orthogonal, one weight matrix at a time.

It needs far fewer steps than AdamW for the small budget of this model.  ``torch.optim.Muon``
orthogonalises in bf16, which a CPU without bf16 arithmetic does slowly, and one matrix after
the other; here matrices of one shape are stacked and handled together in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration by Keller Jordan, tuned for a steep start.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Push the singular values of a stack of wide matrices towards one."""
    a, b, c = QUINTIC
    result: Tensor = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = result @ result.mT
        result = a * result + (b * square + c * (square @ square)) @ result
    return result


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; the update has about the size of one of Adam's."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix, shape by shape."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                tall = shape[0] > shape[1]
                stack = torch.stack([self._direction(weight, group["momentum"]) for weight in weights])
                updates = orthogonalise(stack.mT).mT if tall else orthogonalise(stack)
                size = 0.2 * max(shape) ** 0.5  # the root mean square of an Adam update
                for weight, update in zip(weights, updates, strict=True):
                    weight.add_(update, alpha=-group["lr"] * size)

    def _direction(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """The gradient looked ahead along the running average."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        state["average"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["average"], momentum)
