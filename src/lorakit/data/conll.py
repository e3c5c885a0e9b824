"""CoNLL columns: a word a line, its tag last, an empty line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorakit.data.tables import Row
from lorakit.data.text import lines_of
from lorakit.errors import DataError

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
