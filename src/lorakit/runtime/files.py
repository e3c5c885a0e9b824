"""Files and folders that exist complete or not at all, whenever the process or the machine dies.

A file is written under a temporary name and locked until it is complete. The system releases the lock of a process that dies,
so a temporary name without a lock is a leftover of a killed process.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from lorakit.errors import OutputError, StorageError
from lorakit.runtime.events import Note, Report, ignore

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)  # of a rename to an existing name
HOST = re.sub(r"[^\w.-]", "_", socket.gethostname())
LEFTOVER = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)-\d+-\d+@(?P<host>[\w.-]+)", re.DOTALL)
_numbers = itertools.count()


@contextmanager
def atomic_folder(folder: Path, size: int | None = None, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `folder` by one rename; `folder` itself is never half written.

    With `replace` it replaces an existing one. Its files get the modes of the umask. `size` is the number of bytes to write,
    for the message of a full disk.

    Raises:
        OutputError: it cannot be written (a StorageError if the disk is at fault), or another process created it in the
            meantime; what was there before is intact.
    """
    made: list[Path] = []
    try:
        made = make_folder(folder.parent)
        remove_leftovers(folder.parent)
        temporary, descriptor = locked_temporary(folder, Path.mkdir)
        try:
            yield temporary
            # safetensors makes files readable only by their owner
            mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
            for path in (*temporary.rglob("*"), temporary):
                if path.is_file():
                    path.chmod(mode)
                _sync(path)
            _move(temporary, folder, replace=replace)
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
            raise OutputError(f"{path}: is not a regular file, so it cannot be replaced; choose another file")
        remove_leftovers(path.parent)
        temporary, descriptor = locked_temporary(path, lambda path: path.touch(exist_ok=False))
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            with suppress(OSError):  # an error in cleaning up would hide the first one
                temporary.unlink(missing_ok=True)
            os.close(descriptor)
    except OSError as err:
        raise cannot_write(path, err, size) from err


def atomic_text(path: Path, text: str) -> None:
    """Write a text file atomically: either the complete new one, or the old one unchanged."""
    data = text.encode()
    with atomic_file(path, len(data)) as temporary:
        temporary.write_bytes(data)


def atomic_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, for people to read too."""
    atomic_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and its parents durably; returns those that did not exist."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)
    return missing


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically; if it cannot be removed it stays."""
    aside = temporary_name(folder)
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, *, alone: bool = False) -> None:
    """Remove unfinished files of killed processes of this machine from a folder.

    With `alone` no other process writes there: leftovers of other machines are removed too, and what was moved aside is restored.
    """
    with suppress(OSError):  # may be writable but not readable
        for path in list(folder.iterdir()):
            if not (match := LEFTOVER.fullmatch(path.name)):
                continue
            whole = folder / match["name"]
            if match["kind"] == "old" and alone and not os.path.lexists(whole):
                path.rename(whole)
            elif alone or (match["kind"] == "tmp" and match["host"] == HOST):
                _remove_unlocked(path, without_locks=alone)


def is_leftover(name: str) -> bool:
    """Whether it is one of this module's temporary names."""
    return bool(LEFTOVER.fullmatch(name))


def locked_temporary(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new temporary file or folder beside `path`, and the descriptor whose lock shows that its writer is alive."""
    while True:
        temporary = temporary_name(path)
        try:
            make(temporary)
        except FileExistsError:  # of a process with the same number
            continue
        with suppress(FileNotFoundError):  # removed as a leftover before it was locked
            descriptor = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_RDWR)
            with suppress(OSError):  # a file system without locks, where leftovers stay
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, descriptor
            os.close(descriptor)


def temporary_name(path: Path, kind: Literal["tmp", "old"] = "tmp") -> Path:
    """An unused name beside `path`: an existing `tmp` is removed, an existing `old` is restored."""
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}-{next(_numbers)}@{HOST}")


def cannot_write(path: Path, err: Exception, size: int | None = None) -> OutputError:
    """The error for a file or folder that could not be written; `size` is the number of bytes needed."""
    number = getattr(err, "errno", None)
    if number is None and (match := re.search(r"os error (\d+)", str(err))):  # the format of libraries in Rust
        number = int(match[1])
    words = os.strerror(number) if number else str(err)
    if number not in STORAGE:
        return OutputError(f"{path}: cannot be written: {words}")
    room = [] if size is None else [f"{size:,} bytes needed"]
    with suppress(OSError):  # a failing disk may not report it
        there = next(parent for parent in path.absolute().parents if parent.is_dir())
        room.append(f"{shutil.disk_usage(there).free:,} bytes free there")
    return StorageError(f"{path}: cannot be written: {words} ({', '.join(room)})")


def _remove_unlocked(path: Path, without_locks: bool) -> None:
    """Remove a temporary file or folder unless its writer is alive; `without_locks` also if locking is not possible."""
    with suppress(OSError):
        kind = os.O_RDONLY if path.is_dir() else os.O_RDWR  # NFS only locks files open for writing
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


def _move(new: Path, folder: Path, *, replace: bool) -> None:
    """Rename `new` to `folder`, which does not exist, or is replaced; if that fails, the old one is restored."""
    old = temporary_name(folder, "old")
    if replace and folder.exists():
        folder.rename(old)
    try:
        if not replace and os.path.lexists(folder):  # otherwise an empty folder would be replaced
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        new.rename(folder)
    except OSError as err:
        if old.exists():
            old.rename(folder)
        if replace or err.errno not in TAKEN:
            raise
        raise OutputError(
            f"{folder} exists already; another process has just created it; choose another folder"
        ) from err
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
# A lock is a file that names its owner, and that the system unlocks when the owner dies. It appears complete, so a lock file
# with other content is another program's, and is never opened for writing, truncated or removed.

LOCK = ".lock"
OWNER = re.compile(r"process \d{1,20} on \S{1,255}")  # the content of a lock

Check = Callable[[set[str]], None]  # raises if a folder with these names in it must not be written to


@contextmanager
def locked(folder: Path, check: Check, doing: str, key: str, report: Report = ignore) -> Iterator[None]:
    """Hold a folder's lock; leftovers of killed processes are removed first.

    `check` gets the names in the folder before anything in it is touched, and again under the lock.

    Raises:
        OutputError: another process holds it, which is `doing` something there (`key` is the option for another folder);
            or the lock is another program's or cannot be written.
    """
    path = folder / LOCK
    if not is_lock(path):
        check(_names(folder))
    try:
        descriptor = _acquire(path, report)
    except BlockingIOError as err:
        raise OutputError(
            f"{folder}: {_owner(path) or 'another process'} is {doing} there; wait until it ends, or choose another {key}"
        ) from err
    except OSError as err:
        raise cannot_write(path, err) from err
    try:
        check(_names(folder))
        remove_leftovers(folder, alone=True)
        yield
    finally:
        with suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


def is_lock(path: Path) -> bool:
    """Whether it is one of our locks, of a living or a dead process."""
    return _owner(path) is not None


def _names(folder: Path) -> set[str]:
    """The names in a folder without our locks and leftovers."""
    names = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    return names - {LOCK} if is_lock(folder / LOCK) else names


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
    """The owner of a lock; None if it is not one of ours."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return None
    text = os.pread(descriptor, 500, 0).decode(errors="replace")
    return text if OWNER.fullmatch(text) else None


def _acquire(path: Path, report: Report) -> int:
    """Lock: the descriptor of a new lock, or one taken over from a dead process.

    Raises:
        BlockingIOError: another process holds it. OutputError: it is another program's. OSError: it cannot be written.
    """
    while path.parent.is_dir():
        is_new = not os.path.lexists(path)
        try:
            descriptor = _create(path) if is_new else os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileExistsError, FileNotFoundError):  # another process was faster
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
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError as err:
                report(
                    Note(
                        f"{path.parent}: its file system has no locks ({err.strerror}); make sure no other run uses it"
                    )
                )
            else:
                if not _is_at(descriptor, path):  # its owner has removed it
                    continue
                if not is_new:
                    report(Note(f"{path.parent}: stale lock of {owner} (no longer running); taking over"))
                    return _create(path, replace=True)
            stack.pop_all()
            return descriptor
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _create(path: Path, *, replace: bool = False) -> int:
    """A new lock that names this process, locked before it is visible. Raises a FileExistsError if there is one."""
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


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _not_ours(path: Path) -> OutputError:
    return OutputError(f"{path} is another program's (lorakit's locks name their process); move it elsewhere")
