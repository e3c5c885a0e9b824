"""Every format of data in one table: how its files are read, which endings mean it; and which format a source has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lorakit import recipe
from lorakit.data import annotation_files
from lorakit.data.columnar import read_arrow, read_parquet
from lorakit.data.delimited import (
    Row,
    csv_rows,
    is_label_first,
    is_tagged_lines,
    read_conll,
    read_excel,
    read_label_first,
)
from lorakit.data.example import Columns
from lorakit.data.files import class_folders, exists, is_saved, means_files, read_class_folders
from lorakit.data.json_files import accepted_records, is_prodigy, read_json
from lorakit.data.text import COMPRESSED, inner_name, stream_lines
from lorakit.errors import ConfigError, DataError, did_you_mean

# Rows as a tool writes them to rows of plain columns, and notes.
Adapter = Callable[[Sequence[Row], str], tuple[list[Row], list[str]]]
# A file, how it is said to be written, and notes that are added to.
Reader = Callable[[Path, Columns, list[str]], Iterable[Row | DataError]]


class Format(NamedTuple):
    """How the files of a format are read, and what is known of them."""

    # A Reader; one of columnar files also takes the first row and the columns to read.
    read: Callable[..., Iterable[Row | DataError]]
    endings: tuple[str, ...] = ()  # that mean it
    adapt: Adapter | None = None
    is_text: bool = True  # so that it has an encoding; else it may be columnar
    by_rows: bool = False  # whether a file may be larger than memory: its rows are read one after the other
    packed: bool = False  # whether compressed files are read too
    in_folders: bool = False  # whether a folder of such files is read


table = partial(Format, by_rows=True, packed=True, in_folders=True)
columnar = partial(Format, is_text=False, by_rows=True, in_folders=True)
FORMATS: dict[str, Format] = {
    "csv": table(csv_rows, (".csv",)),
    "tsv": table(partial(csv_rows, kind="tsv"), (".tsv",)),
    "jsonl": table(read_json, (".jsonl", ".ndjson")),
    "json": Format(read_json, (".json",), packed=True),
    "parquet": columnar(read_parquet, (".parquet",)),
    "arrow": columnar(read_arrow, (".arrow", ".feather")),
    "conll": Format(
        read_conll, (".conll", ".bio", ".iob", ".iob2", ".iobes", ".bioes", ".bmes"), packed=True, in_folders=True
    ),
    "label-first": Format(read_label_first),
    "label-studio": Format(read_json, adapt=annotation_files.flatten_label_studio),
    "doccano": Format(read_json),
    "prodigy": Format(read_json, adapt=accepted_records),
    "brat": Format(annotation_files.read_brat, (".ann",), annotation_files.with_spans),
    "spacy": Format(annotation_files.read_docbin, (".spacy",), is_text=False),
    "excel": Format(read_excel, (".xlsx", ".xls", ".xlsb", ".ods"), is_text=False, in_folders=True),
    "folders": Format(read_class_folders),
}
ENDINGS = {ending: name for name, format in FORMATS.items() for ending in format.endings}
FILE_LIKE = (*COMPRESSED, ".txt", ".train", ".dev", ".test")
LIBRARY = "datasets"  # a folder that the library of this name saved
HEAD = 400  # lines or rows that are looked at to tell what a file holds


def register_reader(name: str, read: Reader, *endings: str) -> None:
    """Let files of a format from outside of this package be read: those with these endings, and where data.format
    says so.

    >>> from lorakit.data.delimited import Row
    >>> def read_mood(path, columns, notes):  # lines such as `good| what a film`
    ...     for number, line in enumerate(path.read_text().splitlines(), start=1):
    ...         label, _, text = line.partition("|")
    ...         yield Row({"text": text.strip(), "label": label}, f"{path}:{number}")
    >>> lorakit.register_reader("mood", read_mood, ".mood")

    Raises:
        ConfigError: a reader has the name already, or one of the endings.
    """
    if taken := [known for known in (name, *endings) if known in FORMATS or known in ENDINGS]:
        raise ConfigError(f"a reader of {taken[0]!r} is registered already")
    FORMATS[name] = Format(read, endings)
    ENDINGS.update(dict.fromkeys(endings, name))
    recipe.FORMATS.append(name)


def path_of(source: str) -> Path:
    """The file or folder of a source, whose #SPLIT is no part of it; but a # may stand in a file's name."""
    return Path(source) if exists(source) else Path(source.partition("#")[0])


def check_exists(source: str) -> None:
    """Raise a DataError if a source is the name of a missing file; patterns, URLs and ids of the hub are not checked."""
    path = path_of(source)
    if path.exists() or means_files(source):
        return
    endings = (*ENDINGS, *FILE_LIKE)
    if path.suffix.lower() in endings or source.startswith((".", "/", "~")):
        siblings = path.parent.iterdir() if path.parent.is_dir() else []
        names = [sibling.name for sibling in siblings if sibling.suffix.lower() in endings]
        hint = f"; {did_you_mean(path.name, names)}" if names else ""
        raise DataError(f"{source}: no such file{hint}")


def format_of(source: str, path: Path, encoding: str | None = None, split: str = "train") -> str:
    """The format of a file or folder: by its name, or where that says nothing by its first lines."""
    if path.is_dir():
        if kind := kind_of_folder(path, split):
            return kind
        raise DataError(
            f"{source}: nothing in this folder can be read; expected tables, class folders of .txt, .txt with .ann "
            "(brat), or a data set saved by `datasets`"
        )
    if not path.exists():
        check_exists(source)
        return "hub"
    kind = ENDINGS.get(inner_name(path).suffix.lower())
    if kind is None and annotation_files.is_brat(path):
        return "brat"
    if kind is not None and inner_name(path) != path and not FORMATS[kind].packed:
        raise DataError(f"{path}: a compressed {kind} file cannot be read; unpack it first")
    if kind not in (None, "tsv"):
        return kind
    head = list(islice(stream_lines(path, encoding), HEAD))
    if is_tagged_lines(head):
        return "conll"
    if kind is not None:
        return kind
    lines = [line for line in head if line.strip()]
    if lines and lines[0].lstrip()[0] in "{[":
        return "jsonl" if lines[0].lstrip()[0] == "{" else "json"
    if lines and is_label_first(lines):
        return "label-first"
    if lines and "\t" in lines[0]:
        return "tsv"
    if lines and any(mark in lines[0] for mark in ",;|"):
        return "csv"
    raise DataError(
        f"{path}: the format cannot be guessed from its name or first lines (no columns, no labels); if each line "
        f"begins with its label, set data.format=label-first; otherwise data.format={'|'.join(FORMATS)}"
    )


def kind_of_folder(path: Path, split: str) -> str | None:
    """The format of a folder, or None where it is none by itself."""
    if annotation_files.is_brat(path):
        return "brat"
    if is_saved(path):
        return LIBRARY
    return "folders" if class_folders(path, split) else None


def tool_of(kind: str, rows: Sequence[Row]) -> str:
    """The annotation tool that wrote the records, where it left its marks."""
    if kind == "csv" and all(key in rows[0].values for key in annotation_files.MIN_KEYS):  # as in JSON_MIN
        return "label-studio"
    if kind not in ("json", "jsonl"):
        return kind
    if is_prodigy(rows[0]):
        return "prodigy"
    return "label-studio" if annotation_files.is_label_studio(rows[0]) else kind
