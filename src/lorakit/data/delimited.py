"""Tables (CSV, TSV), labelled lines and CoNLL columns: rows as dicts, each with its place."""

from __future__ import annotations

import csv
import io
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
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


def sound(rows: Iterable[Row | DataError]) -> Iterator[Row]:
    """The rows, up to the first thing that is wrong, which is raised."""
    with closing(rows) if isinstance(rows, Generator) else nullcontext():
        for row in rows:
            if isinstance(row, DataError):
                raise row
            yield row


def read_csv(path: Path, *, tabs: bool = False) -> Iterator[Row]:
    """Rows of a CSV file (RFC 4180 quoting) or a TSV file (no quoting at all: a lone \" is text). All values are strings."""
    text = decode(path, read_bytes(path))
    return sound(csv_rows(path, io.StringIO(text, newline=""), tabs=tabs))


def csv_rows(
    path: Path, lines: Iterable[str], *, tabs: bool = False, limit: int = FIELD_LIMIT
) -> Generator[Row | DataError]:
    """The same from the file's lines, and in place of a record what is wrong with it; a header that is wrong is raised."""
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    header: list[str] = []
    with _field_limit(limit):
        for where, fields in _records(reader, path):
            if not header:
                header = _header(fields, where)
            elif isinstance(fields, DataError):
                yield fields
            elif len(fields) != len(header):
                yield DataError(f"{where}: {len(fields)} columns, the header has {len(header)}: {', '.join(header)}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), where)


def _records(reader: Any, path: Path) -> Iterator[tuple[str, list[str] | DataError]]:
    """The fields of each record that is not empty, and where it begins."""
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as err:
            yield where, DataError(f"{where}: no valid CSV: {err}; a quote inside a quoted field is written twice")
        else:
            if fields:
                yield where, fields


@contextmanager
def _field_limit(limit: int) -> Iterator[None]:
    """The csv module has one limit for the whole process; it is put back, since others may count on it."""
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _header(fields: list[str] | DataError, where: str) -> list[str]:
    if isinstance(fields, DataError):
        raise fields
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


DOCSTART = "-DOCSTART-"


def read_conll(path: Path) -> Iterator[Row]:
    """The sentences of a file with 2 to 4 columns (tab or space): `tokens` and `ner_tags`, the tags as they stand.

    Raises:
        DataError: a line has one column or another number of columns than the first, or there is no sentence.
    """
    words: list[str] = []
    tags: list[str] = []
    begin, columns = 1, 0
    for number, line in enumerate([*lines_of(path), ""], start=1):
        fields = columns_of(line)
        if not fields or fields[0] == DOCSTART:
            if words:
                yield Row({"tokens": words, "ner_tags": tags}, f"{path}:{begin}", lined=True)
            words, tags = [], []
            continue
        columns = columns or len(fields)
        _check(fields, columns, f"{path}:{number}")
        begin = begin if words else number
        words.append(fields[0])
        tags.append(fields[-1])
    if not columns:
        raise DataError(f"{path}: no sentence in the file")


def columns_of(line: str) -> list[str]:
    """The columns of a line: split at tabs where there are any, else at runs of spaces."""
    line = line.strip(" \t")  # not strip(): a no-break space may be a word
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field]


def _check(fields: list[str], columns: int, where: str) -> None:
    if len(fields) != columns or not 2 <= len(fields) <= 4:
        wanted = f"the lines before have {columns}" if columns in (2, 3, 4) else "2 to 4 are expected, the tag last"
        raise DataError(f"{where}: {len(fields)} column{'s' * (len(fields) != 1)}; {wanted}")
