"""Patterns and URLs to files of this machine."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

from lorakit.errors import DataError, first_line

COPIES = "files"  # below the folder that copies are put into


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the names and patterns mean, in their order, those of one pattern sorted.

    Raises:
        DataError: a pattern matches no file, or a file is meant twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        # pathlib's globs cannot begin at a root
        matches = [pattern] if Path(pattern).is_file() else sorted(glob(pattern, recursive=True))  # noqa: PTH207
        files = [path for match in matches if (path := Path(match)).is_file()]
        if not files:
            folder = f": it is a folder, whose files are '{pattern.rstrip('/')}/*.parquet'" if matches else ""
            raise DataError(f"{pattern}: no such file{folder}")
        found += files
    if twice := next((path for i, path in enumerate(found) if path in found[:i]), None):
        raise DataError(f"{twice}: named twice")
    return found


def means_files(source: str) -> bool:
    """Whether a source is a pattern or a URL, and no name of one file, folder or data set."""
    return "://" in source or (bool(re.search(r"[*?\[]", source)) and not Path(source).exists())


def files_of(source: str, folder: Path | None = None) -> list[Path]:
    """The files that a pattern or a URL means, sorted; copies in `folder` where they are on no disk of this machine.

    A URL is what fsspec knows (s3://, gs://, hf://, ...) with the package for its protocol, and may be a pattern too. A
    file is copied once, and again when it has changed there.

    Raises:
        DataError: there is no such file, it cannot be fetched, or there is no folder to put it into.
    """
    if "://" not in source:
        return find_files([source])
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(source)
        names = sorted(name for name in system.glob(path) if system.isfile(name))
        if not names:
            raise FileNotFoundError("no such file")
        return [_fetched(system, name, source, folder) for name in names]
    except DataError:
        raise
    except ImportError as err:
        raise DataError(f"{source}: the package that reads such URLs is missing: {first_line(err)}") from err
    except Exception as err:  # every file system has errors of its own
        raise DataError(f"{source}: cannot be read: {first_line(err)}") from err


def _fetched(system: Any, name: str, source: str, folder: Path | None) -> Path:
    if "file" in system.protocol:
        return Path(name)
    if folder is None:
        raise DataError(f"{source}: name a folder for copies of files from elsewhere, with data.cache=FOLDER")
    version = str(system.ukey(name))[:16]
    place = folder / COPIES / version / PurePosixPath(name).name
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as unfinished:
            part = Path(unfinished) / place.name
            system.get_file(name, str(part))
            part.replace(place)
    return place
