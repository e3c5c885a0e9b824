"""Autograd functions of our own: the same gradients as autograd's from the plain formula."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from lorakit.lora.fused_linear import Update, adapted_linear, rescale


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


def test_adapted_linear_is_differentiated_right() -> None:
    generator = torch.Generator().manual_seed(0)
    x, W, b, A, B = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for tensor in (x, A, B):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, A, B: adapted_linear(x, W, b, [Update(len(x), A, B, 0.7)]), (x, A, B))
    torch.testing.assert_close(adapted_linear(x, W, b, [Update(len(x), A, B, 0.7)]), x @ (W + 0.7 * B @ A).T + b)


def test_updates_of_neighbours_are_differentiated_right() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    x, W = draw(8, 3, 5), draw(4, 5)
    sizes, ranks, scalings = (2, 2, 1, 2, 1), (2, 2, 2, 3, None), (0.7, 0.7, 0.7, 0.5, 1.0)  # alike are the first two
    factors = [draw(shape) for r in ranks if r for shape in ((r, 5), (4, r))]

    def updates(factors: Sequence[Tensor]) -> list[Update]:
        pairs = [*zip(factors[::2], factors[1::2], strict=True), (None, None)]
        return [Update(n, A, B, s) for n, (A, B), s in zip(sizes, pairs, scalings, strict=True)]

    inputs = [tensor.requires_grad_() for tensor in (x, *factors)]
    assert torch.autograd.gradcheck(lambda x, *factors: adapted_linear(x, W, None, updates(factors)), inputs)
    rows = x.split(sizes)
    dense = [W if A is None else W + s * B @ A for _, A, B, s in updates(factors)]
    wanted = torch.cat([part @ weight.T for part, weight in zip(rows, dense, strict=True)])
    torch.testing.assert_close(adapted_linear(x, W, None, updates(factors)), wanted)


def test_nothing_is_kept_for_factors_that_are_not_trained() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    A, B = torch.randn(2, 5), torch.randn(4, 2, requires_grad=True)
    y = adapted_linear(x, torch.randn(4, 5), None, [Update(len(x), A, B)])
    function = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert [saved.shape for saved in function.saved_tensors if saved is not None] != []  # type: ignore[union-attr]
    assert not any(saved is not None and saved.shape == x.shape for saved in function.saved_tensors)  # type: ignore[union-attr]
