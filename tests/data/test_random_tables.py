"""A thousand random tables by the dialects of several writers: read back equal or refused, by both readers alike."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from lorakit.data.example import Columns
from lorakit.data.read import read
from lorakit.data.streaming import Streamed, stream
from lorakit.errors import DataError

TABLES = 1000
PIECES = [
    "a",
    "Ö",
    "冬",
    "x y",
    ",",
    ";",
    "|",
    "\t",
    '"',
    '""',
    "'",
    "\n",
    "\r\n",
    "\\",
    "#",
    "1,5",
    "1.5",
    "NA",
    "-",
    " ",
    "\u2028",
]
LABELS = [["good", "bad"], ["0", "1"], ["a,b", "c;d"], ['"x"', "y"], ["1,5", "2,25"], ["O", "B-PER"]]
QUOTING = [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]


def random_text(draw: random.Random) -> str:
    while not (text := "".join(draw.choices(PIECES, k=draw.randint(1, 8)))).strip():
        pass
    return text


def by_csv(rows: Sequence[Sequence[str]], draw: random.Random, delimiter: str, quoting: int, newline: str) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=newline).writerows(rows)
    return out.getvalue()


def by_pandas(rows: Sequence[Sequence[str]], draw: random.Random, delimiter: str, quoting: int, newline: str) -> str:
    header, *body = rows
    frame = pd.DataFrame(body, columns=header)
    return str(frame.to_csv(sep=delimiter, index=False, quoting=quoting, lineterminator=newline))


def by_hand(rows: Sequence[Sequence[str]], draw: random.Random, delimiter: str, quoting: int, newline: str) -> str:
    """As polars does: quotes where something needs them, around empty texts too, or nowhere (and nothing may need them)."""

    def field(value: str) -> str:
        needs = value == "" or any(mark in value for mark in (delimiter, '"', "\n", "\r"))
        if quoting == csv.QUOTE_NONE:
            if any(mark in value for mark in (delimiter, "\n", "\r")):
                raise csv.Error
            return value
        return '"' + value.replace('"', '""') + '"' if needs or quoting == csv.QUOTE_ALL else value

    return "".join(delimiter.join(map(field, row)) + newline for row in rows)


def random_table(draw: random.Random, path: Path) -> tuple[list[str], list[list[str]], Columns] | None:
    """Writes a table; its names, rows and how to ask for it; None where the writer cannot write it."""
    labels = draw.choice(LABELS)
    names = draw.choice(
        [["text", "label"], ["id", "text", "label"], ["label", "note", "text"], ["text", "label", "1,5"]]
    )
    values = {"text": lambda i: random_text(draw), "label": lambda i: draw.choice(labels), "id": str}
    rows = [
        [values.get(name, lambda i: draw.choice(["", "x", "0"]))(i) for name in names]
        for i in range(draw.choice([1, 2, 5, 30]))
    ]
    delimiter, quoting = draw.choice([",", ";", "\t", "|"]), draw.choice(QUOTING)
    if delimiter != "\t" and quoting == csv.QUOTE_NONE:
        quoting = csv.QUOTE_MINIMAL  # between commas a field in quotes is read without them, as RFC 4180 has it
    write = draw.choice([by_csv, by_pandas, by_hand])
    newline = draw.choice(["\n", "\r\n", "\r"])
    if newline == "\r" and write is not by_hand:
        quoting = csv.QUOTE_ALL  # the csv module leaves a \n bare where it ends no line
    try:
        content = write([names, *rows], draw, delimiter, quoting, newline)
    except csv.Error:
        return None
    columns = Columns()
    if draw.random() < 0.2:  # without the header, which is said
        numbered = {name: str(number) for number, name in enumerate(names, start=1)}
        columns = Columns(header=False, text=numbered["text"], label=numbered["label"])
        beginning = write([names], draw, delimiter, quoting, "\n")
        first = len(beginning.rstrip("\n"))
        content = content[first:].removeprefix("\r\n") if content[first:].startswith("\r\n") else content[first + 1 :]
        names = list(numbered.values())
    path.write_bytes(("\ufeff" * (draw.random() < 0.2) + content).encode())
    return names, rows, columns


@pytest.mark.slow
def test_random_tables_are_read_back_or_refused(tmp_path: Path) -> None:
    draw, fates, wrong = random.Random(0), Counter[str](), []
    for number in range(TABLES):
        path, made = Path(), None
        while made is None:
            path = tmp_path / f"{number}.{draw.choice(['csv', 'csv', 'tsv', 'txt'])}"
            made = random_table(draw, path)
        names, rows, columns = made
        pairs = [
            (row[names.index(columns.text or "text")], row[names.index(columns.label or "label")].strip())
            for row in rows
        ]
        try:
            held = read(str(path), columns=columns)
        except DataError as err:
            fates["refused: " + str(err).removeprefix(str(path)).lstrip(":0123456789 ")[:40]] += 1
            with pytest.raises(DataError):
                list(read(str(path), columns=columns, again=True).examples)
            continue
        again = read(str(path), columns=columns, again=True)
        fates["read"] += 1
        fates["streamed"] += isinstance(again.examples, Streamed)
        if [(example.text, example.label) for example in held.examples] != pairs or list(again.examples) != list(
            held.examples
        ):
            wrong.append((path, held.notes))
        elif path.suffix != ".txt":
            found = [
                list(row.values.values()) for row in stream(path, options=columns) if not isinstance(row, DataError)
            ]
            if found != rows or list(again.notes) != list(held.notes):
                wrong.append((path, found))
    print(dict(fates))
    assert wrong == []
    assert fates["read"] > 0.9 * TABLES
