"""The run folder: whose it is, what is cleared away, what is refused, and what is left behind (nothing)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lorakit.engine.events import Event, Note
from lorakit.engine.run_folder import LOCK, run_folder
from lorakit.errors import OutputError, StorageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_that_holds_anything_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"), run_folder(tmp_path, None):
        pytest.fail("it is not ours")
    with pytest.raises(OutputError, match=r"holds no run .*recipe\.toml"), run_folder(tmp_path, "auto"):
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
    assert told == [Note(f"{tmp_path}: process 7 on node3 ended there without a word; its place is taken over")]


def test_leftovers_of_a_dead_process_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    for name in ("recipe.toml", ".tmp-notes", ".tmp-metrics.jsonl-12", ".oldest", "checkpoints/.tmp-mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    for name in (".tmp-adapter-12", ".old-adapter-12", ".old-model-12", "model", "checkpoints/.tmp-step-00000003-12"):
        (tmp_path / name).mkdir(parents=True)
    with run_folder(tmp_path, "auto"):
        assert names(tmp_path) == [LOCK, ".oldest", ".tmp-notes", "adapter", "checkpoints", "model", "recipe.toml"]
        assert names(tmp_path / "checkpoints") == [".tmp-mine"]


def test_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/run.* cannot be made"), run_folder(tmp_path / "file" / "run", None):
        pytest.fail("there is no folder")
    with pytest.raises(OutputError, match="no folder"), run_folder(tmp_path / "file", None):
        pytest.fail("there is no folder")


def test_read_only_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"cannot be written: Read-only file system \(.* bytes free there\)"):
        run_folder(tmp_path / "new", None).__enter__()
