"""The folder of a run: made, locked, cleared of what a killed process left, refused where it holds something else.

A lock is a file that says whose it is, and that the system unlocks when its owner dies. It appears whole under its name, so
one with other content is another program's: that is never opened for writing, truncated or removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lorakit.engine.atomic import STORAGE, cannot_write, is_leftover, locked_temporary, make_folder, remove_leftovers
from lorakit.engine.events import Note, Report, ignore
from lorakit.errors import OutputError
from lorakit.recipe import UNSET

LOCK = ".lock"
TURN = ".workers"  # who holds this lock may write the tables of a search, or begin it
OWNER = re.compile(r"process \d{1,20} on \S{1,255}")  # what a lock says
RECIPE = "recipe.toml"  # the first file of a run

CHECKPOINTS = "checkpoints"
LEAVING_S = 1.0  # how long the last of several that share a lock may take to remove it

Check = Callable[[set[str]], None]  # raises where a folder with these names in it is not to be written to


@contextmanager
def run_folder(folder: Path, resume: str | None, report: Report = ignore) -> Iterator[None]:
    """Have a run folder to oneself; it is made if need be, and removed again where it stays empty.

    Raises:
        OutputError: another process trains there, it holds something that is not to be resumed, or it cannot be made.
    """

    def check(holds: set[str]) -> None:
        if resume is None and holds:
            raise OutputError(f"output.dir = {str(folder)!r} exists already; choose another one, or use --resume auto")
        if resume is not None and holds and not is_run(folder):
            raise OutputError(f"output.dir = {str(folder)!r} holds no run that could be resumed (no {RECIPE} of one)")
        if resume not in (None, "auto") and not Path(resume).is_dir():
            raise OutputError(f"--resume {resume}: no such checkpoint; say auto, or the folder of one")

    made = _make(folder)
    try:
        with locked(folder, check, "training", "output.dir", report):
            if (folder / CHECKPOINTS).is_dir():
                remove_leftovers(folder / CHECKPOINTS, alone=True)
            yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output.dir = {str(folder)!r} exists already, and is not a folder")
        return make_folder(folder)
    except OSError as err:
        if err.errno in STORAGE:
            raise cannot_write(folder, err) from err
        raise OutputError(f"output.dir = {str(folder)!r} cannot be made: {err.strerror}") from err


def is_run(folder: Path) -> bool:
    """Whether its recipe is one that a run has written; somebody's own would be written over."""
    try:
        return UNSET in (folder / RECIPE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


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
            f"{folder}: {_owner(path) or 'another process'} is {doing} there; wait for its end, or choose another {key}"
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
                        f"{path.parent}: its file system has no locks ({err.strerror}); see that no other run is there"
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
    return OutputError(
        f"{path} is another program's: a lock that lorakit has written names its process; move it elsewhere"
    )
