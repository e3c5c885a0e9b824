"""The folder of a run: made, locked, cleared of what a killed process left, refused where it holds something else."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.engine.atomic import STORAGE, cannot_write, make_folder, sweep
from lorakit.engine.events import Note, Report, ignore
from lorakit.errors import OutputError

LOCK = ".lock"
RECIPE = "recipe.toml"  # the first file of a run
CHECKPOINTS = "checkpoints"


@contextmanager
def run_folder(folder: Path, resume: str | None, report: Report = ignore) -> Iterator[None]:
    """Have a run folder to oneself; it is made if need be, and taken away again where it stays empty.

    Raises:
        OutputError: another process trains there, it holds something that is not to be resumed, or it cannot be made.
    """
    made = _make(folder)
    try:
        with locked(folder, report, "training", "output.dir"):
            _check(folder, resume)
            for place in (folder, folder / CHECKPOINTS):
                if place.is_dir():
                    sweep(place)
            yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output.dir = {str(folder)!r} exists already, and is no folder")
    try:
        return make_folder(folder)
    except OSError as err:
        if err.errno in STORAGE:
            raise cannot_write(folder, err) from err
        raise OutputError(f"output.dir = {str(folder)!r} cannot be made: {err.strerror}") from err


def _check(folder: Path, resume: str | None) -> None:
    """Refuse a folder that holds anything, unless the run in it is to be resumed."""
    holds = {path.name for path in folder.iterdir()} - {LOCK}
    if resume is None and holds:
        raise OutputError(f"output.dir = {str(folder)!r} exists already; choose another one, or use --resume auto")
    if resume is not None and holds and RECIPE not in holds:
        raise OutputError(f"output.dir = {str(folder)!r} holds no run that could be resumed (no {RECIPE})")
    if resume not in (None, "auto") and not Path(resume).is_dir():
        raise OutputError(f"--resume {resume}: no such checkpoint; say auto, or the folder of one")


@contextmanager
def locked(folder: Path, report: Report, doing: str, key: str) -> Iterator[None]:
    """Hold the folder's lock, which the system takes from a process that dies; the file says whose it is or was.

    Raises:
        OutputError: another process holds it, which is `doing` something there; `key` is what names another folder.
    """
    path = folder / LOCK
    try:
        descriptor = _open_locked(path, report)
    except BlockingIOError as err:
        raise OutputError(
            f"{folder}: {path.read_text()} is {doing} there; wait for its end, or choose another {key}"
        ) from err
    except OSError as err:
        raise cannot_write(path, err) from err
    try:
        if owner := os.pread(descriptor, 200, 0).decode(errors="replace"):
            report(Note(f"{folder}: {owner} ended there without a word; its place is taken over"))
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(path: Path, report: Report) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as err:
            report(
                Note(f"{path.parent}: its file system has no locks ({err.strerror}); see that no other run is there")
            )
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its owner took the file away while it was opened here
