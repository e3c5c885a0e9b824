"""Adapters in a model: how many weights, what trains, where it starts, several at once, and out again."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

EXACT_STARTS = {
    "kaiming": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


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


def t5_small() -> nn.Module:
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=6)
        )
    return model.to_empty(device="cpu")


# how many


def test_bert_base_with_rank_4_on_query_and_value_has_147456_lora_parameters() -> None:
    model = bert_base()
    add_adapter(model, QV)
    head = sum(p.numel() for p in model.classifier.base.parameters())
    assert count_parameters(model).lora == 147_456  # the reference notebook: 12 layers x 2 x 4 x (768 + 768)
    assert count_parameters(model).saved == head


def test_t5_small_with_rank_4_on_two_encoder_blocks_has_16384_lora_parameters() -> None:
    model = t5_small()
    add_adapter(model, LoraConfig(r=4, target_modules=r"encoder\.block\.[12]\.layer\.0\.SelfAttention\.(q|v)"))
    assert count_parameters(model).lora == count_parameters(model).trainable == 16_384
    assert {path for path, _ in hosts(model)} == {
        f"encoder.block.{block}.layer.0.SelfAttention.{name}" for block in (1, 2) for name in "qv"
    }


def test_count_is_the_number_of_trainable_scalars_and_the_total_of_the_plain_model_and_lora() -> None:
    model = tiny_bert()
    plain = sum(p.numel() for p in model.parameters())
    add_adapter(model, QV)
    count = count_parameters(model)
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.total == plain + count.lora


def test_count_of_one_adapter_ignores_the_others() -> None:
    model = tiny_bert()
    add_adapter(model, QV, "first")
    before = count_parameters(model, "first")
    add_adapter(model, DENSE, "second")
    assert count_parameters(model, "first") == before


# where it starts


@pytest.mark.parametrize("build", [tiny_bert, tiny_t5])
@pytest.mark.parametrize("settings", EXACT_STARTS.values(), ids=EXACT_STARTS)
def test_model_before_the_first_step_equals_the_base_bit_for_bit(
    settings: dict[str, object], build: Callable[[], PreTrainedModel]
) -> None:
    model = build()
    before = logits(model, tiny_batch(model))
    add_adapter(model, LoraConfig(r=4, **settings))
    assert torch.equal(logits(model, tiny_batch(model)), before)


def test_bias_of_the_adapted_layer_is_used() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[0].attention.self.value.bias.data.fill_(50.0)
    before = logits(model, tiny_batch(model))
    assert not torch.allclose(before, logits(tiny_bert(), tiny_batch(model)))
    add_adapter(model, QV)
    assert torch.equal(logits(model, tiny_batch(model)), before)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_same_seed_gives_the_same_adapter(init: str) -> None:
    models = [tiny_bert(), tiny_bert()]
    for model in models:
        torch.rand(1)  # the global generator plays no part
        add_adapter(model, LoraConfig(r=4, init_lora_weights=init), seed=3)
    assert_same_tensors(*(adapter_parameters(model) for model in models))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_another_seed_gives_another_adapter(init: str) -> None:
    models = [tiny_bert(), tiny_bert()]
    for seed, model in enumerate(models):
        add_adapter(model, LoraConfig(r=4, target_modules=("query",), init_lora_weights=init), seed=seed)
    left, right = (adapter_parameters(model) for model in models)
    assert [key for key in left if key.endswith("lora_A") and torch.equal(left[key], right[key])] == []


def test_layers_of_one_shape_start_with_different_factors() -> None:
    model = tiny_bert()
    add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    starts = [tensor for key, tensor in adapter_parameters(model).items() if key.endswith("lora_A")]
    assert len({tuple(tensor.flatten().tolist()) for tensor in starts}) == len(starts)


def test_start_of_a_layer_does_not_depend_on_what_else_is_injected() -> None:
    alone, among = tiny_bert(), tiny_bert()
    add_adapter(alone, LoraConfig(r=4, target_modules=("value",)))
    add_adapter(among, DENSE, "other", seed=5)
    add_adapter(among, LoraConfig(r=4, target_modules=("query", "key", "value")))
    shared = {key: value for key, value in adapter_parameters(among).items() if ".value." in key}
    assert_same_tensors(adapter_parameters(alone), shared)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_follows_the_mode_of_the_model(training: bool) -> None:
    model = tiny_bert().train(training)
    add_adapter(model, LoraConfig(lora_dropout=0.5, modules_to_save=("classifier",)))
    assert {module.training for module in model.modules()} == {training}


# what trains


def one_step(model: PreTrainedModel) -> None:
    batch = tiny_batch(model)
    labels = torch.arange(len(batch["input_ids"])) % 2
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    F.cross_entropy(model.train()(**batch).logits, labels).backward()
    optimizer.step()


@pytest.mark.parametrize("settings", EXACT_STARTS.values(), ids=EXACT_STARTS)
def test_one_step_changes_every_b_and_the_head_and_nothing_frozen(settings: dict[str, object]) -> None:
    model = tiny_bert()
    add_adapter(model, LoraConfig(r=4, modules_to_save=("classifier",), **settings))
    before = snapshot(model)["tensors"]
    one_step(model)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed <= trained
    assert {key for key in trained if key.endswith("lora_B")} <= changed
    assert {key for key in trained if key.startswith("classifier.")} <= changed
    assert [path for path, p in model.named_parameters() if p.grad is not None and not p.requires_grad] == []


def test_adapter_parameters_are_the_trainable_leaves() -> None:
    model = tiny_bert()
    add_adapter(model, QV)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in adapter_parameters(model).values()} == trainable
    assert all(p.is_leaf for p in adapter_parameters(model).values())


def test_second_step_changes_every_a() -> None:
    model = tiny_bert()
    add_adapter(model, QV)
    before = {key: tensor.detach().clone() for key, tensor in adapter_parameters(model).items()}
    one_step(model)
    one_step(model)
    after = adapter_parameters(model)
    assert [key for key in before if torch.equal(before[key], after[key])] == []


def test_head_alone_can_be_trained() -> None:
    model = tiny_bert()
    add_adapter(model, LoraConfig(target_modules=(), modules_to_save=("classifier",)))
    count = count_parameters(model)
    assert (count.lora, count.saved) == (0, sum(p.numel() for p in tiny_bert().classifier.parameters()))


def test_saved_embedding_takes_ids_and_trains() -> None:
    model = tiny_bert()
    before = logits(model, tiny_batch(model))
    add_adapter(model, LoraConfig(target_modules=("query",), modules_to_save=("word_embeddings",)))
    assert torch.equal(logits(model, tiny_batch(model)), before)
    one_step(model)
    assert adapter_parameters(model)["bert.embeddings.word_embeddings.weight"].grad.any()


def test_saved_head_over_a_bf16_base_is_fp32() -> None:
    model = tiny_bert().bfloat16()
    add_adapter(model, QV)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert logits(model, tiny_batch(model)).dtype == torch.bfloat16


# several


def test_names_are_in_the_order_of_adding() -> None:
    assert adapter_names(two_adapters()) == ["first", "second"]


def test_the_latest_adapter_is_active_and_alone_trainable() -> None:
    model = two_adapters()
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


def test_segments_give_each_adapter_its_own_gradient() -> None:
    model = two_adapters()
    batch = tiny_batch(model)
    head, tail = ({key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, None)))
    set_adapter(model, "first")
    alone = torch.autograd.grad(model(**head).logits.square().sum(), adapter_parameters(model, "first").values())
    for parameter in adapter_parameters(model, "second").values():
        parameter.requires_grad_()
    for parameter in adapter_parameters(model, "first").values():
        parameter.requires_grad_()
    routing(model).segments = [("first", 2), ("second", len(tail["input_ids"]))]
    joint = torch.autograd.grad(model(**batch).logits.square().sum(), adapter_parameters(model, "first").values())
    torch.testing.assert_close(joint, alone, rtol=1e-5, atol=1e-5)


def test_segments_of_a_wrong_number_of_rows_raise() -> None:
    model = two_adapters()
    routing(model).segments = [("first", 2), ("second", 2)]
    with pytest.raises(ValueError, match="routing covers 4 rows, the batch has 6"):
        logits(model, tiny_batch(model))


def test_disabled_answers_as_the_base_and_comes_back() -> None:
    model = two_adapters()
    active = logits(model, tiny_batch(model))
    with disabled(model):
        assert torch.equal(logits(model, tiny_batch(model)), logits(tiny_bert(), tiny_batch(model)))
    assert torch.equal(logits(model, tiny_batch(model)), active)


def test_disabled_comes_back_after_an_exception() -> None:
    model = two_adapters()
    active = logits(model, tiny_batch(model))
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(logits(model, tiny_batch(model)), active)


def test_disabled_of_a_plain_model_does_nothing() -> None:
    model = tiny_bert()
    with disabled(model):
        assert torch.equal(logits(model, tiny_batch(model)), logits(tiny_bert(), tiny_batch(model)))


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_deleting_all_adapters_gives_the_plain_model_back(order: tuple[str, str]) -> None:
    model = two_adapters()
    for name in order:
        delete_adapter(model, name)
    assert hosts(model) == []
    assert_same_tensors(model.state_dict(), tiny_bert().state_dict())
    assert torch.equal(logits(model, tiny_batch(model)), logits(tiny_bert(), tiny_batch(model)))


def test_deleting_one_adapter_leaves_the_other() -> None:
    model = two_adapters()
    want = answer_of(model, "first")
    delete_adapter(model, "second")
    assert adapter_names(model) == ["first"]
    assert torch.equal(logits(model, tiny_batch(model)), want)


def test_deleting_the_active_adapter_leaves_the_base_answering() -> None:
    model = two_adapters()
    set_adapter(model, "first")
    delete_adapter(model, "first")
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


def test_copy_of_a_model_is_independent() -> None:
    model = two_adapters()
    active = logits(model, tiny_batch(model))
    twin = copy.deepcopy(model)
    set_adapter(twin, "first")
    assert torch.equal(logits(model, tiny_batch(model)), active)
    assert routing(twin) is not routing(model)


# refused


@pytest.mark.parametrize("name", ["", "a.b", "a b", "-a", "a" * 65, "../x"])
def test_unusable_name_is_refused(name: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="use letters, digits, '-' and '_', at most 64"):
        add_adapter(model, QV, name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["train", "items", "training", "to"])
def test_name_that_torch_uses_is_refused(name: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=f"adapter name '{name}'.*torch"):
        add_adapter(model, QV, name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["query", "encoder", "lora_A", "classifier", "base", "default"])
def test_name_of_a_module_is_no_trouble(name: str) -> None:
    model = tiny_bert()
    add_adapter(model, QV, name)
    assert count_parameters(model, name).lora == 3 * 2 * 4 * (32 + 32)


def test_taken_name_is_refused() -> None:
    model = two_adapters()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="adapter 'first' is there already"):
        add_adapter(model, DENSE, "first")
    assert_unchanged(model, before)


@pytest.mark.parametrize("act", [set_adapter, delete_adapter, adapter_parameters, count_parameters, merge])
def test_unknown_name_is_refused_with_the_names_there_are(act: Callable[[nn.Module, str], object]) -> None:
    with pytest.raises(AdapterError, match="no adapter 'frist' in this model; did you mean 'first'"):
        act(two_adapters(), "frist")


def test_module_that_holds_lora_of_another_adapter_cannot_be_saved() -> None:
    model = tiny_bert()
    add_adapter(model, LoraConfig(target_modules=("dense",)), "first")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"modules_to_save: bert\.pooler holds LoRA layers of another adapter"):
        add_adapter(model, LoraConfig(target_modules=("query",), modules_to_save=("classifier", "pooler")), "second")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "act",
    [
        lambda model: add_adapter(model, QV, "third"),
        lambda model: set_adapter(model, "first"),
        lambda model: delete_adapter(model, "first"),
        lambda model: disabled(model).__enter__(),
    ],
    ids=["add", "set", "delete", "disable"],
)
def test_merged_model_refuses_what_it_cannot_honour(act: Callable[[nn.Module], object]) -> None:
    model = two_adapters()
    merge(model, "second")
    before = snapshot(model)
    with pytest.raises(AdapterError, match="adapter 'second' is merged; unmerge it first"):
        act(model)
    assert_unchanged(model, before)


def test_hosts_of_an_adapter_are_those_that_hold_a_part_of_it() -> None:
    model = two_adapters()
    assert {path.rpartition(".")[2] for path, _ in hosts(model, "first")} == {"query", "value", "classifier"}
    assert all(isinstance(host, LoRALinear) for path, host in hosts(model) if path != "classifier")


# copied, pickled

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
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


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(("build", "settings"), COPIED.values(), ids=COPIED)
def test_copy_of_an_adapted_model_is_one_of_its_own(
    build: Callable[[], nn.Module], settings: dict[str, Any], copied: Callable[[Any], Any]
) -> None:
    model = build()
    add_adapter(model, LoraConfig(**{"r": 2, **settings}), "a")
    fill(model, "a")
    fuse(model)
    batch = tiny_batch(model)
    with disabled(model):
        plain = logits(model, batch)
    answer = logits(model, batch)
    with routed(model, []):  # which holds for this thread and this model
        other = copied(model)
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
