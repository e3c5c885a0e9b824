"""Merging: the merged model answers as the adapted one, is a plain model, and can be taken back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.errors import AdapterError
from lorakit.lora import LoraConfig, LoRALinear, add_adapter, hosts, merge, merge_and_unload, unmerge
from tests.lora.oracle import assert_same_tensors, assert_unchanged, fill, snapshot
from tests.tiny import logits, tiny_batch, tiny_bert

VARIANTS = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "patterns": {"rank_pattern": {"query|q": 2}, "alpha_pattern": {"value|v": 3}},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def adapted(build: Callable[[], PreTrainedModel] = tiny_bert, **settings: object) -> PreTrainedModel:
    model = build()
    saved = ("classifier",) if hasattr(model, "classifier") else ()
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 4, "modules_to_save": saved, **settings}))
    return fill(model)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: host for path, host in hosts(model) if isinstance(host, LoRALinear)}


@variants
def test_unmerge_restores_a_bf16_base_bit_for_bit(settings: dict[str, Any]) -> None:
    model = tiny_bert().bfloat16()
    add_adapter(model, LoraConfig(r=4, modules_to_save=("classifier",), **settings))
    fill(model)
    before = snapshot(model)
    answer = logits(model, tiny_batch(model))
    merge(model)
    assert not torch.equal(model.state_dict()[_first_weight(model)], before["tensors"][_first_weight(model)])
    unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, tiny_batch(model)), answer)


def _first_weight(model: nn.Module) -> str:
    return f"{next(iter(lora_layers(model)))}.base.weight"


def test_merged_state_has_no_second_copy_of_the_weights() -> None:
    model = adapted()
    keys = model.state_dict().keys()
    merge(model)
    assert model.state_dict().keys() == keys


def test_unmerge_of_an_unmerged_model_does_nothing() -> None:
    model = adapted()
    before = snapshot(model)
    unmerge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["default", "other"])
def test_merging_twice_is_refused(name: str) -> None:
    model = adapted()
    add_adapter(model, LoraConfig(r=2), "other")
    fill(model, "other")
    merge(model)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="adapter 'default' is merged already; unmerge it first"):
        merge(model, name)
    assert_unchanged(model, before)
    assert {host.merged for _, host in hosts(model)} == {"default"}


@pytest.mark.parametrize(
    ("path", "value"), [("lora_A", math.nan), ("lora_B", math.inf), ("magnitude", math.nan), ("classifier", math.inf)]
)
def test_adapter_that_is_not_finite_is_refused(path: str, value: float) -> None:
    model = adapted(use_dora=path == "magnitude")
    broken = [p for name, p in model.named_parameters() if p.requires_grad and path in name][-1]
    broken.data.view(-1)[0] = value
    answer = logits(model, tiny_batch(model))
    before = {k: v for k, v in snapshot(model)["tensors"].items() if v.isfinite().all()}
    with pytest.raises(AdapterError, match="adapter 'default' would make non-finite weights; it is not merged"):
        merge(model)
    assert {host.merged for _, host in hosts(model)} == {None}
    assert_same_tensors({k: v for k, v in model.state_dict().items() if k in before}, before)
    assert torch.equal(logits(model, tiny_batch(model)).isnan(), answer.isnan())


def test_merge_that_overflows_the_base_dtype_is_refused() -> None:
    layers = nn.Sequential(nn.Linear(4, 4)).half()
    add_adapter(layers, LoraConfig(r=2))
    host = hosts(layers)[0][1]
    host.base.weight.data.fill_(torch.finfo(torch.float16).max)
    host.lora("default").lora_A.data.fill_(1e3)
    host.lora("default").lora_B.data.fill_(1e3)
    with pytest.raises(AdapterError, match="non-finite"):
        merge(layers)


@variants
def test_merge_and_unload_leaves_the_plain_class_with_the_same_answer(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    before = logits(model, tiny_batch(model))
    plain = tiny_bert(seed=9)
    plain.load_state_dict(merge_and_unload(model).state_dict())  # strict: no key of ours is left
    assert hosts(model) == []
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(logits(plain, tiny_batch(plain)), before, rtol=0, atol=2e-6)


def test_merge_and_unload_keeps_the_dtype_of_a_bf16_base() -> None:
    model = tiny_bert().bfloat16()
    add_adapter(model, LoraConfig(r=2, modules_to_save=("classifier",)))
    assert {p.dtype for p in merge_and_unload(fill(model)).parameters()} == {torch.bfloat16}


def test_merge_of_one_adapter_ignores_the_routing_and_the_other() -> None:
    model = adapted()
    want = logits(model, tiny_batch(model))
    add_adapter(model, LoraConfig(r=2, target_modules=("dense",), modules_to_save=("classifier",)), "other")
    fill(model, "other")
    merge(model, "default")
    torch.testing.assert_close(logits(model, tiny_batch(model)), want, rtol=0, atol=2e-6)
