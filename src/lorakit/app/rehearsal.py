"""Where verbs that write a folder may write it, and their `--dry-run`: all is done and checked, and thrown away."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import OutputError


@contextmanager
def place_to_write(out: Path, dry_run: bool) -> Iterator[Path]:
    """Where to write what is asked for at `out`: there, or with `dry_run` in a folder that goes away again.

    Raises:
        OutputError: `out` exists, or there can be no folder.
    """
    check_free(out)
    if not dry_run:
        yield out
        return
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise OutputError(f"--out {out}: cannot be written: {above} is not a folder")
    with tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
        yield Path(folder) / (out.name or "out")


def check_free(out: Path) -> None:
    """Raise an OutputError where a command would write over something."""
    if os.path.lexists(out):
        raise OutputError(f"--out {out} exists already; choose another folder")
