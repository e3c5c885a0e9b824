"""The layer alone: the equation against a dense weight, where it starts, and which rows see which adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.lora import DoRA, LoRA, LoRALinear, Routing, SavedModule
from lorakit.lora.inits import INITS, Factors, named_generator

D_IN, D_OUT, R = 12, 20, 3


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_IN, D_OUT, bias=bias)


def factors(seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(R, D_IN, generator=generator), torch.randn(D_OUT, R, generator=generator))


def layer_of(base: nn.Linear) -> LoRALinear:
    return LoRALinear(base, Routing())


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(7))


def trained(update: LoRA, seed: int = 0) -> LoRA:
    """The update with A and B as training might leave them."""
    A, B = factors(seed)
    update.lora_A.data, update.lora_B.data = A, B
    return update


def started(init: str, scaling: float = 2.0, dora: bool = False, dropout: float = 0.0) -> LoRA:
    weight = linear().weight.detach()
    start = INITS[init](weight, R, scaling, named_generator(0, "layer"))
    return DoRA(start, scaling, dropout, layer_of(linear())) if dora else LoRA(start, scaling, dropout)


def hosted(bias: bool = True, **updates: LoRA) -> LoRALinear:
    host = LoRALinear(linear(bias), Routing())
    for name, update in updates.items():
        host.adapters[name] = update
    host.routing.use(next(iter(updates)))
    return host.eval()


def dense_dora(base: nn.Linear, update: DoRA, scaling: float) -> torch.Tensor:
    """Liu et al. 2024, eq. 5, with the whole matrix written out. Shapes: (d_out, d_in)."""
    direction = base.weight + scaling * update.lora_B @ update.lora_A
    return update.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)


def test_dora_output_equals_a_dense_weight() -> None:
    update = started("kaiming", scaling=0.5, dora=True)
    host = hosted(a=trained(update))
    want = F.linear(rows(4, 5), dense_dora(host.base, update, 0.5), host.base.bias)
    torch.testing.assert_close(host(rows(4, 5)), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_small_change_of_a_nonzero_start_is_not_lost_in_bf16(init: str) -> None:
    """s (B A - B0 A0) x is small beside either product: their difference, taken in bf16, would be noise."""
    update, layer = started(init), layer_of(linear())
    with torch.no_grad():
        update.lora_B.mul_(1.001)
        want = update.product(rows(4), layer)
        have = update.product(rows(4).bfloat16(), layer)
    assert (have - want).norm() < 0.02 * want.norm()


def test_dora_of_a_row_of_zeros_is_finite() -> None:
    base = linear()
    base.weight.data[0] = 0
    start = INITS["kaiming"](base.weight, R, 1.0, named_generator(0, "layer"))
    layer = layer_of(base)
    update = DoRA(start, 1.0, 0.0, layer)
    y = base(rows(4))
    assert torch.equal(update(rows(4), y, layer), y)


def test_dora_norm_is_constant_in_the_backward_pass() -> None:
    """Section 4.3 of the paper: the gradient of B is that of the numerator alone."""
    update = started("kaiming", dora=True)
    base = linear()
    x = rows(4)
    trained(update)(x, base(x), layer_of(base)).sum().backward()
    gain = update.magnitude.detach() / (base.weight + 2.0 * update.lora_B @ update.lora_A).detach().norm(dim=1)
    want = gain[:, None] * 2.0 * F.linear(x, update.lora_A.detach()).sum(0)
    torch.testing.assert_close(update.lora_B.grad, want, rtol=1e-5, atol=1e-5)


def test_pissa_start_is_the_best_low_rank_part_of_the_weight() -> None:
    weight = linear().weight.detach()
    A, B = INITS["pissa"](weight, R, 2.0, named_generator(0, "layer"))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * B @ A, U[:, :R] * S[:R] @ Vh[:R], rtol=0, atol=1e-5)


def test_olora_start_has_orthogonal_columns_and_shares_the_weight_s_first_column() -> None:
    weight = linear().weight.detach()
    A, B = INITS["olora"](weight, R, 2.0, named_generator(0, "layer"))
    torch.testing.assert_close(2.0 * B.T @ B, torch.eye(R), rtol=0, atol=1e-5)
    torch.testing.assert_close((2.0 * B @ A)[:, :R], weight[:, :R], rtol=0, atol=1e-5)


def test_kaiming_start_has_the_distribution_of_torch() -> None:
    """nn.Linear's own start is kaiming-uniform(a = sqrt 5): the same bound, the same spread."""
    wide = torch.empty(1, 4096)
    A, B = INITS["kaiming"](wide, 64, 1.0, named_generator(0, "layer"))
    reference = torch.empty(64, 4096)
    nn.init.kaiming_uniform_(reference, a=5**0.5, generator=torch.Generator().manual_seed(0))
    assert not B.any()
    torch.testing.assert_close(A.std(), reference.std(), rtol=0.02, atol=0)
    torch.testing.assert_close(A.abs().max(), reference.abs().max(), rtol=0.02, atol=0)


def test_dropout_acts_in_training_only() -> None:
    update = trained(started("kaiming", scaling=1.0, dropout=0.5))
    base = linear()
    x, y = rows(4), base(rows(4))
    assert torch.equal(update.eval()(x, y, layer_of(base)), y + F.linear(F.linear(x, update.lora_A), update.lora_B))
    torch.manual_seed(0)
    kept = F.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(update.train()(x, y, layer_of(base)), y + F.linear(F.linear(kept, update.lora_A), update.lora_B))


def test_dora_with_dropout_drops_both_terms_alike() -> None:
    update = trained(started("kaiming", scaling=1.0, dora=True, dropout=0.5)).train()
    base = linear()
    x, y = rows(4), base(rows(4))
    torch.manual_seed(0)
    kept = F.dropout(x, 0.5)
    torch.manual_seed(0)
    want = y + F.linear(kept, dense_dora(base, update, 1.0) - base.weight)
    torch.testing.assert_close(update(x, y, layer_of(base)), want, rtol=0, atol=1e-4)


def test_routing_leaves_rows_of_an_absent_adapter_to_the_base() -> None:
    host = hosted(a=trained(started("kaiming")))
    host.routing.segments = [("elsewhere", 2), ("a", 2)]
    assert torch.equal(host(rows(4))[:2], host.base(rows(4))[:2])


@pytest.mark.parametrize("sizes", [(1, 2), (3, 2)])
def test_routing_of_a_wrong_number_of_rows_raises(sizes: tuple[int, int]) -> None:
    host = hosted(a=trained(started("kaiming")))
    host.routing.segments = [("a", sizes[0]), (None, sizes[1])]
    with pytest.raises(ValueError, match=f"routing covers {sum(sizes)} rows, the batch has 4"):
        host(rows(4))


def test_heads_of_different_widths_share_a_batch_padded_with_zeros() -> None:
    host = SavedModule(nn.Linear(4, 2), Routing())
    for name, width in (("two", 2), ("five", 5)):
        host.adapters[name] = nn.Linear(4, width)
    x = torch.randn(3, 4)
    with host.routing.routed([("two", 1), ("five", 2)]):
        y = host(x)
    torch.testing.assert_close(y[:1, :2], host.adapters["two"](x[:1]))
    torch.testing.assert_close(y[1:], host.adapters["five"](x[1:]))
    assert not y[:1, 2:].any()
