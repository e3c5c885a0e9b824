"""The folder of a run: created, locked, cleared of leftovers of killed processes, refused if it holds something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import OutputError
from lorakit.recipe import UNSET
from lorakit.runtime.events import Report, ignore
from lorakit.runtime.files import STORAGE, cannot_write, locked, make_folder, remove_leftovers

RECIPE = "recipe.toml"  # the first file of a run

CHECKPOINTS = "checkpoints"


@contextmanager
def run_folder(folder: Path, resume: str | None, report: Report = ignore, *, shared: bool = False) -> Iterator[None]:
    """Lock a run folder, exclusively or `shared` with others; it is created if needed, and removed again if it stays empty.

    Raises:
        OutputError: another process trains there, it holds something that cannot be resumed, or it cannot be created.
    """

    def check(holds: set[str]) -> None:
        if resume is None and holds:
            raise OutputError(f"output.dir = {str(folder)!r} exists already; choose another one, or use --resume auto")
        if resume is not None and holds and not is_run(folder):
            raise OutputError(f"output.dir = {str(folder)!r} holds no run to resume (no {RECIPE})")
        if resume not in (None, "auto") and not Path(resume).is_dir():
            raise OutputError(f"--resume {resume}: no such checkpoint; use auto, or the folder of one")

    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output.dir = {str(folder)!r} exists already, and is not a folder")
        made = make_folder(folder)
    except OSError as err:
        if err.errno in STORAGE:
            raise cannot_write(folder, err) from err
        raise OutputError(f"output.dir = {str(folder)!r} cannot be created: {err.strerror}") from err
    try:
        with locked(folder, check, "training", "output.dir", report, shared=shared):
            if (folder / CHECKPOINTS).is_dir():
                remove_leftovers(folder / CHECKPOINTS, alone=True)
            yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def is_run(folder: Path) -> bool:
    """Whether its recipe was written by a run; a user's own would be overwritten."""
    try:
        return UNSET in (folder / RECIPE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
