"""Blocks below the adapters that are computed once: the same answers and gradients as computed anew each time."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lorakit.lora import LoraConfig, Prefix, add_adapter, frozen_blocks, fuse, read_first_row
from tests.tiny import tiny, tiny_batch

LOGITS, GRADIENTS = 1e-5, 1e-4


def upper_half(architecture: str) -> nn.Module:
    """A tiny model whose last block alone is adapted, B not zero."""
    model = tiny(f"{architecture}ForSequenceClassification")
    blocks = model.config.num_hidden_layers
    add_adapter(model, LoraConfig(r=3, target_modules="all-linear", layers_to_transform=(blocks - 1,)))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def kept(model: nn.Module) -> Prefix:
    """The first blocks of the model, filled with the rows of the tiny batch in two other batches."""
    batch = tiny_batch(model)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, None))]
    prefix = Prefix(model, frozen_blocks(model))
    prefix.fill(parts, int(batch["attention_mask"].sum()))
    return prefix


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_answers_and_gradients_are_those_of_the_whole_model(architecture: str) -> None:
    plain = upper_half(architecture)
    fast = copy.deepcopy(plain)
    fuse(fast)
    read_first_row(fast)
    prefix = kept(fast)
    assert prefix.depth == plain.config.num_hidden_layers - 1  # type: ignore[union-attr, operator]
    calls = counted(frozen_blocks(fast)[0])
    batch = tiny_batch(plain)
    shuffled = {key: value.flip(0) for key, value in batch.items()}
    logits = plain(**shuffled).logits
    fast_logits = fast(**shuffled).logits
    assert calls == []
    assert (logits - fast_logits).abs().max() <= LOGITS
    logits.square().sum().backward()
    fast_logits.square().sum().backward()
    fast_gradients = {name: p.grad for name, p in fast.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            other = fast_gradients[name]
            assert other is not None
            assert (parameter.grad - other).abs().max() <= GRADIENTS * parameter.grad.abs().max(), name


def counted(block: nn.Module) -> list[int]:
    """Grows with every time the block's first linear layer computes."""
    calls: list[int] = []
    linear = next(m for m in block.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_text_that_is_not_kept_is_computed() -> None:
    model = upper_half("Bert")
    plain = copy.deepcopy(model)
    kept(model)
    calls = counted(frozen_blocks(model)[0])
    other = tiny_batch(model, seed=5)
    assert torch.equal(model(**other).logits, plain(**other).logits)
    assert calls == [1]


def test_with_a_head_alone_all_blocks_are_kept_as_one_row() -> None:
    model = tiny("BertForSequenceClassification")
    plain = copy.deepcopy(model)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)  # type: ignore[union-attr, operator]
    read_first_row(model)
    prefix = kept(model)
    batch = tiny_batch(model)
    assert prefix.depth == model.config.num_hidden_layers
    assert prefix._end == len(batch["input_ids"])
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


def test_a_text_of_a_pair_is_told_from_the_same_ids_as_one_text() -> None:
    model = upper_half("Bert")
    plain = copy.deepcopy(model)
    kept(model)
    batch = tiny_batch(model)
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_there_is_no_prefix_below_trained_embeddings_or_the_first_block() -> None:
    model = tiny("BertForSequenceClassification")
    add_adapter(model, LoraConfig(target_modules=("query",)))
    assert frozen_blocks(model) == []
    upper = upper_half("Bert")
    upper.bert.embeddings.word_embeddings.weight.requires_grad_(True)  # type: ignore[union-attr]
    assert frozen_blocks(upper) == []
    assert frozen_blocks(tiny("T5ForConditionalGeneration")) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_model_that_looks_up_its_blocks_looks_up_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = upper_half("Bert")
    kept(model)
    batch = tiny_batch(model)
    other = copied(model)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    shorter = {key: value[:, :3] for key, value in batch.items()}  # which is not kept
    assert torch.equal(other(**shorter).logits, model(**shorter).logits)
