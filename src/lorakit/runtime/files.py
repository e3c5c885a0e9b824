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
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from lorakit.errors import OutputError, StorageError
from lorakit.runtime.events import Note, Report, ignore

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
            raise OutputError(f"{path}: is not a regular file, so it cannot be replaced; name another file")
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
            if not (match := LEFTOVER.fullmatch(path.name)):
                continue
            whole = folder / match["name"]
            if match["kind"] == "old" and alone and not os.path.lexists(whole):
                path.rename(whole)
            elif alone or (match["kind"] == "tmp" and match["host"] == HOST):
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
    if number is None and (match := re.search(r"os error (\d+)", str(err))):  # as libraries in Rust say it
        number = int(match[1])
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
        raise OutputError(f"{folder} was created by something else in the meantime; choose another folder") from err
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


# Locks
#
# A lock is a file that says whose it is, and that the system unlocks when its owner dies. It appears whole under its name, so
# one with other content is another program's: that is never opened for writing, truncated or removed.

LOCK = ".lock"
TURN = ".workers"  # who holds this lock may write the tables of a search, or begin it
OWNER = re.compile(r"process \d{1,20} on \S{1,255}")  # what a lock says
LEAVING_S = 1.0  # how long the last of several that share a lock may take to remove it

Check = Callable[[set[str]], None]  # raises where a folder with these names in it is not to be written to


@contextmanager
def locked(
    folder: Path, check: Check, doing: str, key: str, report: Report = ignore, *, shared: bool = False
) -> Iterator[None]:
    """Hold a folder's lock, alone or with others who `share` it; what killed processes left there is removed first.

    `check` sees what the folder holds before anything in it is touched, and again under the lock.

    Raises:
        OutputError: another process holds it, which is `doing` something there; `key` is what names another folder. The
            lock is another program's, or cannot be written.
    """
    path = folder / LOCK
    if not is_lock(path):
        check(_names(folder))
    try:
        descriptor = _acquire(path, report, shared=shared)
    except BlockingIOError as err:
        raise OutputError(
            f"{folder}: {_owner(path) or 'another process'} is {doing} there; wait until it ends, or choose another {key}"
        ) from err
    except OSError as err:
        raise cannot_write(path, err) from err
    with _released(path, descriptor, shared):
        check(_names(folder))
        remove_leftovers(folder, alone=not shared)
        yield


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Do something that two processes must not do at once: others wait for their turn at the lock `path`."""
    with _released(path, _acquire(path, ignore, wait=True)):
        yield


def is_lock(path: Path) -> bool:
    """Whether it is a lock that we have written, of a living process or of a dead one."""
    return _owner(path) is not None


def _names(folder: Path) -> set[str]:
    """What a folder holds besides our locks and what a killed process left."""
    names = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    return names - {name for name in (LOCK, TURN) if is_lock(folder / name)}


def _owner(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _owner_in(descriptor)
    finally:
        os.close(descriptor)


def _owner_in(descriptor: int) -> str | None:
    """Whose lock it is; None where it is not one of ours."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return None
    text = os.pread(descriptor, 500, 0).decode(errors="replace")
    return text if OWNER.fullmatch(text) else None


def _acquire(path: Path, report: Report, *, shared: bool = False, wait: bool = False) -> int:
    """The descriptor of the lock, new or taken over from a dead process.

    Raises:
        BlockingIOError: others hold it. OutputError: it is another program's. OSError: it cannot be written.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    until = time.monotonic() + LEAVING_S
    while path.parent.is_dir():
        is_new = not os.path.lexists(path)
        try:
            descriptor = _create(path) if is_new else os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileExistsError, FileNotFoundError):  # another process was quicker
            continue
        except OSError as err:
            if err.errno == errno.ELOOP:
                raise _not_ours(path) from err
            raise
        with ExitStack() as stack:
            stack.callback(os.close, descriptor)
            if (owner := _owner_in(descriptor)) is None:
                raise _not_ours(path)
            try:
                fcntl.flock(descriptor, how)
            except BlockingIOError:
                if not shared or time.monotonic() > until:
                    raise
                time.sleep(LEAVING_S / 20)
                continue
            except OSError as err:
                report(
                    Note(
                        f"{path.parent}: its file system has no locks ({err.strerror}); make sure no other run uses it"
                    )
                )
            else:
                if not _is_at(descriptor, path):  # its owner has removed it
                    continue
                if not (is_new or shared):
                    if not wait:
                        report(Note(f"{path.parent}: stale lock of {owner} (no longer running); taking over"))
                    return _create(path, replace=True)
            stack.pop_all()
            return descriptor
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _create(path: Path, *, replace: bool = False) -> int:
    """The descriptor of a new lock with our name in it, held before it is seen. Raises a FileExistsError where one is there."""
    temporary, descriptor = locked_temporary(path, lambda path: path.touch(exist_ok=False))
    try:
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            if not replace:
                os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            replace = True
        if replace:
            temporary.replace(path)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _released(path: Path, descriptor: int, shared: bool = False) -> Iterator[None]:
    """Remove the lock and give it back in the end; of several that share it the last one does."""
    try:
        yield
    finally:
        with suppress(OSError):
            if shared:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _not_ours(path: Path) -> OutputError:
    return OutputError(f"{path} was not written by lorakit, whose locks name their process; move it elsewhere")
