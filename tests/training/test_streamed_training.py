"""Training data that are read again for each pass over them: the numbers, the order and the errors of those in memory."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lorakit.data.example import Columns
from lorakit.data.read import holds_words, read
from lorakit.data.streaming import Streamed
from lorakit.errors import ConfigError, DataError
from lorakit.training.prepare import Prepared, prepare
from tests.runs import (
    Sections,
    changed,
    fit,
    sections,
    taken_up,
    values,
    weights,
    write_ratings,
)

SHARDS = 3
PIECE = 5  # rows; a file has some pieces, and a piece may have rows of two files


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.streaming.PIECE", PIECE)
    monkeypatch.setattr("lorakit.inference.answer.CHUNK", PIECE + 2)


def fitted(prepared: Prepared) -> Any:
    """The task with what it took from its data; tokenizers are equal only to themselves."""
    return replace(cast(Any, prepared.task), tokenizer=None)


def sharded(raw: Sections, folder: Path) -> Sections:
    """The same recipe, whose training part is in several Parquet files, and words are lists."""
    dataset = read(raw["data"]["train"], "words" if raw["data"]["train"].endswith("conll") else "text")
    if dataset.examples[0].tags:
        rows: list[dict[str, Any]] = [{"tokens": list(e.words), "ner_tags": list(e.tags)} for e in dataset.examples]
    else:
        with Path(raw["data"]["train"]).open(newline="") as file:
            rows = list(csv.DictReader(file))
    for i in range(SHARDS):
        own = rows[i * len(rows) // SHARDS : (i + 1) * len(rows) // SHARDS]
        pq.write_table(pa.Table.from_pylist(own), folder / f"part-{i}.parquet", row_group_size=4)
    return {**raw, "data": {**raw["data"], "train": str(folder / "part-*.parquet")}}


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("sequence_classification", ["task.class_weights=balanced"]),
        ("sequence_regression", []),
        ("multi_label_classification", ["data.max_length=8"]),
        ("token_classification", ["data.max_length=12"]),
        ("text2text_ner", ["data.max_length=12"]),
    ],
)
def test_streamed_part_is_the_part_in_memory(
    task: str, words: list[str], files: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue("t5" if task == "text2text_ner" else "bert")
    raw = sharded(sections(base, files, task), tmp_path)
    told: dict[str, list[str]] = {"memory": [], "disk": []}
    plain = prepare(changed(raw, *words), lambda e: told["memory"].append(str(e)))
    streamed = prepare(changed(raw, *words, f"data.cache={tmp_path}"), lambda e: told["disk"].append(str(e)))
    part, same = streamed.parts["train"], plain.parts["train"]
    assert isinstance(part.examples, Streamed)
    assert list(part.examples) == same.examples
    assert part.examples[PIECE : 2 * PIECE] == same.examples[PIECE : 2 * PIECE]
    assert part.examples[-1] == same.examples[-1]
    assert (part.sha256, streamed.fingerprints) == (same.sha256, plain.fingerprints)
    assert fitted(streamed) == fitted(plain)
    assert all(
        map(torch.equal, values(streamed).values(), values(plain).values())
    )  # of a head that starts at shares too
    assert list(streamed.plan.batches(0)) == list(plain.plan.batches(0))
    assert told["disk"] == told["memory"]


def test_training_stopped_in_the_middle_is_training_from_memory(bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sharded(sections(bert, files), tmp_path)
    fit(changed(raw, "train.epochs=1"), tmp_path / "memory")
    recipe = changed(raw, f"data.cache={tmp_path / 'cache'}", "train.epochs=1", "train.checkpoint_every=2")
    taken_up(recipe, tmp_path / "disk", 3).fit()
    assert weights(tmp_path / "disk") == weights(tmp_path / "memory")


def test_file_from_a_url_is_copied_once_a_version(files: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.csv", (files / "train.csv").read_bytes())
    memory.pipe("/bucket/b.csv", b"text,label\nthe end,good\n")
    expected = [*read(str(files / "train.csv")).examples, "the end"]
    for _ in range(2):
        found = read("memory://bucket/*.csv", folder=tmp_path).examples
        assert [e.text for e in found] == [getattr(e, "text", e) for e in expected]
    copies = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "files").rglob("*.csv")}
    assert len(copies) == 2
    memory.pipe("/bucket/b.csv", b"text,label\nat last,good\n")
    again = read("memory://bucket/*.csv", folder=tmp_path, again=True).examples
    assert isinstance(again, Streamed)
    assert again[-1].text == "at last"
    assert len(list((tmp_path / "files").rglob("*.csv"))) == 3
    assert len(read((files / "train.csv").as_uri()).examples) == len(expected) - 1  # on this machine's disk as it is


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nowhere/*.csv", r"memory://nowhere/\*\.csv: cannot be read: no such file"),
        ("s3://bucket/a.csv", "s3://bucket/a.csv: a package for URLs like this is missing: Install s3fs"),
        ("nonsense://a.csv", "nonsense://a.csv: cannot be read: Protocol not known: nonsense"),
    ],
)
def test_url_that_cannot_be_read_is_told(source: str, message: str, tmp_path: Path) -> None:
    assert not holds_words(source)
    with pytest.raises(DataError, match=message):
        read(source, folder=tmp_path)


def test_nothing_is_held_out_of_a_stream(bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sharded(sections(bert, files), tmp_path)
    assert not holds_words(raw["data"]["train"])
    del raw["data"]["validation"]
    with pytest.raises(ConfigError, match=r"part-\*\.parquet.*set data.validation"):
        prepare(changed(raw, f"data.cache={tmp_path / 'cache'}"))


def test_bad_row_of_a_later_piece_is_told_by_its_place(tmp_path: Path) -> None:
    lines = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(3 * PIECE)]
    lines[-2] = {"text": "without", "label": ["a", "b"]}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    errors = []
    for again in (False, True):
        with pytest.raises(DataError) as caught:
            read(str(path), again=again)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert f"{path}:{len(lines) - 1}:" in errors[0]


def test_first_rows_say_which_columns_are_read(tmp_path: Path) -> None:
    lines = [{"text": f"text {i}", "category": "ab"[i % 2]} for i in range(PIECE)]
    lines += [{**line, "label": "c", "label2": "d"} for line in lines]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read(str(path), again=True)
    assert list(found.examples) == read(str(path), columns=Columns(label="category")).examples
    assert found.notes == [f"{path}: text is column 'text'", f"{path}: label is column 'category'"]


def test_file_that_changes_between_passes_is_told(tmp_path: Path) -> None:
    path = write_ratings(tmp_path / "a.csv", 8)
    examples = read(str(path), "text", again=True).examples
    write_ratings(path, 9)
    with pytest.raises(DataError, match=r"a\.csv: changed while it was read"):
        list(examples)


def test_offsets_in_code_units_take_the_whole_file(tmp_path: Path) -> None:
    plain = [{"text": "Ada left", "spans": [{"start": 0, "end": 3, "label": "PER", "text": "Ada"}]}] * PIECE
    units = {"text": "\U0001f600 Ada", "spans": [{"start": 3, "end": 6, "label": "PER", "text": "Ada"}]}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, plain)))
    assert list(read(str(path), "words", again=True).examples) == read(str(path), "words").examples
    path.write_text("\n".join(map(json.dumps, [*plain, units])))
    with pytest.raises(
        DataError, match=rf"a\.jsonl:{PIECE + 1}: offsets count UTF-16 code units.*leave data.cache unset"
    ):
        read(str(path), "words", again=True)


def test_notes_of_many_pieces_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.streaming.MOST_NOTES", 3)
    rows = [{"tokens": ["Ada", "left"], "ner_tags": ["E-PER", "O"]}] * (9 * PIECE)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    notes = read(str(tmp_path / "a.jsonl"), "words", again=True).notes
    assert len(notes) == 3
    assert "words are column 'tokens', tags are column 'ner_tags'" in notes[0]


def test_tools_records_and_arrays_are_read_whole(tmp_path: Path) -> None:
    row = {"text": "a", "spans": [], "answer": "accept"}
    (tmp_path / "tool.jsonl").write_text(json.dumps(row))
    (tmp_path / "array.jsonl").write_text(json.dumps([{"text": "a", "label": "x"}]))
    for name, wants in (("tool", "words"), ("array", "label")):
        assert isinstance(read(str(tmp_path / f"{name}.jsonl"), wants, again=True).examples, list)
