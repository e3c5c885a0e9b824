"""Numbers that are none, losses that go wrong, and memory that is too small."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.errors import ConfigError, NumericsError
from lorakit.inference.predictor import load
from lorakit.runtime import device
from lorakit.runtime.device import is_out_of_memory
from lorakit.runtime.events import Event, Note
from lorakit.tasks.sequence import SequenceClassification
from lorakit.training import loop
from lorakit.training import run as run_module
from lorakit.training.loop import LOSS_SCALE, train
from lorakit.training.prepare import prepare
from lorakit.training.progress import WINDOW, LossWatch
from lorakit.training.run import member_of
from lorakit.training.run_files import read_run
from tests.faults.outcome import differences, outcome
from tests.runs import Sections, Stopped, changed, fit, resumed, sections, start, stop_after, taken_up, values, weights


@pytest.fixture(scope="module")
def raw(bert: Path, files: Path) -> Sections:
    """A run of 5 steps with dropout."""
    recipe = sections(bert, files)
    recipe["train"] |= {"epochs": 1, "checkpoint_every": 1}
    return recipe


def notes(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Note)]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss NaN in these calls of training, from 1."""

    def spoil(*calls: int) -> None:
        loss, count = SequenceClassification.losses, [0]

        def spoiled(self: SequenceClassification, model: torch.nn.Module, batch: dict) -> Tensor:
            count[0] += torch.is_grad_enabled()
            return loss(self, model, batch) * (math.nan if torch.is_grad_enabled() and count[0] in calls else 1)

        monkeypatch.setattr(SequenceClassification, "losses", spoiled)

    return spoil


# Skipped steps


def test_skipped_steps_change_nothing_and_are_told(raw: Sections, tmp_path: Path, spoil: Callable[..., None]) -> None:
    spoil(2, 4)
    told: list[Event] = []
    run = start(changed(raw, "train.non_finite=skip"), tmp_path, told.append)
    before: dict[int, dict[str, Tensor]] = {}
    report = run.report
    run.report = lambda event: (before.update({len(before): values(run.prepared)}), report(event))[1]
    run.fit()
    skips = [text for text in notes(told) if "skipped" in text]
    assert skips == [
        f"step {n}: the loss is nan, the gradient's norm nan; skipped ({i} of at most {run_module.SKIPS})"
        for i, n in enumerate((2, 4), start=1)
    ]
    assert (run.history.skipped, run.history.skipped_in_a_row) == (2, 0)
    at = next(i for i, event in enumerate(told) if isinstance(event, Note) and "skipped" in event.text)
    assert all(torch.equal(before[at][name], before[at - 1][name]) for name in before[at])  # step 2 was no update


def test_skips_survive_a_resume(raw: Sections, tmp_path: Path, spoil: Callable[..., None]) -> None:
    recipe = changed(raw, "train.non_finite=skip")
    spoil(2)
    fit(recipe, tmp_path / "straight")
    spoil(2)
    with pytest.raises(Stopped):
        fit(recipe, tmp_path / "stopped", stop_after(4))
    spoil()
    resumed(recipe, tmp_path / "stopped").fit()
    assert differences(outcome(tmp_path / "stopped"), outcome(tmp_path / "straight")) == []


@pytest.mark.parametrize(("in_a_row", "in_all"), [(1, 50), (5, 1)])
def test_too_many_skips_end_the_run(
    raw: Sections,
    tmp_path: Path,
    spoil: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    in_a_row: int,
    in_all: int,
) -> None:
    monkeypatch.setattr(run_module, "SKIPS_IN_A_ROW", in_a_row)
    monkeypatch.setattr(run_module, "SKIPS", in_all)
    spoil(2, 3)
    with pytest.raises(
        NumericsError,
        match=rf"step 3: .*2 steps were skipped so far, and the limit is {in_a_row} in a row and {in_all} in",
    ):
        fit(changed(raw, "train.non_finite=skip"), tmp_path)


# Losses that go wrong


def warned(losses: list[float]) -> list[tuple[int, str]]:
    watch = LossWatch()
    warnings = ((n, watch.add(n, loss, 0.5)) for n, loss in enumerate(losses, start=1))
    return [(n, text) for n, text in warnings if text]


def test_loss_that_climbs_is_told_once_with_a_hint() -> None:
    ((number, text),) = warned([0.7 + 0.1 * (i % 2) for i in range(WINDOW)] + [0.7 * 1.1**i for i in range(60)])
    assert "lower train.lr (now 0.5)" in text
    assert text.startswith(f"steps {number - WINDOW + 1} to {number}: the loss is ")
    assert number > WINDOW


def test_loss_that_stands_still_is_told_once() -> None:
    assert warned([0.6931] * 3 * WINDOW) == [
        (WINDOW, f"steps 1 to {WINDOW}: the loss stays at 0.6931; are all labels the same, or is train.lr too low?")
    ]


def test_loss_that_falls_or_varies_is_not_told() -> None:
    assert warned([2 * 0.99**i + 0.3 * (i % 2) for i in range(200)]) == []


def test_run_that_diverges_says_so(raw: Sections, tmp_path: Path) -> None:
    told: list[Event] = []
    words = ("train.lr=300", "train.epochs=8", "train.eval_every=40", "train.checkpoint_every=40", "train.warmup=40")
    fit(changed(raw, *words, "train.schedule=constant", "model.dropout=0.1"), tmp_path, told.append)
    assert any("lower train.lr" in text for text in notes(told))


# Memory


class Small:
    """A memory that has room for so many rows of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception) -> None:
        loss = SequenceClassification.losses

        def limited(task: SequenceClassification, model: torch.nn.Module, batch: dict) -> Tensor:
            found = loss(task, model, batch)
            if torch.is_grad_enabled() and len(batch["input_ids"]) > rows:
                raise error
            return found

        monkeypatch.setattr(SequenceClassification, "losses", limited)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    MemoryError(),
    RuntimeError("can't allocate memory"),
]


def test_micro_batch_is_halved_where_memory_is_full(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is to the last bit the one whose recipe says the smaller micro-batch."""
    fit(changed(raw, "train.micro_batch_size=2"), tmp_path / "small")
    told: list[Event] = []
    Small(monkeypatch, 3, ERRORS[0])
    fit(changed(raw), tmp_path / "halved", told.append)
    assert weights(tmp_path / "halved") == weights(tmp_path / "small")
    texts = [text for text in notes(told) if "memory" in text]
    assert texts == [
        "out of memory at step 1: 2 examples in a forward pass from now on; a step still has 8, with the same gradient"
    ]


def test_halved_micro_batch_is_kept_over_a_resume(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Small(patch, 4, MemoryError())
        with pytest.raises(Stopped):
            fit(changed(raw), tmp_path, stop_after(3))
    run = resumed(changed(raw), tmp_path)
    assert [run.history.micro_batch_size, *(member.micro_batch_size for member in run.members)] == [4, 4]


def test_no_room_for_one_example_is_an_error_with_advice(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Small(monkeypatch, 0, MemoryError())
    with pytest.raises(
        ConfigError,
        match=r"step 1: out of memory with 1 of 8 examples at a time, the longest of \d+ tokens; .*quantize",
    ):
        fit(changed(raw), tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"), [*((error, True) for error in ERRORS), (RuntimeError("shape"), False), (ValueError(), False)]
)
def test_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


# An fp16 base, as GPUs without bf16 have it: loss and gradients of fp32, a loss scale that finds its size, T5 kept out of it.


FP16 = ("model.dtype=fp16", "model.dropout=0", "lora.dropout=0")


def gradients(raw: Sections, scale: float, *words: str) -> tuple[dict[str, torch.Tensor], float, int]:
    """Each parameter's gradient in the first step, the loss scale after it, and how often the step was computed."""
    member = member_of(prepared := prepare(changed(raw, *words)))
    member.loss_scale = scale
    found: dict[str, torch.Tensor] = {}
    member.optimizer.register_step_pre_hook(
        lambda *_: found.update(
            {name: p.grad.clone() for name, p in member.named_parameters.items() if p.grad is not None}
        )
    )
    n = 0

    def count(*_: object) -> None:
        nonlocal n
        n += 1

    handle = prepared.model.register_forward_pre_hook(count)
    next(train(prepared.model, [member]))
    handle.remove()
    return found, member.loss_scale, n


def test_gradients_of_an_fp16_base_are_those_of_fp32(bert: Path, files: Path) -> None:
    raw = sections(bert, files)
    ours, scale, _ = gradients(raw, LOSS_SCALE, *FP16)
    theirs, _, _ = gradients(raw, 1.0, *FP16, "model.dtype=fp32")
    assert scale <= LOSS_SCALE
    flat = [torch.cat([found[name].flatten() for name in sorted(found)]) for found in (ours, theirs)]
    assert ours.keys() == theirs.keys()
    assert torch.cosine_similarity(*flat, dim=0) > 0.999
    torch.testing.assert_close(flat[0].norm(), flat[1].norm(), rtol=0.02, atol=0)


def test_scale_is_halved_until_nothing_overflows_and_no_step_is_lost(bert: Path, files: Path) -> None:
    raw = sections(bert, files)
    expected, start, once = gradients(raw, 1024.0, *FP16)
    found, scale, n = gradients(raw, 2.0**30, *FP16)
    assert (start, once) == (1024.0, 1)
    assert n > 3
    assert scale == 2.0 ** (30 - (n - 1))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)


def test_scale_is_doubled_after_some_steps(bert: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS_TO_DOUBLE", 4)
    member = member_of(prepared := prepare(changed(sections(bert, files), *FP16)))
    member.loss_scale = 8.0
    scales = [member.loss_scale for _ in train(prepared.model, [member])]
    assert scales == [8, 8, 8, 16, 16, 16, 16, 32, 32, 32]


def test_run_over_an_fp16_base_is_recorded_resumed_and_answers(five_steps: Sections, tmp_path: Path) -> None:
    recipe = changed(five_steps, "model.dtype=fp16")
    fit(recipe, tmp_path / "whole")
    assert read_run(tmp_path / "whole").scores.dtype == "float16"
    run = taken_up(recipe, tmp_path / "stopped", 4)
    assert run.member.loss_scale == LOSS_SCALE
    run.fit()
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    predictor = load(tmp_path / "whole")
    assert next(predictor.model.parameters()).dtype == torch.float16


def test_t5_stays_in_fp32_where_auto_would_be_fp16(t5: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.training.prepare.pick_dtype", lambda *_: torch.float16)
    raw = sections(t5, files, "text2text_ner")
    raw["model"]["dtype"] = "auto"
    prepared = prepare(changed(raw))
    assert (prepared.dtype, prepared.recipe.model.dtype) == (torch.float32, "fp32")
    with pytest.raises(ConfigError, match=r"model\.dtype = 'fp16': .* \(t5\) computes numbers beyond fp16"):
        prepare(changed(raw, "model.dtype=fp16"))


def test_device_is_the_recipes(bert: Path, files: Path) -> None:
    assert prepare(changed(sections(bert, files), "train.device=cpu")).device == torch.device("cpu")
    if not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match=r"train.device = 'xpu': torch .* finds only the CPU on this machine"):
            prepare(changed(sections(bert, files), "train.device=xpu"))
    assert set(device.DTYPE_NAMES.values()) == set(device.DTYPES)
