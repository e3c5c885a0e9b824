"""Signals: the step in hand is finished, an evaluation is broken off, all is saved, and the resumed run ends as any other."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from lorakit.app import api
from lorakit.app.cli import how_to_go_on, program
from lorakit.errors import Interrupted
from lorakit.runtime import signals
from lorakit.runtime.events import Event, Note, Step
from lorakit.runtime.signals import SIGNALS, Stop, stop_on_signals
from lorakit.tasks.sequence import SequenceClassification
from lorakit.training.checkpoint import newest_checkpoint
from tests.faults.outcome import differences, outcome
from tests.runs import Sections, changed, children, without_pictures


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals as at a terminal: a shell's job in the background is started to ignore SIGINT."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


# What a signal does


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_at_once_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught, stop_on_signals():
        signal.raise_signal(number)
    assert caught.value.exit_code == 75
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_signal_waits_to_be_looked_at_and_a_second_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.0 + signals.SAME_S / 2, 10.0 + signals.SAME_S])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    stop = Stop()
    with stop.deferred():
        stop(signal.SIGTERM)
        assert stop.signal == "SIGTERM"
        stop(signal.SIGTERM)  # the same wish, passed on twice
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            stop(signal.SIGINT)


def test_block_that_may_be_broken_off_is_not_begun_after_a_signal() -> None:
    stop = Stop()
    with stop.deferred():
        stop(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt, match="SIGUSR1"), stop.immediate():
            pytest.fail("it was asked for before")


def test_signals_that_the_process_ignores_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == ""
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_do_without() -> None:
    def run() -> None:
        with stop_on_signals():
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


# What it does to a run


def signal_at(step: int) -> tuple[Callable[[Event], None], list[str]]:
    """A report that sends this process SIGTERM when a step has been done, and the notes that it was told."""
    notes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Step) and event.number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        if isinstance(event, Note):
            notes.append(event.text)

    return report, notes


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("step", [3, 5], ids=["before an evaluation", "the last"])
def test_run_that_is_asked_to_stop_saves_and_goes_on(
    five_steps: Sections, never_stopped: dict, tmp_path: Path, step: int
) -> None:
    recipe = changed(five_steps, f"output.dir={tmp_path / 'run'}")
    report, notes = signal_at(step)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        api.train_recipe(recipe, report=report)
    assert f"stopped after step {step} of 5, and saved" in notes
    checkpoint, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint.step == step
    assert checkpoint.state["history"]["best_step"] == 3 * (step > 3)  # the evaluation was not waited for
    api.train_recipe(recipe, resume="auto")
    assert differences(outcome(tmp_path / "run"), never_stopped) == []


@pytest.mark.usefixtures("no_pictures")
def test_evaluation_is_broken_off_and_done_later(
    five_steps: Sections, never_stopped: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(five_steps, f"output.dir={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        predict = SequenceClassification.predict

        def signalled(self: SequenceClassification, *args: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return predict(self, *args)

        patch.setattr(SequenceClassification, "predict", signalled)
        with pytest.raises(Interrupted):
            api.train_recipe(recipe)
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[0].step == 3
    assert not (tmp_path / "run" / "adapter").exists()
    api.train_recipe(recipe, resume="auto")
    assert differences(outcome(tmp_path / "run"), never_stopped) == []


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("train r.toml train.lr=1", "lorakit train r.toml train.lr=1 --resume auto"),
        ("train r.toml --resume runs/a --json", "lorakit train r.toml --json --resume auto"),
        ("train --resume=auto r.toml", "lorakit train r.toml --resume auto"),
    ],
)
def test_how_to_go_on_is_a_whole_command(words: str, command: str) -> None:
    assert how_to_go_on(words.split()) == f"; to continue: {command}"
    assert how_to_go_on(["quickstart"]) == ""


def as_a_program(words: Sequence[str], folder: Path, stderr: Connection) -> None:
    """What `lorakit WORDS` does in a folder, its messages sent down a pipe."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.dup2(stderr.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = ["lorakit", *words]
    program()


def test_sigterm_ends_a_real_process_with_75_and_the_command_that_goes_on(
    bert: Path, files: Path, tmp_path: Path
) -> None:
    words = ["train", str(files / "train.csv"), "--model", str(bert), "model.dtype=fp32", "train.epochs=100000"]
    words += ["train.eval_every=5", "output.dir=run"]
    context = children()
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=as_a_program, args=(words, tmp_path, writing))
    process.start()
    writing.close()
    with os.fdopen(os.dup(reading.fileno())) as stderr:
        said = [stderr.readline()]
        while said[-1] and "validation accuracy" not in said[-1]:  # it trains
            said.append(stderr.readline())
        os.kill(process.pid, signal.SIGTERM)
        rest = stderr.read()
    process.join(60)
    assert process.exitcode == 75, "".join(said) + rest
    last = rest.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM; to continue: lorakit train ")
    assert last.endswith("output.dir=run --resume auto")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[0].step % 5 in range(5)
    assert not (tmp_path / "run" / ".lock").exists()
