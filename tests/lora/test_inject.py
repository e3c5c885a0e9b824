"""Adapters in a model: how many weights, what trains, where it starts, several at once, and out again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora import (
    LoraConfig,
    LoRALinear,
    Routing,
    adapter_names,
    adapter_parameters,
    add_adapter,
    count_parameters,
    delete_adapter,
    disabled,
    fuse,
    hosts,
    merge,
    quantize,
    routed,
    set_adapter,
    unload,
    unmerge,
)
from lorakit.lora.updates import UPDATES
from tests.interop.architectures import ARCHITECTURES
from tests.lora.oracle import CLOSE, assert_same_tensors, assert_unchanged, fill, snapshot
from tests.tiny import logits, tiny_batch, tiny_bert, tiny_gpt2, tiny_t5

QV = LoraConfig(r=4, target_modules=("query", "value"), modules_to_save=("classifier",))
DENSE = LoraConfig(r=2, target_modules=("dense",), modules_to_save=("classifier",))


def routing(model: nn.Module) -> Routing:
    return hosts(model)[0][1].routing


def two_adapters() -> PreTrainedModel:
    """`first` and `second` with other targets, both with a head, both off their start; `second` is active."""
    model = tiny_bert()
    add_adapter(model, QV, "first")
    fill(model, "first", seed=1)
    add_adapter(model, DENSE, "second")
    return fill(model, "second", seed=2)


def answer_of(model: PreTrainedModel, adapter: str) -> torch.Tensor:
    set_adapter(model, adapter)
    return logits(model, tiny_batch(model))


def bert_base() -> nn.Module:
    """BERT-base as transformers' default config describes it; its memory is never written."""
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig())
    return model.to_empty(device="cpu")


# how many


def test_bert_base_with_rank_4_on_query_and_value_has_147456_lora_parameters() -> None:
    model = bert_base()
    add_adapter(model, QV)
    head = sum(p.numel() for p in model.classifier.base.parameters())
    assert count_parameters(model).lora == 147_456  # the reference notebook: 12 layers x 2 x 4 x (768 + 768)
    assert count_parameters(model).saved == head


def test_count_is_the_number_of_trainable_scalars_and_the_total_of_the_plain_model_and_lora() -> None:
    model = tiny_bert()
    plain = sum(p.numel() for p in model.parameters())
    add_adapter(model, QV)
    count = count_parameters(model)
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    assert count.trainable == sum(p.numel() for p in trainable.values())
    assert count.total == plain + count.lora
    assert {id(p) for p in adapter_parameters(model).values()} == trainable.keys()
    assert all(p.is_leaf for p in trainable.values())


def test_count_of_one_adapter_ignores_the_others() -> None:
    model = tiny_bert()
    add_adapter(model, QV, "first")
    before = count_parameters(model, "first")
    add_adapter(model, DENSE, "second")
    assert count_parameters(model, "first") == before


# where it starts


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_layers_of_one_shape_and_other_seeds_start_with_different_factors(init: str) -> None:
    starts = []
    for seed in range(2):
        model = tiny_bert()
        add_adapter(model, LoraConfig(r=4, target_modules=("query", "value"), init_lora_weights=init), seed=seed)
        starts += [tensor for key, tensor in adapter_parameters(model).items() if key.endswith("lora_A")]
    assert len({tuple(tensor.flatten().tolist()) for tensor in starts}) == len(starts)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_follows_the_mode_of_the_model(training: bool) -> None:
    model = tiny_bert().train(training)
    add_adapter(model, LoraConfig(lora_dropout=0.5, modules_to_save=("classifier",)))
    assert {module.training for module in model.modules()} == {training}


# several


def test_the_latest_adapter_is_active_and_alone_trainable() -> None:
    model = two_adapters()
    assert adapter_names(model) == ["first", "second"]  # in the order of adding
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter_parameters(model, "second").values()}


@pytest.mark.parametrize(("name", "config", "seed"), [("first", QV, 1), ("second", DENSE, 2)])
def test_switching_gives_the_answer_of_the_adapter_alone(name: str, config: LoraConfig, seed: int) -> None:
    alone = tiny_bert()
    add_adapter(alone, config, name)
    fill(alone, name, seed)
    assert torch.equal(answer_of(two_adapters(), name), answer_of(alone, name))


def test_segments_give_each_row_the_answer_of_its_adapter_alone() -> None:
    model = two_adapters()
    first, second = answer_of(model, "first"), answer_of(model, "second")
    with disabled(model):
        base = logits(model, tiny_batch(model))
    routing(model).segments = [("second", 2), ("first", 3), (None, 1)]
    mixed = logits(model, tiny_batch(model))
    torch.testing.assert_close(mixed, torch.cat([second[:2], first[2:5], base[5:]]), **CLOSE)


def test_disabled_answers_as_the_base_and_comes_back() -> None:
    model = two_adapters()
    active = logits(model, tiny_batch(model))
    for each in (model, tiny_bert()):
        with pytest.raises(KeyError), disabled(each):
            assert torch.equal(logits(each, tiny_batch(each)), logits(tiny_bert(), tiny_batch(each)))
            raise KeyError
    assert torch.equal(logits(model, tiny_batch(model)), active)


def test_deleting_all_adapters_gives_the_plain_model_back() -> None:
    model = two_adapters()
    want = answer_of(model, "first")
    set_adapter(model, "second")
    delete_adapter(model, "second")  # the active one: the base answers
    assert torch.equal(logits(model, tiny_batch(model)), logits(tiny_bert(), tiny_batch(model)))
    assert torch.equal(answer_of(model, "first"), want)
    delete_adapter(model, "first")
    assert hosts(model) == []
    assert_same_tensors(model.state_dict(), tiny_bert().state_dict())
    assert torch.equal(logits(model, tiny_batch(model)), logits(tiny_bert(), tiny_batch(model)))


def test_rows_of_a_deleted_adapter_fall_to_the_base() -> None:
    model = two_adapters()
    second = answer_of(model, "second")
    routing(model).segments = [("first", 2), ("second", 4)]
    delete_adapter(model, "first")
    base = logits(tiny_bert(), tiny_batch(model))
    torch.testing.assert_close(logits(model, tiny_batch(model)), torch.cat([base[:2], second[2:]]), **CLOSE)


def test_unload_gives_the_plain_model_back() -> None:
    model = unload(two_adapters())
    assert hosts(model) == []
    assert_same_tensors(model.state_dict(), tiny_bert().state_dict())


# refused


@pytest.mark.parametrize("name", ["", "a.b", "-a", "a" * 65, "items", "training"])
def test_unusable_name_is_refused(name: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"use letters, digits, '-' and '_', at most 64|adapter name '\w+'.*torch"):
        add_adapter(model, QV, name)
    assert_unchanged(model, before)


def test_taken_name_is_refused() -> None:
    model = two_adapters()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="adapter 'first' exists already"):
        add_adapter(model, DENSE, "first")
    assert_unchanged(model, before)


def test_unknown_name_is_refused_with_the_names_there_are() -> None:
    model = two_adapters()
    acts: list[Callable[[nn.Module, str], object]] = [set_adapter, delete_adapter, adapter_parameters, merge]
    for act in (*acts, count_parameters):
        with pytest.raises(AdapterError, match="no adapter 'frist' in this model; did you mean 'first'"):
            act(model, "frist")


def test_module_that_holds_lora_of_another_adapter_cannot_be_saved() -> None:
    model = tiny_bert()
    add_adapter(model, LoraConfig(target_modules=("dense",)), "first")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"modules_to_save: bert\.pooler holds LoRA layers of another adapter"):
        add_adapter(model, LoraConfig(target_modules=("query",), modules_to_save=("classifier", "pooler")), "second")
    assert_unchanged(model, before)


def test_merged_model_refuses_what_it_cannot_honour() -> None:
    model = two_adapters()
    merge(model, "second")
    before = snapshot(model)
    acts: list[Callable[[], object]] = [
        lambda: add_adapter(model, QV, "third"),
        lambda: set_adapter(model, "first"),
        lambda: delete_adapter(model, "first"),
        lambda: disabled(model).__enter__(),
    ]
    for act in acts:
        with pytest.raises(AdapterError, match="adapter 'second' is merged; unmerge it first"):
            act()
        assert_unchanged(model, before)


def test_hosts_of_an_adapter_are_those_that_hold_a_part_of_it() -> None:
    model = two_adapters()
    assert {path.rpartition(".")[2] for path, _ in hosts(model, "first")} == {"query", "value", "classifier"}
    assert all(isinstance(host, LoRALinear) for path, host in hosts(model) if path != "classifier")


# copied, pickled

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": lambda model: torch.load(io.BytesIO(saved_whole(model)), weights_only=False),
}
COPIED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    **{update: (tiny_bert, {"update": update, "modules_to_save": ("classifier",)}) for update in UPDATES},
    "attention, convolutions": (
        ARCHITECTURES["plain torch"].build,
        {"target_modules": ("attention", "along", "across", "tokens", "up"), "update": "dora"},
    ),
    "transposed": (tiny_gpt2, {"init_lora_weights": "pissa"}),
    "tied rows, biases": (tiny_t5, {"target_modules": ("q", "shared"), "lora_bias": True}),
    "rows, biases": (tiny_bert, {"target_modules": ("query",), "bias": "all", "trainable_token_indices": (3, 4)}),
    "quantised": (lambda: quantized(tiny_bert()), {"target_modules": ("query",)}),
}


def saved_whole(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def quantized(model: nn.Module) -> nn.Module:
    quantize(model, "int8", skip=("classifier",))
    return model


@pytest.mark.parametrize(("name", "way"), [(name, [*COPIES][i % 2]) for i, name in enumerate(COPIED)])
def test_copy_of_an_adapted_model_is_one_of_its_own(name: str, way: str) -> None:
    (build, settings), copied = COPIED[name], COPIES[way]
    model = build()
    add_adapter(model, LoraConfig(**{"r": 2, **settings}), "a")
    fill(model, "a")
    fuse(model)
    batch = tiny_batch(model)
    with disabled(model):
        plain = logits(model, batch)
    answer = logits(model, batch)
    other = copied(model)
    with routed(model, []):  # which holds for this model
        assert torch.equal(logits(other, batch), answer)
    assert torch.equal(logits(other, batch), answer)
    with disabled(other):
        assert torch.equal(logits(other, batch), plain)
    assert [(path, type(host), getattr(host, "geometry", None)) for path, host in hosts(other)] == [
        (path, type(host), getattr(host, "geometry", None)) for path, host in hosts(model)
    ]
    fill(other, "a", seed=2)
    assert not torch.equal(logits(other, batch), answer)
    assert torch.equal(logits(model, batch), answer)
    if settings.get("lora_bias") is None:
        merge(other, "a")
        again = copied(other)
        unmerge(again)
        assert_same_tensors(again.state_dict(), (unmerge(other), other.state_dict())[1])


def test_copy_of_a_model_with_two_adapters_routes_them() -> None:
    model = two_adapters()
    batch = tiny_batch(model)
    segments = [("first", 1), ("second", len(batch["input_ids"]) - 1)]
    with routed(model, segments):
        answer = logits(model, batch)
    for copied in COPIES.values():
        other = copied(model)
        assert len({id(host.routing) for _, host in hosts(other)}) == 1
        with routed(other, segments):
            assert torch.equal(logits(other, batch), answer)
        assert torch.equal(answer_of(other, "first"), answer_of(model, "first"))
