"""The fast parts inside of a run: chosen by rule, and the same training and answers as without them."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch

from lorakit.lora.kernels import library
from lorakit.lora.speedups import changes_of
from lorakit.models import FP32_ATTENTION, attend_in_fp32
from lorakit.tasks.base import inputs_of
from lorakit.training.joint import keep_prefix
from lorakit.training.loop import Member, train
from lorakit.training.prepare import Prepared, prepare, trained_parameters
from lorakit.training.schedule import make_optimizer
from tests.runs import Stopped, changed, fit, resumed, sections, stop_after, weights
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
    assert fast.kernels[0].endswith("adapted linear layers in one function each")
    assert ("last block: first token only" in fast.kernels) == (base == "bert")
    assert plain.kernels == ()
    (losses, learned), (plain_losses, plain_learned) = stepped(fast), stepped(plain)
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    for name, parameter in plain_learned.items():
        torch.testing.assert_close(learned[name], parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_attention_of_a_bf16_model_computes_in_fp32(architecture: str) -> None:
    model = tiny(architecture).to(torch.bfloat16)
    batch = tiny_batch(model)
    before = logits(model, batch)
    assert attend_in_fp32(model)
    assert {config._attn_implementation for config in _configs(model)} == {FP32_ATTENTION}
    exact = logits(tiny(architecture), batch)
    after = logits(model, batch)
    assert after.dtype == torch.bfloat16
    assert (after - exact).abs().max() <= (before - exact).abs().max() + 2 * torch.finfo(torch.bfloat16).eps
    assert "attn_implementation" not in model.config.to_json_string()


def _configs(model: torch.nn.Module) -> list:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def test_in_fp32_attention_is_the_very_same_and_one_of_another_kind_is_left_alone() -> None:
    model = tiny("BertForSequenceClassification")
    batch = tiny_batch(model)
    before = logits(model, batch)
    attend_in_fp32(model)
    assert torch.equal(logits(model, batch), before)
    assert not attend_in_fp32(tiny("DebertaV2ForSequenceClassification"))  # computes attention by its own means


UPPER = ("model.dropout=0", "lora.dropout=0", "lora.target_modules=all-linear", "lora.layers_to_transform=[1]")


@pytest.mark.parametrize(("method", "base"), [("lora", "bert"), ("head", "bert"), ("lora", "sentence_bert")])
def test_what_lies_below_the_adapters_is_computed_once_and_a_resumed_run_has_the_same_bits(
    method: str, base: str, request: pytest.FixtureRequest, files: Path, tmp_path: Path
) -> None:
    raw = sections(request.getfixturevalue(base), files)
    recipe = changed(raw, *UPPER, f"train.method={method}", "train.checkpoint_every=3")
    notes: list[str] = []
    scores = fit(recipe, tmp_path / "kept", lambda event: notes.append(str(getattr(event, "text", "")))).scores
    assert any("below the adapters answer each text once" in note for note in notes)

    with pytest.raises(Stopped):
        fit(recipe, tmp_path / "stopped", stop_after(7))
    resumed(recipe, tmp_path / "stopped").fit()
    assert weights(tmp_path / "stopped") == weights(tmp_path / "kept")

    plain = fit(changed(raw, *UPPER, f"train.method={method}", "model.kernels=plain"), tmp_path / "plain").scores
    assert scores["nll"] == pytest.approx(plain["nll"], rel=1e-4)


def test_changes_of_a_forward_are_listed_and_undone(sentence_bert: Path, bert: Path, files: Path) -> None:
    words = (*UPPER, "model.dtype=fp32")
    fast = prepare(changed(sections(bert, files), *words))
    plain = prepare(changed(sections(bert, files), *words, "model.kernels=plain"))
    keep_prefix([fast])
    attend_in_fp32(fast.model)
    changes = changes_of(fast.model)
    assert list(changes) == [
        "adapted linear layers in one function each",
        "last block: first token only",
        *(["blocks over packed tokens"] if library(torch.float32) else []),
        "blocks below the adapters looked up",
        "attention in fp32 where a backward pass follows",
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
