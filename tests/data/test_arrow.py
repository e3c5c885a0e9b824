"""Parquet and Arrow files against pyarrow, and the class names that `datasets` leaves in them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from tests.data.documents import FILES, TEXTS, found, refusal

from lorakit.data.columnar import named_classes, read_arrow
from lorakit.data.read import read
from lorakit.errors import DataError


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_file(table: pa.Table, path: Path) -> None:
    pa.feather.write_feather(table, path, compression="uncompressed")


WRITERS = {
    "a.parquet": pq.write_table,
    "a.arrow": write_file,
    "b.arrow": write_stream,
    "a.feather": pa.feather.write_feather,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrow")


@given(rows=st.lists(st.tuples(TEXTS, TEXTS.map(str.strip)), min_size=1, max_size=4), name=st.sampled_from([*WRITERS]))
def test_reading_gives_back_what_was_written(folder, name, rows):
    texts, labels = zip(*rows, strict=True)
    WRITERS[name](pa.table({"text": texts, "label": labels}), folder / name)
    dataset = read(str(folder / name))
    assert [(example.text, example.label) for example in dataset.examples] == rows
    assert [example.where for example in dataset.examples] == [f"{folder / name}:{i + 1}" for i in range(len(rows))]


@given(file=FILES, name=st.sampled_from([*WRITERS]))
def test_reading_spans_gives_back_what_was_written(folder, name, file):
    spans = [[dict(zip(("start", "end", "label"), span, strict=True)) for span in document.spans] for document in file]
    kind = pa.list_(pa.struct({"start": pa.int64(), "end": pa.int64(), "label": pa.string()}))
    table = pa.table({"text": [document.text for document in file], "spans": pa.array(spans, kind)})
    WRITERS[name](table, folder / name)
    assert [found(example) for example in read(str(folder / name), "words").examples] == file


@pytest.mark.parametrize(("name", "kind"), [("a.parquet", "Parquet"), ("a.arrow", "Arrow"), ("a.feather", "Arrow")])
def test_file_of_another_kind_is_refused(save, name, kind):
    for content in ("text,label\na,b\n", b"ARROW1\0\0rubbish", b"PAR1rubbish!PAR1"):
        path = save(name, content)
        with pytest.raises(DataError, match=refusal(path, f"not a valid {kind} file: ")):
            read(str(path))


@pytest.mark.parametrize("name", WRITERS)
def test_empty_table_is_refused(tmp_path, name):
    WRITERS[name](pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), tmp_path / name)
    with pytest.raises(DataError, match=refusal(tmp_path / name, "no record")):
        read(str(tmp_path / name))


CLASS = ClassLabel(names=["negative", "positive"])
FEATURES = Features(
    {
        "one": CLASS,
        "many": List(CLASS),
        "spans": List({"start": Value("int32"), "label": CLASS}),
        "inside": {"deep": CLASS},
        "plain": Value("int64"),
    }
)
RECORD = {
    "one": "positive",
    "many": ["positive", "negative"],
    "spans": [{"start": 1, "label": "negative"}],
    "inside": {"deep": "positive"},
    "plain": 1,
}


def test_class_numbers_of_every_shape_get_their_names(tmp_path):
    numbers = FEATURES.encode_example(RECORD)
    dataset = Dataset.from_list([numbers], FEATURES)
    dataset.to_parquet(tmp_path / "a.parquet")
    write_stream(pq.read_table(tmp_path / "a.parquet"), tmp_path / "a.arrow")
    (row,) = read_arrow(tmp_path / "a.arrow")
    assert numbers != RECORD == row.values
    dataset.rename_columns({"plain": "text", "one": "label"}).cast_column("text", Value("string")).to_parquet(
        tmp_path / "a.parquet"
    )
    assert [example.label for example in read(str(tmp_path / "a.parquet")).examples] == ["positive"]


def test_class_number_without_a_name_is_none():
    assert [named_classes(n, CLASS.__dict__ | {"_type": "ClassLabel"}) for n in (-1, 2, None)] == [None] * 3


def test_foreign_metadata_are_passed_over(tmp_path):
    for metadata in (b"not JSON", b"[]", b"{}", b'{"info": null}', b'{"info": {"features": []}}'):
        table = pa.table({"text": ["a"], "label": [1]}).replace_schema_metadata({b"huggingface": metadata})
        pq.write_table(table, tmp_path / "a.parquet")
        assert [example.label for example in read(str(tmp_path / "a.parquet")).examples] == ["1"]
