"""Which files a source means: patterns, URLs, and folders of texts or of tables."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

from lorakit.data.delimited import Row
from lorakit.data.example import Columns
from lorakit.data.text import counted, inner_name, listed, read_text
from lorakit.errors import DataError, first_line, short

COPIES = "files"  # below the folder that copies are put into


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the names and patterns mean, in their order, those of one pattern sorted.

    Raises:
        DataError: a pattern matches no file, or a file is meant twice.
    """
    paths: list[Path] = []
    for pattern in patterns:
        # pathlib's globs cannot begin at a root
        matches = [pattern] if Path(pattern).is_file() else sorted(glob(pattern, recursive=True))  # noqa: PTH207
        files = [path for match in matches if (path := Path(match)).is_file()]
        if not files:
            folder = f": it is a folder; its files are '{pattern.rstrip('/')}/*.parquet'" if matches else ""
            raise DataError(f"{pattern}: no such file{folder}")
        paths += files
    if twice := next((path for i, path in enumerate(paths) if path in paths[:i]), None):
        raise DataError(f"{twice}: named twice")
    return paths


def exists(source: str) -> bool:
    """Whether a source is the name of a file or folder. Raises a DataError for a name that none can have."""
    try:
        return Path(source).exists()
    except OSError as err:
        raise DataError(f"{short(source)}: cannot be read: {err.strerror}") from err


def means_files(source: str) -> bool:
    """Whether a source is a pattern or a URL, and no name of one file, folder or data set."""
    return "://" in source or (bool(re.search(r"[*?\[]", source)) and not exists(source))


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
        raise DataError(f"{source}: a package for URLs like this is missing: {first_line(err)}") from err
    except Exception as err:  # every file system has errors of its own
        raise DataError(f"{source}: cannot be read: {first_line(err)}") from err


def _fetched(system: Any, name: str, source: str, folder: Path | None) -> Path:
    if "file" in system.protocol:
        return Path(name)
    if folder is None:
        raise DataError(f"{source}: set data.cache=FOLDER, where copies of remote files are kept")
    version = str(system.ukey(name))[:16]
    place = folder / COPIES / version / PurePosixPath(name).name
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as unfinished:
            part = Path(unfinished) / place.name
            system.get_file(name, str(part))
            part.replace(place)
    return place


# Folders

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
    "test": {"test", "testing"},
}
OF_LIBRARY = ("dataset_info.json", "dataset_dict.json", "state.json")  # in a folder that `datasets` saved


def tables_of(folder: Path, endings: Iterable[str], split: str) -> list[Path]:
    """The tables in a folder, sorted: those whose names name the split where some name one, else all.

    Raises:
        DataError: no name names this split, or the tables are of several kinds.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if file.name[0] != "." and inner_name(file).suffix.lower() in endings and file.is_file()
    )
    if any(_splits_in(file.name) for file in files):
        of_split = [file for file in files if split in _splits_in(file.name)]
        if not of_split:
            raise DataError(f"{folder}: no file of the split {split}: {listed(file.name for file in files)}; name one")
        files = of_split
    if len({inner_name(file).suffix.lower() for file in files}) > 1:
        raise DataError(
            f"{folder}: tables of several kinds: {listed(file.name for file in files)}; name one, or a pattern"
        )
    return files


def _splits_in(name: str) -> set[str]:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return {split for split, names in SPLITS.items() if words & names}


def is_saved(folder: Path) -> bool:
    """Whether the library `datasets` saved a folder."""
    return any((folder / name).is_file() for name in OF_LIBRARY)


def class_folders(folder: Path, split: str) -> list[Path]:
    """The folders of texts below a folder, or below its part of this split; each is named as the label of its texts."""
    folders = sorted(inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    if folders and all(_splits_in(inner.name) for inner in folders):
        return next((class_folders(inner, split) for inner in folders if split in _splits_in(inner.name)), [])
    texts = [inner for inner in folders if any(map(_is_text, inner.iterdir()))]
    return texts if len(texts) > 1 and len(texts) == len(folders) else []


def _is_text(file: Path) -> bool:
    return (
        file.name[0] != "."
        and file.is_file()
        and (file.suffix.lower() == ".txt" or not file.suffix or file.suffix[1:].isdecimal())
    )


def read_class_folders(path: Path, options: Columns, notes: list[str], split: str = "train") -> Iterator[Row]:
    """A text a file, whose label is the name of its folder; other files are counted in a note."""
    others: list[str] = []
    for folder in class_folders(path, split):
        for file in sorted(folder.iterdir()):
            if _is_text(file):
                yield Row({"text": read_text(file, options.encoding), "label": folder.name}, f"{file}:1")
            elif not file.name.startswith("."):
                others.append(file.name)
    notes += counted(f"{path}: files that are not .txt, not read", others)
