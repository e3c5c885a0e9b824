"""Files and folders that are there whole or not at all, whenever the process or the machine dies."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lorakit.errors import OutputError, StorageError

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
LEFTOVER = re.compile(r"\.(tmp|old)-(?P<name>.+)-\d+")  # what a killed process may leave; the number is its own


@contextmanager
def atomic_folder(folder: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `folder` by one rename; `folder` itself is never half written.

    `size` is what is going to be written, in bytes, for the message of a full disk.

    Raises:
        OutputError: it cannot be written (a StorageError where the disk is at fault); what was there before is whole.
    """
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        make_folder(folder.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        _replace(folder, temporary)
    except (OSError, SafetensorError) as err:  # safetensors has its own error for a full disk
        raise cannot_write(folder, err, size) from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` by one rename; `size` and errors as `atomic_folder`."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as err:
        raise cannot_write(path, err, size) from err
    finally:
        with suppress(OSError):  # an error of tidying up would hide the one that led to it
            temporary.unlink(missing_ok=True)


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


def sweep(folder: Path) -> None:
    """Take away what a killed process left unfinished in a folder, and put back what it had moved aside.

    To be called by the one process that writes there.
    """
    for path in list(folder.iterdir()):
        if found := LEFTOVER.fullmatch(path.name):
            whole = folder / found["name"]
            if path.name.startswith(".old-") and not whole.exists():
                path.rename(whole)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


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


def _replace(folder: Path, new: Path) -> None:
    """Let `new` take the place of `folder`; where that fails, the old one is back."""
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
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
