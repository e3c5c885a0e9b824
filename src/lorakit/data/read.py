"""Any source to a Dataset: which format it has, and how each is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lorakit import recipe
from lorakit.data import annotation_files
from lorakit.data.choices import usual_choices
from lorakit.data.columnar import read_arrow, read_datasets, read_parquet
from lorakit.data.columns import SAMPLE, Table, examples_of, is_annotated, never_given
from lorakit.data.delimited import (
    Row,
    csv_rows,
    is_label_first,
    is_tagged_lines,
    read_conll,
    read_excel,
    read_label_first,
    word_rows,
)
from lorakit.data.example import Columns, Dataset, Example, Wants, examples_sha256
from lorakit.data.files import (
    class_folders,
    exists,
    files_of,
    is_saved,
    means_files,
    read_class_folders,
    tables_of,
)
from lorakit.data.json_files import accepted_records, is_prodigy, read_json, whole_value
from lorakit.data.streaming import STREAMS, Reading, Streamed, reading_of, stream
from lorakit.data.text import (
    COMPRESSED,
    bad_records,
    encoding_note,
    in_order,
    inner_name,
    left_out,
    lines_of,
    listed,
    stream_lines,
)
from lorakit.errors import ConfigError, DataError, did_you_mean
from lorakit.hashing import file_sha256

# Rows as a tool writes them to rows of plain columns, and notes.
Adapter = Callable[[Sequence[Row], str], tuple[list[Row], list[str]]]
# A file, how it is said to be written, and notes that are added to.
Reader = Callable[[Path, Columns, list[str]], Iterable[Row | DataError]]


class Format(NamedTuple):
    """How the files of a format are read, and the endings that mean it."""

    read: Reader
    endings: tuple[str, ...] = ()
    adapt: Adapter | None = None


FORMATS: dict[str, Format] = {
    "csv": Format(partial(csv_rows, by_name=False), (".csv",)),
    "tsv": Format(partial(csv_rows, kind="tsv", by_name=False), (".tsv",)),
    "jsonl": Format(read_json, (".jsonl", ".ndjson")),
    "json": Format(read_json, (".json",)),
    "parquet": Format(read_parquet, (".parquet",)),
    "arrow": Format(read_arrow, (".arrow", ".feather")),
    "conll": Format(read_conll, (".conll", ".bio", ".iob", ".iob2", ".iobes", ".bioes", ".bmes")),
    "label-first": Format(read_label_first),
    "label-studio": Format(read_json, adapt=annotation_files.flatten_label_studio),
    "doccano": Format(read_json),
    "prodigy": Format(read_json, adapt=accepted_records),
    "brat": Format(annotation_files.read_brat, (".ann",), annotation_files.with_spans),
    "spacy": Format(annotation_files.read_docbin, (".spacy",)),
    "excel": Format(read_excel, (".xlsx", ".xls", ".xlsb", ".ods")),
    "folders": Format(read_class_folders),
}
ENDINGS = {ending: name for name, format in FORMATS.items() for ending in format.endings}
FILE_LIKE = (*COMPRESSED, ".txt", ".train", ".dev", ".test")
COMPRESSIBLE = ("csv", "tsv", "jsonl", "json", "conll")
BINARY = ("parquet", "arrow", "spacy", "excel")
OF_FOLDERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".xlsx", ".conll")
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


def read(
    source: str,
    wants: Wants = "label",
    *,
    columns: Columns = Columns(),
    format: str = "auto",
    split: str = "train",
    folder: Path | None = None,
    again: bool = False,
) -> Dataset:
    """The examples of one source, in their order, each with what the task `wants`.

    With `wants = "text"` labels are taken from the column that `columns` names, if it names one, and not looked for. A
    pattern or a URL means the rows of all its files; `folder` is where `files_of` puts copies. With `again` the examples
    are not held but `Streamed`, where the format allows it.

    Raises:
        DataError: the source is missing, empty or damaged, a column is not there, or records are incomplete (unless they
            are to be left out); the message names the file and the line of each, up to ten.
    """
    paths, notes = _paths(source, folder, split), list[str]()
    if again and (reading := _reading(source, paths, columns, format, split)):
        streamed = Streamed(source, reading, columns, wants)
        sha256 = _fingerprint(paths) or streamed.sha256
        return Dataset(source, streamed, sha256, streamed.notes, streamed.left_out)
    rows, bad = list[Row](), list[DataError]()
    for path in paths:
        name = source if path == _path(source) else str(path)
        rows += _rows(name, path, columns, format, notes, bad, split=split)
    if _path(source).is_dir() and paths != [_path(source)]:
        notes.append(f"{source}: {listed(path.name for path in paths)} of the folder")
    examples = examples_of(Table(source, rows, columns, notes, bad), wants) if rows else []
    if bad and (columns.on_bad == "stop" or not examples):
        raise bad_records(source, in_order(bad), of_all=not examples)
    notes += left_out(source, in_order(bad))
    if isinstance(columns.label, tuple):
        notes += never_given(source, columns.label, examples)
    return Dataset(source, examples, _fingerprint(paths) or examples_sha256(examples), notes, len(bad))


def holds_words(source: str, columns: Columns = Columns(), format: str = "auto") -> bool:
    """Whether a source is a file of words with tags or of texts with spans, or a pattern of such."""
    table = _beginning(source, columns, format)
    return table is not None and is_annotated(table)


def usual_pair(source: str, columns: Columns = Columns(), format: str = "auto") -> str | None:
    """The column of second texts that by its name goes with the usual one of first texts, where neither is named."""
    if columns.text or columns.pair or (table := _beginning(source, columns, format, SAMPLE)) is None:
        return None
    text = table.column("text", None)
    second = text and table.second(text)
    return second if second and all(isinstance(row.values.get(second), str) for row in table.rows[:SAMPLE]) else None


def find_choices(source: str, columns: Columns = Columns(), format: str = "auto") -> str | tuple[str, ...] | None:
    """The columns of choices that have usual names, where there are such; errors as `usual_pair`'s, which has none."""
    table = _beginning(source, columns, format, SAMPLE)
    return None if table is None else usual_choices(table.rows)


def _beginning(source: str, columns: Columns, format: str, most: int | None = None) -> Table | None:
    """The first rows of a source, `most` or as many as show annotations; None of one that is elsewhere.

    Where they cannot be read there is None too: reading in earnest says what is wrong.
    """
    if "://" in source:  # which is not fetched for a guess
        return None
    try:
        path = _paths(source, None, "train")[0]
        source = source if path == _path(source) else str(path)
        kind = _format(source, path, columns.encoding) if format == "auto" else format
        if kind in ("hub", LIBRARY):
            return None
        if most is None and kind in ("csv", "tsv", "parquet", "arrow", "conll", "label-first"):
            most = HEAD  # else all of them: spans may stand in a late record
        rows = _rows(source, path, columns, format, [], [], most=most)
        return Table(source, rows, Columns(), []) if rows else None
    except DataError:
        return None


def check_exists(source: str) -> None:
    """Raise a DataError for the name of a file that does not exist; a pattern, a URL or an id of the hub is not looked up."""
    path = _path(source)
    if path.exists() or means_files(source):
        return
    endings = (*ENDINGS, *FILE_LIKE)
    if path.suffix.lower() in endings or source.startswith((".", "/", "~")):
        siblings = path.parent.iterdir() if path.parent.is_dir() else []
        names = [sibling.name for sibling in siblings if sibling.suffix.lower() in endings]
        raise DataError(f"{source}: no such file; {did_you_mean(path.name, names)}")


def _paths(source: str, folder: Path | None, split: str) -> list[Path]:
    """The files of a pattern, a URL or a folder of tables; else the one file or folder of a source."""
    if means_files(source):
        return files_of(source, folder)
    path = _path(source)
    if not path.is_dir() or _kind_of_folder(path, split):
        return [path]
    return tables_of(path, OF_FOLDERS, split) or [path]


def _kind_of_folder(path: Path, split: str) -> str | None:
    if annotation_files.is_brat(path):
        return "brat"
    if is_saved(path):
        return LIBRARY
    return "folders" if class_folders(path, split) else None


def _path(source: str) -> Path:
    """The file or folder of a source, whose #SPLIT is no part of it; but a # may stand in a file's name."""
    return Path(source) if exists(source) else Path(source.partition("#")[0])


def _rows(
    source: str,
    path: Path,
    options: Columns,
    format: str,
    notes: list[str],
    bad: list[DataError],
    *,
    split: str = "train",
    most: int | None = None,
) -> list[Row]:
    """The rows of a source (the first ones where there is a `most`) as plain columns; what is wrong with one is added."""
    kind = _format(source, path, options.encoding, split) if format == "auto" else format
    if kind in ("hub", LIBRARY):
        if rows := list(read_datasets(source, split, is_saved=kind == LIBRARY)):
            return rows
        raise DataError(f"{source}: no record")
    if kind not in FORMATS:
        raise DataError(f"{source}: format = {kind!r} is not known; {did_you_mean(kind, [*FORMATS, LIBRARY])}")
    read, is_table = FORMATS[kind].read, kind in ("csv", "tsv")
    notes += [] if kind in BINARY or path.is_dir() else encoding_note(path, options.encoding)
    if is_table and format == "auto":
        read = partial(csv_rows, kind=kind)
    if kind == "folders":
        read = partial(read_class_folders, split=split)
    rows, wrong = list[Row](), len(bad)
    for row in islice(read(path, options, notes), most):
        if isinstance(row, Row):
            rows.append(row)
        else:
            bad.append(row)
    if not rows and len(bad) > wrong:
        return []
    if not rows:
        raise DataError(f"{source}: a header but no record" if is_table else f"{source}: no record")
    if format == "auto":
        kind = _tool(kind, rows)
        if ENDINGS.get(inner_name(path).suffix.lower()) != kind:
            notes.append(f"{source}: read as {kind}")
    if adapt := FORMATS[kind].adapt:
        rows, more = adapt(rows, source)
    elif sentences := word_rows(rows, options, source):
        rows, more = sentences
    else:
        more = []
    notes += more
    return rows


def _reading(source: str, paths: Sequence[Path], options: Columns, format: str, split: str) -> Reading | None:
    """What reads a source again and again without holding it; None where all of it is needed at once."""
    kind = _format(source, paths[0], options.encoding, split) if format == "auto" else format
    if kind in ("hub", LIBRARY):
        return lambda notes: read_datasets(source, split, is_saved=kind == LIBRARY)
    return reading_of(paths, options) if all(_is_by_rows(path, options, format) for path in paths) else None


def _is_by_rows(path: Path, options: Columns, format: str) -> bool:
    """Whether a file has a record a row, none of which an annotation tool wrote."""
    suffix = inner_name(path).suffix.lower()
    kind = ENDINGS.get(suffix, "")
    if suffix not in STREAMS or format not in ("auto", kind) or (format != "auto" and kind in ("csv", "tsv")):
        return False  # data.format says of a table how its quotes are read, which `stream` tells from the fields
    if _format(str(path), path, options.encoding) != kind:
        return False
    if kind == "jsonl" and whole_value(path, options.encoding) is not None:
        return False
    rows = [row for row in islice(stream(path, options=options), HEAD) if isinstance(row, Row)]
    return bool(rows) and _tool(kind, rows) == kind and word_rows(rows, options, str(path)) is None


def _tool(kind: str, rows: Sequence[Row]) -> str:
    """The annotation tool that wrote the records, where it left its marks."""
    if kind == "csv" and all(key in rows[0].values for key in annotation_files.MIN_KEYS):  # as in JSON_MIN
        return "label-studio"
    if kind not in ("json", "jsonl"):
        return kind
    if is_prodigy(rows[0]):
        return "prodigy"
    return "label-studio" if annotation_files.is_label_studio(rows[0]) else kind


def _format(source: str, path: Path, encoding: str | None = None, split: str = "train") -> str:
    """The format of a file or folder: by its name, or where that says nothing by its first lines."""
    if path.is_dir():
        if kind := _kind_of_folder(path, split):
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
    if kind is not None and inner_name(path) != path and kind not in COMPRESSIBLE:
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


def _fingerprint(paths: Sequence[Path]) -> str | None:
    """sha256 of the file, or over those of several; None where the records are no files by themselves."""
    if not all(path.is_file() and not annotation_files.is_brat(path) for path in paths):
        return None
    sums = [file_sha256(path) for path in paths]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def read_texts(path: Path, columns: Columns = Columns()) -> Dataset:
    """Texts to predict on: the lines of a .txt file, or the text column (and the pair's) of a table, in order."""
    if inner_name(path).suffix.lower() != ".txt":
        return read(str(path), "text", columns=columns)
    lines = lines_of(path, columns.encoding)
    empty = [DataError(f"{path}:{i}: the line is empty") for i, line in enumerate(lines, start=1) if not line.strip()]
    if empty:
        raise bad_records(str(path), empty)
    return Dataset(str(path), [Example(line) for line in lines], file_sha256(path))
