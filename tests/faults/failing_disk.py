"""A file system that dies or fails at a chosen operation, as seen by this process.

A power cut is part of a death: what was written and not synced by then is gone.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorakit.training import checkpoint

OPERATIONS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


class Killed(BaseException):
    """Stands for SIGKILL: no operation on files is done after it."""


class Disk:
    """Counts the operations that change files below a folder, and dies or fails at number `at` (from 1)."""

    def __init__(self, root: Path, at: int = 0, error: OSError | None = None) -> None:
        self.root, self.at, self.error = root, at, error
        self.count = 0
        self.dead = False
        self.unsynced: set[Path] = set()

    def before(self, name: str, path: Path | None) -> None:
        if path is not None and not path.absolute().is_relative_to(self.root):
            return
        if self.dead:
            raise Killed
        self.count += 1
        if self.count == self.at:
            if self.error is not None:
                raise self.error
            self.dead = True
            raise Killed

    def cut_power(self) -> None:
        """Lose what was never synced."""
        for path in self.unsynced:
            if path.is_file():
                path.write_bytes(b"")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, disk: Disk) -> Iterator[Disk]:
    """Let every operation on files go through the disk."""
    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, _watched(disk, name, getattr(os, name)))
        opened = io.open

        def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if set(mode) & set("wax+") and not isinstance(file, int):
                disk.before("open", Path(file))
                disk.unsynced.add(Path(file).absolute())
            return opened(file, mode, *args, **options)

        save_file = checkpoint.save_file

        def watched_save(tensors: Any, path: Any) -> None:
            disk.before("save_file", Path(path))
            disk.unsynced.add(Path(path).absolute())
            save_file(tensors, path)

        patch.setattr(io, "open", watched_open)
        patch.setattr(builtins, "open", watched_open)
        patch.setattr(checkpoint, "save_file", watched_save)
        yield disk
    disk.cut_power()


def _watched(disk: Disk, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        path = Path(f"/proc/self/fd/{args[0]}").readlink() if isinstance(args[0], int) else Path(args[0])
        if name in ("unlink", "rmdir") and options.get("dir_fd") is not None:
            path = Path(f"/proc/self/fd/{options['dir_fd']}").readlink() / path
        disk.before(name, path)
        done = function(*args, **options)
        if name == "fsync":
            disk.unsynced.discard(path.absolute())
        if name in ("rename", "replace"):
            _move(disk, path.absolute(), Path(args[1]).absolute())
        return done

    return call


def _move(disk: Disk, old: Path, new: Path) -> None:
    inside = {path for path in disk.unsynced if path == old or path.is_relative_to(old)}
    disk.unsynced = (disk.unsynced - inside) | {new / path.relative_to(old) for path in inside}
