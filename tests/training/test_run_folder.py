"""The run folder: whose it is, what is cleared away, what is refused, and what is left behind (nothing)."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pytest

from lorakit.errors import OutputError, StorageError
from lorakit.recipe import UNSET
from lorakit.runtime.events import Event, Note
from lorakit.runtime.files import HOST, LOCK, locked
from lorakit.training.run_files import run_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_that_holds_anything_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"), run_folder(tmp_path, None):
        pytest.fail("it is not ours")
    with pytest.raises(OutputError, match=r"contains no run .*recipe\.toml"), run_folder(tmp_path, "auto"):
        pytest.fail("it is not ours")
    assert names(tmp_path) == ["notes.txt"]


def test_folder_is_made_and_kept_if_it_was_used(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with run_folder(folder, None):
        (folder / "recipe.toml").write_text("")
    assert names(folder) == ["recipe.toml"]


def test_folder_that_stays_empty_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_folder(tmp_path / "runs" / "new", None):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_empty_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    with run_folder(tmp_path, None):
        assert names(tmp_path) == [LOCK]
    assert tmp_path.is_dir()


def test_second_run_in_the_same_folder_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    owner = f"process {os.getpid()} on {socket.gethostname()} is training there"
    with run_folder(tmp_path, None):
        for resume in (None, "auto"):
            with pytest.raises(OutputError, match=owner), run_folder(tmp_path, resume):
                pytest.fail("it is taken")
        assert names(tmp_path) == [LOCK]
    with run_folder(tmp_path, None):
        pass


def test_lock_of_a_dead_process_is_taken_over_and_told(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 7 on node3")
    told: list[Event] = []
    with run_folder(tmp_path, None, told.append):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert told == [Note(f"{tmp_path}: stale lock of process 7 on node3 (no longer running); taking over")]
    assert names(tmp_path) == []


def test_leftovers_of_a_dead_process_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f"{UNSET}data.test")
    for name in (".tmp-notes-12", ".tmp-metrics.jsonl-12-0@node3", ".oldest", "checkpoints/.tmp-mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    for name in (f".tmp-adapter-12-0@{HOST}", ".old-adapter-12-1@node3", ".old-model-12-2@node3", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-step-00000003-12-3@node3").mkdir()
    with run_folder(tmp_path, "auto"):
        assert names(tmp_path) == [LOCK, ".oldest", ".tmp-notes-12", "adapter", "checkpoints", "model", "recipe.toml"]
        assert names(tmp_path / "checkpoints") == [".tmp-mine"]


@pytest.mark.parametrize("content", ["", "somebody", "process 7 on node3\n", f"process 7 on {'x' * 600}", None])
def test_lock_of_another_program_is_left_as_it_is(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "target").write_text("mine")
    for i, (resume, is_run) in enumerate(product((None, "auto"), (False, True))):
        folder = tmp_path / f"other-{i}"
        folder.mkdir()
        if is_run:
            (folder / "recipe.toml").write_text(f"{UNSET}data.test")
        if content is None:
            (folder / LOCK).symlink_to(tmp_path / "target")
        else:
            (folder / LOCK).write_text(content)
        before = (folder / LOCK).lstat()
        with pytest.raises(OutputError, match="other-"), run_folder(folder, resume):
            pytest.fail("it is not ours")
        assert (folder / LOCK).lstat() == before
        assert (folder / LOCK).read_text() == ("mine" if content is None else content)


def test_pipe_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f"{UNSET}data.test")
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(OutputError, match="another program's"), run_folder(tmp_path, "auto"):
        pytest.fail("it is not ours")
    assert (tmp_path / LOCK).is_fifo()


def test_recipe_that_a_user_has_written_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[data]\ntrain = 'a.csv'")
    with pytest.raises(OutputError, match="contains no run"), run_folder(tmp_path, "auto"):
        pytest.fail("its recipe would be written over")
    assert names(tmp_path) == ["recipe.toml"]


def test_lock_is_held_by_one_of_many_processes(tmp_path: Path) -> None:
    """Eight processes take turns at a lock, each time taken over, removed or made anew; none is there with another."""

    def count(lock: Path, n: int) -> None:
        while n:
            with suppress(OutputError), locked(lock.parent, lambda holds: None, "counting", "folder"):
                at = int((tmp_path / "count").read_text())
                time.sleep(0.0005)
                (tmp_path / "count").write_text(str(at + 1))
                n -= 1

    (tmp_path / "count").write_text("0")
    processes = [get_context("fork").Process(target=count, args=(tmp_path / LOCK, 20)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "160" and names(tmp_path) == ["count"]


def test_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/run.* cannot be created"), run_folder(tmp_path / "file" / "run", None):
        pytest.fail("there is no folder")
    with pytest.raises(OutputError, match="not a folder"), run_folder(tmp_path / "file", None):
        pytest.fail("there is no folder")


def test_read_only_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"cannot be written: Read-only file system \(.* bytes free there\)"):
        run_folder(tmp_path / "new", None).__enter__()
