"""Any source to a Dataset: which format it has, and how each is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lorakit.data.annotation_files import is_brat, read_brat, read_docbin, with_spans
from lorakit.data.columnar import read_arrow, read_hub, read_parquet, read_saved
from lorakit.data.columns import Table, examples_of, is_annotated, never_given
from lorakit.data.delimited import DOCSTART, Row, columns_of, read_conll, read_csv, read_label_first
from lorakit.data.example import Columns, Dataset, Example, Wants, examples_sha256
from lorakit.data.files import files_of, means_files
from lorakit.data.json_files import accepted, is_prodigy, read_json
from lorakit.data.label_studio import flattened, is_label_studio, is_label_studio_table
from lorakit.data.streaming import STREAMS, Reading, Streamed, reading_of, stream
from lorakit.data.tags import is_tag
from lorakit.data.text import lines_of
from lorakit.digest import file_sha256
from lorakit.errors import DataError, did_you_mean

# Rows as a tool writes them to rows of plain columns, and notes.
Adapter = Callable[[Sequence[Row], str], tuple[list[Row], list[str]]]


class Format(NamedTuple):
    """How the files of a format are read, and the endings that mean it."""

    read: Callable[[Path], Iterable[Row]]
    endings: tuple[str, ...] = ()
    adapt: Adapter | None = None


FORMATS: Mapping[str, Format] = {
    "csv": Format(read_csv, (".csv",)),
    "tsv": Format(partial(read_csv, tabs=True), (".tsv",)),
    "jsonl": Format(read_json, (".jsonl", ".ndjson")),
    "json": Format(read_json, (".json",)),
    "parquet": Format(read_parquet, (".parquet",)),
    "arrow": Format(read_arrow, (".arrow", ".feather")),
    "conll": Format(read_conll, (".conll", ".bio", ".iob")),
    "label-first": Format(read_label_first),
    "label-studio": Format(read_json, adapt=flattened),
    "doccano": Format(read_json),
    "prodigy": Format(read_json, adapt=accepted),
    "brat": Format(read_brat, (".ann",), with_spans),
    "spacy": Format(read_docbin, (".spacy",)),
}
ENDINGS = {ending: name for name, format in FORMATS.items() for ending in format.endings}
FILE_LIKE = (*ENDINGS, ".txt", ".train", ".dev", ".test")
LIBRARY = "datasets"  # a folder that the library of this name saved
# Formats whose first record says whether it is words or texts; others never hold words, or are not opened to see.
MAY_HOLD_WORDS = ("csv", "jsonl", "json", "label-studio", "prodigy", "conll", "brat", "spacy")


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
        DataError: the source is missing, empty or damaged, a column is not there, or a record is incomplete; the
            message names the file and the line.
    """
    meant = files_of(source, folder) if means_files(source) else []
    paths = meant or [_path(source)]
    if again and (reading := _reading(source, paths, format, split)):
        streamed = Streamed(source, reading, columns, wants)
        return Dataset(source, streamed, _fingerprint(paths) or streamed.sha256, streamed.notes)
    rows, notes = list[Row](), list[str]()
    for path in paths:
        more, told = _rows(str(path) if meant else source, path, format, split)
        rows += more
        notes += told
    examples = examples_of(Table(source, rows, columns, notes), wants)
    if isinstance(columns.label, tuple):
        notes += never_given(source, columns.label, examples)
    return Dataset(source, examples, _fingerprint(paths) or examples_sha256(examples), notes)


def holds_words(source: str) -> bool:
    """Whether a source is a file of words with tags or of texts with spans, or a pattern of such."""
    if "://" in source:  # which is not fetched for a guess
        return False
    source = str(files_of(source)[0]) if means_files(source) else source
    path = _path(source)
    kind = _format(source, path)
    if kind not in MAY_HOLD_WORDS:
        return False
    try:
        rows, _ = _rows(source, path, "auto", "train")
    except DataError:  # reading it in earnest, which may be in a format that is asked for, says what is wrong
        return False
    return is_annotated(Table(source, rows, Columns(), []))


def _path(source: str) -> Path:
    """The file or folder of a source, whose #SPLIT is no part of it; but a # may stand in a file's name."""
    return Path(source) if Path(source).exists() else Path(source.partition("#")[0])


def _rows(source: str, path: Path, format: str, split: str) -> tuple[list[Row], list[str]]:
    kind = _format(source, path) if format == "auto" else format
    if kind in ("hub", LIBRARY):
        rows = list(read_hub(source, split) if kind == "hub" else read_saved(Path(source), split))
        if not rows:
            raise DataError(f"{source}: no record")
        return rows, []
    if kind not in FORMATS:
        raise DataError(f"{source}: format = {kind!r} is not known; {did_you_mean(kind, [*FORMATS, LIBRARY])}")
    rows, notes = list(FORMATS[kind].read(path)), []
    if not rows:
        raise DataError(f"{source}: a header but no record" if kind in ("csv", "tsv") else f"{source}: no record")
    if format == "auto":
        kind = _tool(kind, rows)
        if ENDINGS.get(path.suffix.lower()) != kind:
            notes.append(f"{source}: read as {kind}")
    if adapt := FORMATS[kind].adapt:
        rows, more = adapt(rows, source)
        notes += more
    return rows, notes


def _reading(source: str, paths: Sequence[Path], format: str, split: str) -> Reading | None:
    """What reads a source again and again without holding it; None where all of it is needed at once."""
    kind = _format(source, paths[0]) if format == "auto" else format
    if kind == "hub":
        return partial(read_hub, source, split)
    if kind == LIBRARY:
        return partial(read_saved, Path(source), split)
    return reading_of(paths) if all(_is_by_rows(path, format) for path in paths) else None


def _is_by_rows(path: Path, format: str) -> bool:
    """Whether a file has a record a row, none of which an annotation tool wrote."""
    kind = ENDINGS.get(path.suffix.lower(), "")
    if path.suffix.lower() not in STREAMS or format not in ("auto", kind):
        return False
    rows = [row for row in islice(stream(path), 1) if isinstance(row, Row)]
    return bool(rows) and (_tool(kind, rows) if format == "auto" else kind) == kind


def _tool(kind: str, rows: Sequence[Row]) -> str:
    """The annotation tool that wrote the records, where it left its marks."""
    if kind == "csv" and is_label_studio_table(rows[0]):
        return "label-studio"
    if kind not in ("json", "jsonl"):
        return kind
    if is_prodigy(rows[0]):
        return "prodigy"
    return "label-studio" if is_label_studio(rows[0]) else kind


def _format(source: str, path: Path) -> str:
    if path.is_dir():
        return "brat" if is_brat(path) else LIBRARY
    if not path.exists():
        if path.suffix.lower() in FILE_LIKE or source.startswith((".", "/", "~")):
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{source}: no such file; {did_you_mean(path.name, siblings)}")
        return "hub"
    return ENDINGS.get(path.suffix.lower()) or ("brat" if is_brat(path) else _sniffed(path))


def _sniffed(path: Path) -> str:
    """The format of a file whose ending says nothing, from its first lines."""
    lines = [line for line in lines_of(path)[:400] if line.strip()]
    rows = [columns_of(line) for line in lines]
    if all((len(row) in (2, 3, 4) and is_tag(row[-1])) or row[0] == DOCSTART for row in rows):
        return "conll"
    if lines[0].lstrip()[0] in "{[":
        return "jsonl" if lines[0].lstrip()[0] == "{" else "json"
    first_words = {line.split()[0] for line in lines}
    if len(lines) >= 20 and len(first_words) <= len(lines) // 5 and "\t" not in lines[0]:
        return "label-first"
    if "\t" in lines[0]:
        return "tsv"
    if "," in lines[0]:
        return "csv"
    raise DataError(
        f"{path}: the format cannot be told from its name or first lines; say data.format={'|'.join(FORMATS)}"
    )


def _fingerprint(paths: Sequence[Path]) -> str | None:
    """sha256 of the file, or over those of several; None where the records are no files by themselves."""
    if not all(path.is_file() and not is_brat(path) for path in paths):
        return None
    sums = [file_sha256(path) for path in paths]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def read_texts(path: Path, columns: Columns = Columns()) -> Dataset:
    """Texts to predict on: the lines of a .txt file, or the text column (and the pair's) of a table, in order."""
    if path.suffix.lower() != ".txt":
        return read(str(path), "text", columns=columns)
    lines = lines_of(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DataError(f"{path}:{number}: the line is empty")
    return Dataset(str(path), [Example(line) for line in lines], file_sha256(path))
