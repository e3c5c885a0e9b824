"""The fast parts inside of a run: chosen by rule, and the same training and answers as without them."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from lorakit.lora import LoraConfig, add_adapter
from lorakit.lora.kernels import library
from lorakit.lora.speedups import changes_of, pass_once
from lorakit.models import ATTENTION, attend_in_few_passes
from lorakit.tasks.base import inputs_of
from lorakit.training.joint import keep_prefix
from lorakit.training.loop import Member, train
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.schedule import make_optimizer, trained_parameters
from tests.lora.test_speedups import adapted, assert_same
from tests.runs import changed, fit, sections, taken_up, weights
from tests.tiny import logits, tiny, tiny_batch


def stepped(prepared: Prepared) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the whole run, and what it trained."""
    lora, saved = trained_parameters(prepared.model)
    optimizer = make_optimizer(lora, saved, prepared.recipe.train)
    items = prepared.parts["train"].flat
    member = Member(prepared.task, items, optimizer, prepared.plan)
    losses = [step.loss for steps in train(prepared.model, [member]) for step in steps.values()]
    return losses, {**lora, **saved}


@pytest.mark.parametrize(
    ("base", "task"),
    [
        ("bert", "sequence_classification"),
        ("sentence_bert", "sequence_classification"),
        ("roberta", "token_classification"),
        ("t5", "text2text_ner"),
    ],
)
def test_a_run_learns_the_same(base: str, task: str, request: pytest.FixtureRequest, files: Path) -> None:
    raw = sections(request.getfixturevalue(base), files, task)
    words = ("model.dropout=0", "lora.dropout=0", "lora.target_modules=all-linear", "train.max_steps=6")
    fast = prepare(changed(raw, *words))
    plain = prepare(changed(raw, *words, "model.kernels=plain"))
    assert fast.kernels[0].endswith("fused LoRA layers")
    assert ("last block: first token only" in fast.kernels) == (base == "bert")
    assert plain.kernels == ()
    (losses, learned), (plain_losses, plain_learned) = stepped(fast), stepped(plain)
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    for name, parameter in plain_learned.items():
        torch.testing.assert_close(learned[name], parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "architecture",
    [
        *(f"{name}ForSequenceClassification" for name in ("Bert", "ModernBert", "GPT2")),
        *(f"{name}ForConditionalGeneration" for name in ("T5", "Bart")),
    ],
)
def test_attention_and_norms_in_few_passes_leave_logits_and_gradients(architecture: str) -> None:
    plain = adapted(architecture, target_modules="all-linear")
    fast = copy.deepcopy(plain)
    assert attend_in_few_passes(fast)
    pass_once(fast)
    assert_same(plain, fast)
    (rough, exact), batch = (copy.deepcopy(fast).to(torch.bfloat16), plain), tiny_batch(plain)
    assert (logits(rough, batch).float() - logits(exact, batch)).abs().max() <= 0.06 * logits(exact, batch).abs().max()
    assert "attn_implementation" not in fast.config.to_json_string()
    assert {module.config._attn_implementation for module in fast.modules() if hasattr(module, "config")} == {ATTENTION}


def test_dropout_in_one_pass_is_drawn_by_torchs_generator() -> None:
    model = tiny("T5ForConditionalGeneration", dropout_rate=0.2).train()
    add_adapter(model, LoraConfig(r=2))
    attend_in_few_passes(model)
    assert pass_once(model)
    batch = tiny_batch(model)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(logits(model, batch))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_without_a_backward_pass_attention_is_the_very_same_and_one_of_another_kind_is_left_alone() -> None:
    model = tiny("BertForSequenceClassification")
    batch = tiny_batch(model)
    with torch.no_grad():
        before = logits(model, batch)
        attend_in_few_passes(model)
        assert torch.equal(logits(model, batch), before)
    assert not attend_in_few_passes(tiny("DebertaV2ForSequenceClassification"))  # computes attention by its own means


UPPER = ("model.dropout=0", "lora.dropout=0", "lora.target_modules=all-linear", "lora.layers_to_transform=[1]")


@pytest.mark.parametrize(("method", "base"), [("head", "bert"), ("lora", "sentence_bert")])
def test_what_lies_below_the_adapters_is_computed_once_and_a_resumed_run_has_the_same_bits(
    method: str, base: str, request: pytest.FixtureRequest, files: Path, tmp_path: Path
) -> None:
    raw = sections(request.getfixturevalue(base), files)
    recipe = changed(raw, *UPPER, f"train.method={method}", "train.checkpoint_every=3")
    notes: list[str] = []
    scores = fit(recipe, tmp_path / "kept", lambda event: notes.append(str(getattr(event, "text", "")))).scores
    assert any("below the adapters answer each text once" in note for note in notes)

    taken_up(recipe, tmp_path / "stopped", 7).fit()
    assert weights(tmp_path / "stopped") == weights(tmp_path / "kept")

    plain = fit(changed(raw, *UPPER, f"train.method={method}", "model.kernels=plain"), tmp_path / "plain").scores
    assert scores["nll"] == pytest.approx(plain["nll"], rel=1e-4)


def test_changes_of_a_forward_are_listed_and_undone(sentence_bert: Path, bert: Path, files: Path) -> None:
    words = (*UPPER, "model.dtype=fp32")
    fast = prepare(changed(sections(bert, files), *words))
    plain = prepare(changed(sections(bert, files), *words, "model.kernels=plain"))
    keep_prefix([fast])
    changes = changes_of(fast.model)
    assert list(changes) == [
        "fused LoRA layers",
        "last block: first token only",
        "fused attention",
        *(["fused dropout and norms", "no work on padding"] if library(torch.float32) else []),
        "blocks below the adapters looked up",
    ]
    count = len(list(changes))
    copied = copy.deepcopy(fast.model)
    changes_of(copied).remove()
    assert len(list(changes)) == count  # a copy has its own
    changes.remove()
    assert not list(changes)
    batch = inputs_of(plain.task.collate([*plain.parts["validation"].flat][:3]))
    for model in (fast.model, copied):
        assert torch.equal(logits(model, batch), logits(plain.model, batch))
    mean = prepare(changed(sections(sentence_bert, files), *words, "model.kernels=plain"))
    assert list(changes_of(mean.model)) == ["classifier over the mean of the tokens"]


@pytest.mark.parametrize("word", ["model.dropout=0.1", "train.epochs=1", "model.kernels=plain"])
def test_nothing_is_kept_where_it_would_not_hold_or_not_pay(word: str, bert: Path, files: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    fit(changed(sections(bert, files), *UPPER, word), tmp_path / "run", lambda event: notes.append(str(event)))
    assert not any("below the adapters" in note for note in notes)


def test_a_full_disk_is_said_and_the_run_goes_on(
    bert: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    notes: list[str] = []
    monkeypatch.setattr(os, "posix_fallocate", full)
    fit(changed(sections(bert, files), *UPPER), tmp_path / "run", lambda event: notes.append(str(event)))
    assert any("computed in every epoch" in note and "No space left" in note for note in notes)


def test_attention_takes_its_mask_by_name() -> None:
    """As Doge of transformers gives it; others give it by place."""
    attend_in_few_passes(tiny("BertForSequenceClassification"))
    attention, layer = AttentionInterface()[ATTENTION], torch.nn.Module()
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    by_name, _ = attention(layer, query, key, value, attention_mask=mask)
    torch.testing.assert_close(by_name, attention(layer, query, key, value, mask)[0])
