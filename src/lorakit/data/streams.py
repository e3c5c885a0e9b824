"""Large files row by row, from any row on: what is held is a batch of rows, never the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.arrow import arrow_batches, parquet_batches, rows_of_batch
from lorakit.data.json_files import json_rows
from lorakit.data.tables import Row, csv_rows
from lorakit.data.text import stream_lines
from lorakit.errors import DataError

BATCH = 4096  # rows that are turned into Python's objects together
LONGEST_FIELD = 2**24  # characters of a CSV field; a quote that is never closed would take in the whole file

Rows = Iterator[Row | DataError]
# The file, the first row (from 0), and the columns that are needed (None: all).
Stream = Callable[[Path, int, Sequence[str] | None], Rows]


def stream(path: Path, start: int = 0, columns: Sequence[str] | None = None) -> Rows:
    """The rows of a file from row `start` (0 is the first) on, and in place of a row what is wrong with it.

    Parquet is entered at the row group that holds the row; text is read up to it. Of CSV and JSON all columns are given.

    Raises:
        DataError: no such file, no format that can be read by rows, or damage behind which no row can be found.
    """
    if (found := STREAMS.get(path.suffix.lower())) is None:
        raise DataError(f"{path}: cannot be read row by row; these can: {', '.join(STREAMS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return found(path, start, columns)


def stamp_of(path: Path) -> str:
    """What changes with a file, in words; it must stay the same while the file is read."""
    stat = path.stat()
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns} ns"


def _csv(path: Path, start: int, columns: Sequence[str] | None, *, tabs: bool = False) -> Rows:
    return islice(csv_rows(path, stream_lines(path), tabs=tabs, limit=LONGEST_FIELD), start, None)


def _jsonl(path: Path, start: int, columns: Sequence[str] | None) -> Rows:
    return islice(json_rows(path, stream_lines(path)), start, None)


def _lines(path: Path, start: int, columns: Sequence[str] | None) -> Rows:
    lines = enumerate(stream_lines(path), start=1)
    return (Row({"text": line.rstrip("\r\n")}, f"{path}:{number}") for number, line in islice(lines, start, None))


def _parquet(path: Path, start: int, columns: Sequence[str] | None) -> Rows:
    return _columnar(path, parquet_batches(path, start, columns, BATCH), start)


def _arrow(path: Path, start: int, columns: Sequence[str] | None) -> Rows:
    return _columnar(path, arrow_batches(path, columns), start)


def _columnar(path: Path, batches: Iterator[tuple[int, Any]], start: int) -> Rows:
    for first, batch in batches:
        for begin in range(max(0, start - first), batch.num_rows, BATCH):
            yield from rows_of_batch(batch.slice(begin, BATCH), path, first + begin)


STREAMS: dict[str, Stream] = {
    ".parquet": _parquet,
    **dict.fromkeys((".arrow", ".feather"), _arrow),
    ".csv": _csv,
    ".tsv": partial(_csv, tabs=True),
    **dict.fromkeys((".jsonl", ".ndjson"), _jsonl),
    ".txt": _lines,
}
