"""Tables (CSV, TSV, JSON lines, Parquet) and labelled lines: rows as dicts of strings, each with its place."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorakit.data.text import decode, lines_of, read_bytes
from lorakit.errors import DataError

FIELD_LIMIT = 2**31 - 1  # characters; the csv module's own limit is 131,072


class Row(NamedTuple):
    """One record: its values by column, and file:line."""

    values: Mapping[str, Any]
    where: str


def read_csv(path: Path, *, tabs: bool = False) -> Iterator[Row]:
    """Rows of a CSV file (RFC 4180 quoting) or a TSV file (no quoting at all: a lone \" is text). All values are strings."""
    csv.field_size_limit(FIELD_LIMIT)
    text = decode(path, read_bytes(path))
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    header: list[str] = []
    begin = 1
    try:
        for fields in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = _header(fields, where)
            elif len(fields) != len(header):
                raise DataError(f"{where}: {len(fields)} columns, the header has {len(header)}: {', '.join(header)}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), where)
    except csv.Error as err:
        raise DataError(f"{path}:{begin}: no valid CSV: {err}; a quote inside a quoted field is written twice") from err


def _header(fields: list[str], where: str) -> list[str]:
    header = [name.strip() for name in fields]
    if len(set(header)) < len(header):
        raise DataError(f"{where}: a column name stands twice in the header: {', '.join(header)}")
    return header


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line; lines end at \\n only, since other line separators may stand inside a text."""
    for number, line in enumerate(decode(path, read_bytes(path)).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
            json.dumps(values, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
        except json.JSONDecodeError as err:
            raise DataError(f"{where}: no JSON: {err.msg} at column {err.colno}") from err
        except UnicodeEncodeError as err:
            raise DataError(f"{where}: a lone surrogate escape such as \\ud800 is no text") from err
        except (ValueError, RecursionError) as err:  # a number of thousands of digits, or as many open brackets
            raise DataError(f"{where}: no JSON: {err}") from err
        if not isinstance(values, dict):
            raise DataError(f"{where}: a {type(values).__name__}, not a JSON object")
        yield Row(values, where)


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; `where` counts rows from 1."""
    import pyarrow.parquet as pq  # late: 0.1 s that other formats do not need
    from pyarrow import ArrowException

    read_bytes(path)
    try:
        table = pq.read_table(path)
    except (ArrowException, OSError) as err:
        raise DataError(f"{path}: no Parquet file: {str(err).splitlines()[0]}") from err
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(values, f"{path}:{number}")


def read_label_first(path: Path) -> Iterator[Row]:
    """Lines of a label, white space and the text, without a header."""
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        label, text = [*line.split(maxsplit=1), ""][:2]
        yield Row({"label": label, "text": text.strip()}, f"{path}:{number}")
