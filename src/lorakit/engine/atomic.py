"""Files and folders that are there whole or not at all, whenever the process or the machine dies.

What is written stands under a temporary name until it is whole, and is locked meanwhile: the system takes the lock from a
process that dies, so what carries such a name and no lock is what a killed process left, whatever process has its number now.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from lorakit.errors import OutputError, StorageError

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)  # of a rename to a name that is in use
HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())
LEFTOVER = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)-\d+-\d+@(?P<host>[\w.-]+)", re.DOTALL)
_numbers = itertools.count()


@contextmanager
def atomic_folder(folder: Path, size: int | None = None, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `folder` by one rename; `folder` itself is never half written.

    With `replace` it takes the place of one that is there. Its files get the modes that the umask gives to new ones. `size` is
    what is going to be written, in bytes, for the message of a full disk.

    Raises:
        OutputError: it cannot be written (a StorageError where the disk is at fault), or somebody else has made it in the
            meantime; what was there before is whole.
    """
    made: list[Path] = []
    try:
        made = make_folder(folder.parent)
        remove_leftovers(folder.parent)
        temporary, descriptor = locked_temporary(folder, Path.mkdir)
        try:
            yield temporary
            _settle(temporary)
            if replace:
                _replace(folder, temporary)
            else:
                _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(descriptor)
    except (OSError, SafetensorError) as err:  # safetensors has its own error for a full disk
        raise cannot_write(folder, err, size) from err
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


@contextmanager
def atomic_file(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` by one rename; `size` and errors as `atomic_folder`."""
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: is not a regular file, so it cannot be replaced by one; name another file")
        remove_leftovers(path.parent)
        temporary, descriptor = locked_temporary(path, lambda path: path.touch(exist_ok=False))
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            with suppress(OSError):  # an error of tidying up would hide the one that led to it
                temporary.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as err:
        raise cannot_write(path, err, size) from err


def atomic_text(path: Path, text: str) -> None:
    """Write a text file as one unit: the whole new one, or the old one untouched."""
    data = text.encode()
    with atomic_file(path, len(data)) as temporary:
        temporary.write_bytes(data)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it, so that they outlive a loss of power; gives those that were not there."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)
    return missing


def remove_folder(folder: Path) -> None:
    """Remove a folder, which is there whole or not at all meanwhile; where it cannot be removed it stays."""
    aside = temporary_name(folder)
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, *, alone: bool = False) -> None:
    """Remove what killed processes of this machine left unfinished in a folder.

    With `alone` nobody else writes there: what other machines left goes too, and what was moved aside is put back.
    """
    with suppress(OSError):  # may be written to, but not listed
        for path in list(folder.iterdir()):
            if not (found := LEFTOVER.fullmatch(path.name)):
                continue
            whole = folder / found["name"]
            if found["kind"] == "old" and alone and not os.path.lexists(whole):
                path.rename(whole)
            elif alone or (found["kind"] == "tmp" and found["host"] == HOST):
                _remove_unlocked(path, without_locks=alone)


def is_leftover(name: str) -> bool:
    """Whether it is a name under which only this module writes."""
    return bool(LEFTOVER.fullmatch(name))


def locked_temporary(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new temporary file or folder beside `path`, and the descriptor whose lock says that its writer lives."""
    while True:
        temporary = temporary_name(path)
        try:
            make(temporary)
        except FileExistsError:  # of a process that had the same number
            continue
        with suppress(FileNotFoundError):  # removed as a leftover before it was locked
            descriptor = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_RDWR)
            with suppress(OSError):  # a file system without locks, where leftovers stay
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, descriptor
            os.close(descriptor)


def temporary_name(path: Path, kind: Literal["tmp", "old"] = "tmp") -> Path:
    """A name beside `path` that nothing else has: what stands there under `tmp` is removed, under `old` put back."""
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}-{next(_numbers)}@{HOST}")


def cannot_write(path: Path, err: Exception, size: int | None = None) -> OutputError:
    """The error for a file or folder that an operation failed to write; `size` is what it would take, in bytes."""
    number = getattr(err, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(err))):  # as libraries in Rust say it
        number = int(found[1])
    words = os.strerror(number) if number else str(err)
    if number not in STORAGE:
        return OutputError(f"{path}: cannot be written: {words}")
    room = [] if size is None else [f"{size:,} bytes needed"]
    with suppress(OSError):  # a disk that fails may not tell
        there = next(parent for parent in path.absolute().parents if parent.is_dir())
        room.append(f"{shutil.disk_usage(there).free:,} bytes free there")
    return StorageError(f"{path}: cannot be written: {words} ({', '.join(room)})")


def _remove_unlocked(path: Path, without_locks: bool) -> None:
    """Remove a temporary file or folder unless its writer lives; `without_locks` also where nothing can be locked."""
    with suppress(OSError):
        kind = os.O_RDONLY if path.is_dir() else os.O_RDWR  # NFS locks no file that is not open for writing
        descriptor = os.open(path, kind | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as err:
                if isinstance(err, BlockingIOError) or not without_locks:
                    raise
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        finally:
            os.close(descriptor)


def _settle(folder: Path) -> None:
    """Give a folder's files the modes of new files (safetensors lets only their owner read them), and sync all."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(mode)
        _sync(path)


def _move(new: Path, folder: Path) -> None:
    """Let `new` become `folder`, which is not there."""
    try:
        if os.path.lexists(folder):  # else an empty folder would be replaced
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        new.rename(folder)
    except OSError as err:
        if err.errno not in TAKEN:
            raise
        raise OutputError(
            f"{folder} exists already: it appeared while this was written; choose another folder"
        ) from err
    _sync(folder.parent)


def _replace(folder: Path, new: Path) -> None:
    """Let `new` take the place of `folder`; where that fails, the old one is back."""
    old = temporary_name(folder, "old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
