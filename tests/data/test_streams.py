"""Rows of large files: the same as those of the readers of whole files, from any row on."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from lorakit.data import columnar, delimited
from lorakit.data.delimited import Row
from lorakit.data.formats import FORMATS
from lorakit.data.streaming import stream
from lorakit.errors import DataError

N = 50
RECORDS = [{"id": i, "text": f"row {i}, with \u2028 and\nmore" if i % 7 == 0 else f"row {i}"} for i in range(N)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records in each format; few rows a row group, one batch of Arrow."""
    place, table = tmp_path_factory.mktemp("streams"), pa.Table.from_pylist(RECORDS)
    pq.write_table(table, place / "a.parquet", row_group_size=9)
    pyarrow.feather.write_feather(table, place / "a.arrow")
    with pa.ipc.new_stream(str(place / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    with (place / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(RECORDS)
    (place / "a.jsonl").write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n")
    (place / "a.tsv").write_text("id\ttext\n" + "".join(f'{i}\tsaid "{i}\n' for i in range(N)))
    return place


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow", "a.csv", "a.tsv", "a.jsonl"])
def test_stream_from_any_row_gives_what_the_reader_gives(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "BATCH", 4)
    path = folder / name
    whole = list(FORMATS[path.suffix[1:]].read(path))
    assert len(whole) == N
    for start in (0, 1, 8, 9, 17, N - 1, N, N + 3):
        assert list(stream(path, start)) == whole[start:]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_that_are_not_asked_for_are_not_read(folder: Path, name: str) -> None:
    assert [row.values for row in islice(stream(folder / name, 2, ["text", "none"]), 2) if isinstance(row, Row)] == [
        {"text": "row 2"},
        {"text": "row 3"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.csv", b"id,text\n1,a\n2\n3,c\n", ":3: 1 columns, the header has 2"),
        ("a.csv", b'id,text\n1,a\n2,"b"x\n3,c\n', ":3: not valid CSV"),
        ("a.jsonl", b'{"id": "1"}\n{"id": \n{"id": "3"}\n', ":2: not JSON"),
        ("a.jsonl", b'{"id": "1"}\n[1]\n{"id": "3"}\n', ":2: a list, not a JSON object"),
    ],
)
def test_bad_row_stands_in_its_place(tmp_path: Path, name: str, content: bytes, wrong: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    first, second, third = stream(path)
    assert isinstance(first, Row)
    assert isinstance(third, Row)
    assert (first.values["id"], third.values["id"]) == ("1", "3")
    assert isinstance(second, DataError)
    assert f"{path}{wrong}" in str(second)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}\n', "a.jsonl:2: byte 18 .0xff. is not valid UTF-8"),
        ("a.txt", b"one\ntw\0o\n", "a.txt:2: a NUL character"),
        ("a.csv", b"id,id\n1,2\n", "a.csv:1: a column name appears twice"),
        ("a.parquet", b"PAR1", "a.parquet: not a valid Parquet file"),
        ("a.arrow", b"ARROW", "a.arrow: not a valid Arrow file"),
        ("a.json", b"[]", "a.json: cannot be read row by row; these can: .csv"),
    ],
)
def test_damage_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(stream(tmp_path / name))


def test_field_of_csv_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "LONGEST", 100)
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"never closed\n' + "x\n" * 200)
    assert isinstance(next(iter(stream(path))), DataError)
