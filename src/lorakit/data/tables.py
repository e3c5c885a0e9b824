"""Tables (CSV, TSV) and labelled lines: rows as dicts of strings, each with its place."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorakit.data.text import decode, lines_of, read_bytes
from lorakit.errors import DataError

FIELD_LIMIT = 2**31 - 1  # characters; the csv module's own limit is 131,072


class Row(NamedTuple):
    """One record: its values by column, and file:line."""

    values: Mapping[str, Any]
    where: str
    lined: bool = False  # each word has a line of its own, from this one on

    @property
    def place(self) -> str:
        """Where it stands, with its id where it has one."""
        return f"{self.where} (id {self.values['id']})" if "id" in self.values else self.where

    def word(self, i: int) -> str:
        """The place of the record's i-th word."""
        if not self.lined:
            return f"{self.where}, word {i + 1}"
        file, _, line = self.where.rpartition(":")
        return f"{file}:{int(line) + i}"


def read_csv(path: Path, *, tabs: bool = False) -> Iterator[Row]:
    """Rows of a CSV file (RFC 4180 quoting) or a TSV file (no quoting at all: a lone \" is text). All values are strings."""
    text = decode(path, read_bytes(path))
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    header: list[str] = []
    begin = 1
    with _fields_of_any_length():
        try:
            for fields in reader:
                where, begin = f"{path}:{begin}", reader.line_num + 1
                if not fields:
                    continue
                if not header:
                    header = _header(fields, where)
                elif len(fields) != len(header):
                    raise DataError(
                        f"{where}: {len(fields)} columns, the header has {len(header)}: {', '.join(header)}"
                    )
                else:
                    yield Row(dict(zip(header, fields, strict=True)), where)
        except csv.Error as err:
            raise DataError(
                f"{path}:{begin}: no valid CSV: {err}; a quote inside a quoted field is written twice"
            ) from err


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """The csv module has one limit for the whole process; it is put back, since others may count on it."""
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _header(fields: list[str], where: str) -> list[str]:
    header = [name.strip() for name in fields]
    if len(set(header)) < len(header):
        raise DataError(f"{where}: a column name stands twice in the header: {', '.join(header)}")
    return header


def read_label_first(path: Path) -> Iterator[Row]:
    """Lines of a label, white space and the text, without a header."""
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        label, text = [*line.split(maxsplit=1), ""][:2]
        yield Row({"label": label, "text": text.strip()}, f"{path}:{number}")
