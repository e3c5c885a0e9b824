"""Any source to a Dataset, and what its first rows tell before that."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from lorakit.data import annotation_files
from lorakit.data.choices import usual_choices
from lorakit.data.columnar import read_datasets
from lorakit.data.columns import SAMPLE, Table, examples_of, is_annotated, never_given
from lorakit.data.delimited import Row, word_rows
from lorakit.data.example import Columns, Dataset, Example, Wants, examples_sha256
from lorakit.data.files import files_of, means_files, read_class_folders, tables_of
from lorakit.data.formats import ENDINGS, FORMATS, HEAD, LIBRARY, format_of, kind_of_folder, path_of, tool_of
from lorakit.data.json_files import whole_value
from lorakit.data.streaming import Reading, Streamed, reading_of, stream
from lorakit.data.text import bad_records, encoding_note, in_order, inner_name, left_out, lines_of, listed
from lorakit.errors import DataError, did_you_mean
from lorakit.hashing import file_sha256


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
        name = source if path == path_of(source) else str(path)
        rows += _rows(name, path, columns, format, notes, bad, split=split)
    if path_of(source).is_dir() and paths != [path_of(source)]:
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
        source = source if path == path_of(source) else str(path)
        kind = format_of(source, path, columns.encoding) if format == "auto" else format
        if kind in ("hub", LIBRARY):
            return None
        if most is None and kind in ("csv", "tsv", "parquet", "arrow", "conll", "label-first"):
            most = HEAD  # else all of them: spans may stand in a late record
        rows = _rows(source, path, columns, format, [], [], most=most)
        return Table(source, rows, Columns(), []) if rows else None
    except DataError:
        return None


def _paths(source: str, folder: Path | None, split: str) -> list[Path]:
    """The files of a pattern, a URL or a folder of tables; else the one file or folder of a source."""
    if means_files(source):
        return files_of(source, folder)
    path = path_of(source)
    if not path.is_dir() or kind_of_folder(path, split):
        return [path]
    endings = [ending for format in FORMATS.values() if format.in_folders for ending in format.endings]
    return tables_of(path, endings, split) or [path]


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
    kind = format_of(source, path, options.encoding, split) if format == "auto" else format
    if kind in ("hub", LIBRARY):
        if rows := list(read_datasets(source, split, is_saved=kind == LIBRARY)):
            return rows
        raise DataError(f"{source}: no record")
    if kind not in FORMATS:
        raise DataError(f"{source}: format = {kind!r} is not known; {did_you_mean(kind, [*FORMATS, LIBRARY])}")
    read, is_table = FORMATS[kind].read, kind in ("csv", "tsv")
    if FORMATS[kind].is_text and not path.is_dir():
        notes += encoding_note(path, options.encoding)
    if is_table and format != "auto":
        read = partial(read, by_name=False)
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
        kind = tool_of(kind, rows)
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
    kind = format_of(source, paths[0], options.encoding, split) if format == "auto" else format
    if kind in ("hub", LIBRARY):
        return lambda notes: read_datasets(source, split, is_saved=kind == LIBRARY)
    return reading_of(paths, options) if all(_is_by_rows(path, options, format) for path in paths) else None


def _is_by_rows(path: Path, options: Columns, format: str) -> bool:
    """Whether a file has a record a row, none of which an annotation tool wrote."""
    kind = ENDINGS.get(inner_name(path).suffix.lower(), "")
    # data.format says of a table how its quotes are read, which `stream` tells from the fields
    streamed = ("auto",) if kind in ("csv", "tsv") else ("auto", kind)
    if kind not in FORMATS or not FORMATS[kind].by_rows or format not in streamed:
        return False
    if format_of(str(path), path, options.encoding) != kind:
        return False
    if kind == "jsonl" and whole_value(path, options.encoding) is not None:
        return False
    rows = [row for row in islice(stream(path, options=options), HEAD) if isinstance(row, Row)]
    return bool(rows) and tool_of(kind, rows) == kind and word_rows(rows, options, str(path)) is None


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
