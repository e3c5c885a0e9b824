"""Autograd functions of our own: the same gradients as autograd's from the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.lora.fused_linear import rescale


def not_needed() -> Tensor:
    raise AssertionError("computed once more, though the answer is there")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y, gain, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 5), (5,), (5,)))
    return y.to(dtype).requires_grad_(), (1 + 0.1 * gain).to(dtype).requires_grad_(), bias.to(dtype)


def changed_in_place(answer: Tensor) -> Tensor:
    answer += 1
    answer /= 2
    return answer


@pytest.mark.parametrize("with_bias", [True, False])
def test_rescale_has_the_gradients_of_finite_differences(with_bias: bool) -> None:
    y, gain, bias = inputs()
    for after in (lambda answer: answer, changed_in_place):
        assert torch.autograd.gradcheck(
            lambda y, gain: after(rescale(y, gain, bias if with_bias else None, lambda: y.detach())),  # noqa: B023
            (y, gain),
        )


def test_rescale_by_one_is_exact() -> None:
    y, gain, bias = inputs(torch.float32)
    assert torch.equal(rescale(y, torch.ones_like(gain), bias, not_needed), y)


def test_gain_of_zero_gets_a_finite_gradient() -> None:
    y, _, bias = inputs()
    gain = torch.tensor([0.0, 1e-12, 1.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    rescale(y, gain, bias, not_needed).square().sum().backward()
    assert gain.grad is not None
    assert gain.grad[:2].tolist() == [0, 0]
    assert (gain.grad[2:] != 0).all()


def test_what_is_kept_for_the_backward_pass_is_the_answer() -> None:
    kept: list[Tensor] = []
    y, gain, bias = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        answer = rescale(y, gain, bias, not_needed)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() > 5] == [answer.data_ptr()]
