"""Numbers that are none, losses that go wrong, and memory that is too small."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.errors import ConfigError, NumericsError
from lorakit.runtime.device import is_out_of_memory
from lorakit.runtime.events import Event, Note
from lorakit.tasks.sequence import SequenceClassification
from lorakit.training import run as run_module
from lorakit.training.progress import WINDOW, LossWatch
from tests.faults.outcome import differences, outcome
from tests.runs import Sections, Stopped, changed, fit, resumed, sections, start, stop_after, values, weights


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
        NumericsError, match=rf"step 3: .*like 1 before it: the limit is {in_a_row} in a row and {in_all} in"
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
        (WINDOW, f"steps 1 to {WINDOW}: the loss stays at 0.6931: is every label the same, or train.lr too low?")
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
        "out of memory at step 1: 2 examples per forward from now on; a step still has 8, and its gradient is the same"
    ]


def test_halved_micro_batch_is_kept_over_a_resume(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Small(patch, 4, MemoryError())
        with pytest.raises(Stopped):
            fit(changed(raw), tmp_path, stop_after(3))
    run = resumed(changed(raw), tmp_path)
    assert run.history.micro_batch_size == 4


def test_no_room_for_one_example_is_an_error_with_advice(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Small(monkeypatch, 0, MemoryError())
    with pytest.raises(
        ConfigError,
        match=r"step 1: out of memory with 1 of 8 examples at a time, the longest of \d+ tokens: .*quantize",
    ):
        fit(changed(raw), tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"), [*((error, True) for error in ERRORS), (RuntimeError("shape"), False), (ValueError(), False)]
)
def test_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
