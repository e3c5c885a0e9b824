"""Checkpoints: a run that was stopped and resumed is the run that never stopped, and damage is found and named."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorakit.errors import OutputError
from lorakit.inference.predictor import load
from lorakit.runtime.events import Event, Note
from lorakit.runtime.files import HOST, atomic_file, atomic_folder, atomic_text
from lorakit.training import run as run_module
from lorakit.training.checkpoint import KEEP, Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from tests.faults.outcome import outcome
from tests.runs import Sections, changed, fit, read_lines, resumed, sections, taken_up


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def raw(bert: Path, files: Path) -> Sections:
    """A run of 10 steps with dropout, evaluated at 4, 8 and 10, a checkpoint after each third step."""
    recipe = sections(bert, files)
    recipe["train"] |= {"eval_every": 4, "checkpoint_every": 3}
    return recipe


@pytest.fixture(scope="module")
def straight(raw: Sections, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    fit(changed(raw), folder)
    return folder


# Resumed == never stopped


def test_run_stopped_before_its_last_checkpoint_equals_the_one_that_never_stopped(
    raw: Sections, straight: Path, tmp_path: Path
) -> None:
    run = taken_up(changed(raw), tmp_path, 10)
    assert run.start == 9
    run.fit()
    assert outcome(tmp_path) == outcome(straight)


def test_resumed_run_equals_the_one_that_never_stopped_with_lines_over_several_steps(
    raw: Sections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "LOG_LINES", 2)  # a line over five steps, stopped within one
    fit(changed(raw), tmp_path / "straight")
    taken_up(changed(raw), tmp_path / "stopped", 7).fit()
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "straight")


def test_resumed_full_fine_tuning_equals_the_one_that_never_stopped(raw: Sections, tmp_path: Path) -> None:
    recipe = changed(raw, "train.method=full", "train.max_steps=6")
    fit(recipe, tmp_path / "straight")
    taken_up(recipe, tmp_path / "stopped", 5).fit()
    results = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("straight", "stopped")]
    assert results[0] == results[1]


VARIANTS = {
    "all biases, token rows": ["lora.bias=all", "lora.lora_bias=true", "lora.trainable_token_indices=[5, 6, 7]"],
    "VeRA": ["lora.update=vera"],
    "AdaLoRA, fast PiSSA": ["lora.update=adalora", "lora.target_r=2", "lora.init=pissa_niter_4"],
    "EVA": ["lora.init=eva"],
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_resumed_run_of_a_variant_equals_the_one_that_never_stopped_and_ships(
    raw: Sections, tmp_path: Path, words: list[str]
) -> None:
    recipe = changed(raw, "train.max_steps=6", *words)
    fit(recipe, tmp_path / "straight")
    taken_up(recipe, tmp_path / "stopped", 5).fit()
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "straight")
    scored = read_lines(tmp_path / "straight" / "predictions.jsonl")
    shipped = load(tmp_path / "straight").predict([line["text"] for line in scored])
    for answer, line in zip(shipped, scored, strict=True):
        assert answer["label"] == line["label"]
        assert answer["score"] == pytest.approx(line["score"], abs=1e-5)


def test_resuming_a_finished_run_changes_nothing(raw: Sections, straight: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(straight, tmp_path / "copy")
    resumed(changed(raw), folder).fit()
    assert outcome(folder) == outcome(straight)


def test_resuming_a_run_that_patience_ended_changes_nothing(raw: Sections, tmp_path: Path) -> None:
    words = ("train.eval_every=1", "train.checkpoint_every=1", "train.patience=1", "train.epochs=4")
    fit(changed(raw, *words), tmp_path)
    before = outcome(tmp_path)
    assert before["metrics"][-1]["is_best"] is False
    run = resumed(changed(raw, *words), tmp_path)
    run.fit()
    assert outcome(tmp_path) == before


def test_resume_takes_the_checkpoint_that_is_named(raw: Sections, straight: Path, tmp_path: Path) -> None:
    run = resumed(changed(raw), tmp_path, where=str(straight / "checkpoints" / "step-00000009"))
    assert run.start == 9


# What is kept, and damage


def test_last_checkpoints_are_kept(straight: Path) -> None:
    assert steps_kept(straight) == [9, 10]
    assert len(steps_kept(straight)) == KEEP


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink], ids=["truncated", "bit flipped", "deleted"])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    for name in ("state.safetensors", "state.json", "manifest.json"):
        folder = tmp_path / name
        for step in (3, 6):
            save_checkpoint(folder, Checkpoint(step, {"x": torch.full((3,), float(step))}, {"note": step}))
        harm(folder / "step-00000006" / name)
        checkpoint, (note,) = newest_checkpoint(folder)
        assert (checkpoint.step, checkpoint.state, checkpoint.tensors["x"].tolist()) == (3, {"note": 3}, [3.0] * 3)
        assert "step-00000006" in note
        assert "using the one before" in note


def test_run_goes_on_from_the_one_before_a_damaged_checkpoint(raw: Sections, straight: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(straight, tmp_path / "copy")
    flip_a_bit(folder / "checkpoints" / "step-00000010" / "state.safetensors")
    events: list[Event] = []
    assert resumed(changed(raw), folder, events.append).start == 9
    assert "step-00000010" in next(event.text for event in events if isinstance(event, Note))


def test_load_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    (tmp_path / "step-00000009").mkdir()
    with pytest.raises(OutputError, match="no complete checkpoint"):
        newest_checkpoint(tmp_path)
    saved = Checkpoint(7, {"a": torch.randn(2, 3), "b": torch.arange(4)}, {"k": [1.5, None]})
    save_checkpoint(tmp_path, saved)
    for loaded in (load_checkpoint(tmp_path / "step-00000007"), newest_checkpoint(tmp_path)[0]):
        assert (loaded.step, loaded.state) == (saved.step, saved.state)
        assert all(torch.equal(loaded.tensors[key], value) for key, value in saved.tensors.items())


# All or nothing


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        (OSError("no space"), OutputError),
        (SafetensorError("no space"), OutputError),
        (ValueError("a bug"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_atomic_folder_leaves_no_half_folder(tmp_path: Path, error: BaseException, caught: type[BaseException]) -> None:
    target = tmp_path / "above" / "adapter"
    for before in ([], ["old"]):  # what is there
        for name in before:
            target.mkdir(parents=True)
            (target / name).write_text("whole")
        with pytest.raises(caught), atomic_folder(target) as folder:
            (folder / "new").write_text("half")
            raise error
        assert [path.name for path in tmp_path.rglob("*")] == ["above", "adapter", "old"] * bool(before)
    with pytest.raises(OutputError, match="cannot be written"), atomic_folder(target / "old" / "adapter"):
        pytest.fail("there is nothing to fill")


def test_atomic_folder_puts_the_old_one_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("whole")
    rename = Path.rename

    def refuse_the_new_one(self: Path, to: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError("disk gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(OutputError, match="cannot be written"), atomic_folder(target, replace=True) as folder:
        (folder / "new").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert [p.name for p in target.iterdir()] == ["old"]


def test_atomic_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "adapter", replace=True) as folder:
            (folder / name).write_text(name)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["adapter", "adapter/second"]


@pytest.mark.parametrize("appears", ["folder", "empty folder", "file", "dangling link"])
def test_atomic_folder_does_not_replace_what_appeared_meanwhile(tmp_path: Path, appears: str) -> None:
    out = tmp_path / "above" / "out"
    with pytest.raises(OutputError, match="exists already"), atomic_folder(out) as folder:
        (folder / "ours").write_text("")
        if appears == "file":
            out.write_text("theirs")
        elif appears == "dangling link":
            out.symlink_to("nowhere")
        else:
            out.mkdir()
            if appears == "folder":
                (out / "theirs").write_text("")
    assert [str(p.relative_to(tmp_path)) for p in (tmp_path / "above").rglob("*")] == [
        "above/out",
        *["above/out/theirs"] * (appears == "folder"),
    ]


def test_one_of_three_that_write_the_same_folder_wins(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="exists already"),
        atomic_folder(tmp_path / "out") as one,
        pytest.raises(OutputError, match="exists already"),
        atomic_folder(tmp_path / "out") as other,
        atomic_folder(tmp_path / "out") as winner,
    ):
        for name, folder in (("one", one), ("other", other), ("winner", winner)):
            (folder / name).write_text("")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/winner"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_written_files_have_the_modes_of_new_files(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "sub" / "a.safetensors")
            (folder / "text").write_text("")
        atomic_text(tmp_path / "text", "")
    finally:
        os.umask(before)
    modes = {path: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert modes == {path: oct((0o777 if path.is_dir() else 0o666) & ~mask) for path in modes}
    assert len(modes) == 5


@pytest.mark.parametrize("following", [atomic_file, atomic_folder])
def test_what_killed_writers_left_goes_with_the_next_write_and_nothing_else(tmp_path: Path, following: Any) -> None:
    def write(kind: Any) -> None:
        with kind(tmp_path / "out") as place:
            (place / "half" if place.is_dir() else place).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    theirs = {".tmp-mine", ".tmp-mine-12", ".tmp-out-12-0@other", f".old-out-12-0@{HOST}"}
    for name in theirs:
        (tmp_path / name).write_text("")
    for kind in (atomic_file, atomic_folder):
        process = get_context("fork").Process(target=write, args=(kind,))
        process.start()
        process.join()
        (left,) = {
            path.name for path in tmp_path.iterdir()
        } - theirs  # the first one's went with the second one's write
        assert process.exitcode == -signal.SIGKILL and f"-{process.pid}-" in left
    reused = left.replace(str(process.pid), str(os.getpid()))  # a process that lives has the number now
    (tmp_path / left).rename(tmp_path / reused)
    with atomic_folder(tmp_path / "living") as living, following(tmp_path / "out") as new:
        assert {path.name for path in tmp_path.iterdir()} == {*theirs, living.name, new.name}


def test_file_that_is_no_regular_one_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        atomic_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_old_checkpoint_goes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, Checkpoint(step, {}, {}))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (path / "manifest.json").unlink(missing_ok=True))
    save_checkpoint(tmp_path, Checkpoint(3, {}, {}))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]


def test_atomic_text_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    atomic_text(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OutputError, match="cannot be written"):
        atomic_text(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("answers.jsonl", "old")]
