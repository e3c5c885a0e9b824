"""Weighted sums of adapters, against dense weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import ConfigError
from lorakit.lora import LoraConfig, adapter_parameters, add_adapter, combine, hosts, set_adapter
from lorakit.lora.layer import Layer
from tests.tiny import tiny_batch, tiny_bert

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora dora": {"init_lora_weights": "olora", "use_dora": True},
    "small": {"r": 2, "lora_alpha": 3},
}
CLOSE = {"rtol": 0, "atol": 2e-6}


def with_adapters(**variants: str) -> nn.Module:
    """A tiny BERT with one trained-looking adapter for each name, of the named variant."""
    model = tiny_bert().eval()
    generator = torch.Generator().manual_seed(3)
    for seed, (name, variant) in enumerate(variants.items()):
        settings = {"r": 4, **VARIANTS[variant]}
        config = LoraConfig(target_modules=("query", "dense"), modules_to_save=("classifier",), **settings)
        add_adapter(model, config, name, seed=seed)
        for parameter in adapter_parameters(model, name).values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def answers(model: nn.Module) -> torch.Tensor:
    return model(**tiny_batch(model)).logits


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {path: h.lora(name).delta_weight(h).detach() for path, h in hosts(model, name) if isinstance(h, Layer)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_combination_of_one_equals_it(variant: str) -> None:
    model = with_adapters(a=variant)
    before = answers(model)
    combine(model, ["a"], [1.0], "b")
    torch.testing.assert_close(answers(model), before, **CLOSE)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, -0.4), (1.0, 1.0)])
@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize("first", ["plain", "dora", "rslora"])
def test_sum_equals_the_dense_sum(first: str, second: str, weights: tuple[float, float]) -> None:
    model = with_adapters(a=first, b=second)
    a, b = deltas(model, "a"), deltas(model, "b")
    made = combine(model, ["a", "b"], weights, "c")
    assert not any(made.errors.values())
    for path, delta in deltas(model, "c").items():
        torch.testing.assert_close(delta, weights[0] * a[path] + weights[1] * b[path], rtol=0, atol=1e-5)


def test_heads_are_summed_as_differences_from_the_base() -> None:
    model = with_adapters(a="plain", b="dora")
    combine(model, ["a", "b"], [0.7, 0.2], "c")
    host = model.classifier
    parts = {name: host.adapters[name].weight for name in "abc"}
    base = host.base.weight
    torch.testing.assert_close(parts["c"], base + 0.7 * (parts["a"] - base) + 0.2 * (parts["b"] - base))


def test_same_adapter_twice_adds_its_weights() -> None:
    model = with_adapters(a="plain")
    combine(model, ["a", "a"], [0.25, 0.75], "b")
    assert combine(model, ["a"], [1.0], "c").r == len(next(h.lora("b").lora_A for _, h in hosts(model, "b")))
    set_adapter(model, "a")
    before = answers(model)
    set_adapter(model, "b")
    torch.testing.assert_close(answers(model), before, **CLOSE)


def test_cut_rank_is_the_best_one_and_its_error_is_told() -> None:
    model = with_adapters(a="plain", b="rslora")
    a, b = deltas(model, "a"), deltas(model, "b")
    made = combine(model, ["a", "b"], [1.0, 1.0], "c", r=3)
    assert made.r == 3
    for path, delta in deltas(model, "c").items():
        exact = a[path] + b[path]
        U, S, Vh = torch.linalg.svd(exact)
        torch.testing.assert_close(delta, U[:, :3] * S[:3] @ Vh[:3], rtol=0, atol=1e-5)
        assert made.errors[path] == pytest.approx(float(S[3:].norm() / S.norm()), abs=1e-5)


def test_gradients_reach_the_combined_adapter() -> None:
    model = with_adapters(a="plain", b="dora")
    combine(model, ["a", "b"], [0.5, 0.5], "c")
    answers(model).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "c").values())
    assert all(p.grad is None for p in adapter_parameters(model, "a").values())


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "numbers differ": ((["a", "b"], [1.0], "c"), "2 adapters but 1 weights"),
    "no adapter": (([], [], "c"), "0 adapters"),
    "not finite": ((["a"], [float("nan")], "c"), "weight of 'a' is nan"),
    "name taken": ((["a"], [1.0], "b"), "'b' is there already"),
    "gain turned": ((["b"], [-50.0], "c"), "DoRA magnitude"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_combination_changes_nothing(call: tuple[Any, ...], message: str) -> None:
    model = with_adapters(a="plain", b="dora")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        combine(model, *call)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_heads_of_other_shapes_are_refused() -> None:
    model = with_adapters(a="plain", b="plain")
    model.classifier.adapters["b"] = nn.Linear(model.classifier.base.in_features, 7)
    with pytest.raises(ConfigError, match="another shape"):
        combine(model, ["a", "b"], [0.5, 0.5], "c")
