"""Records that cannot be used: all of them are told, or left out and counted, whoever reads them and of whatever kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lorakit.data import streaming
from lorakit.data.example import Columns
from lorakit.data.read import read
from lorakit.errors import DataError

SKIP = Columns(on_bad="skip")
GOOD = {
    "text": {"text": "a film", "label": "good"},
    "labels": {"text": "a film", "label": ["good", "new"]},
    "number": {"text": "a film", "label": 1.5},
    "tags": {"tokens": ["Ada", "left"], "ner_tags": ["B-PER", "O"]},
    "spans": {"text": "Ada left", "spans": [[0, 3, "PER"]]},
}
WANTS = {"text": "label", "labels": "labels", "number": "number", "tags": "words", "spans": "words"}
BAD = {
    "text": [{"text": " ", "label": "good"}, {"text": "a film", "label": None}],
    "labels": [{"text": "a film", "label": ["good", "good"]}, {"text": 3, "label": []}],
    "number": [{"text": "a film", "label": "many"}, {"label": 2}],
    "tags": [{"tokens": ["Ada"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["Ada"], "ner_tags": ["PERSON"]}],
    "spans": [
        {"text": "Ada left", "spans": [[0, 3, "PER"], [1, 5, "LOC"]]},
        {"text": "Ada left", "spans": [[0, 99, "PER"]]},
        {"text": "Ada left", "spans": None},
    ],
}


@pytest.fixture(params=[False, True], ids=["in memory", "streamed"])
def again(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def write(path: Path, records: list[dict | str]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def lines_in(message: str, path: Path) -> list[int]:
    places = re.findall(rf"{re.escape(str(path))}:(\d+(?:, \d+)*)", message)
    return [int(line) for place in places for line in place.split(", ")]


@pytest.mark.parametrize("kind", GOOD)
def test_every_bad_record_is_told_or_left_out(tmp_path: Path, kind: str, again: bool) -> None:
    good, broken = GOOD[kind], "{oops"
    path = write(tmp_path / "a.jsonl", [good, *BAD[kind], good, broken, good])
    lines = [*range(2, 2 + len(BAD[kind])), 3 + len(BAD[kind])]
    with pytest.raises(DataError) as caught:
        read(str(path), WANTS[kind], again=again)
    first = f"{path}: {len(lines)} records cannot be used; correct them, or leave them out with data.on_bad=skip: "
    assert str(caught.value).startswith(first)
    assert sorted(lines_in(str(caught.value), path)) == lines
    found = read(str(path), WANTS[kind], columns=SKIP, again=again)
    assert (len(list(found.examples)), found.left_out) == (3, len(lines))
    assert any(f"{path}: bad records left out: {len(lines)} ({path}:2" in note for note in found.notes)
    assert read(str(write(tmp_path / "b.jsonl", [good] * 3)), WANTS[kind], again=again).left_out == 0


def test_ten_are_listed_and_the_rest_counted(tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE", 4)
    rows = ["text,label", *(f"text {i},x" if i % 2 else ("one,two,three", ",x")[i % 4 > 1] for i in range(50))]
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(DataError) as caught:
        read(str(path), again=again)
    told = str(caught.value)
    assert told.startswith(f"{path}: 25 records cannot be used") and told.endswith("; and 15 more")
    assert sorted(lines_in(told, path)) == list(range(2, 22, 2))
    assert "a.csv:2, 6, 10, 14, 18: " in told  # one reason, once
    found = read(str(path), columns=SKIP, again=again)
    assert [example.text for example in found.examples] == [f"text {i}" for i in range(1, 50, 2)]


@pytest.mark.parametrize("rows", [["text,label", "one"], ["text,label", ",x"], ["text,label", ",x", "a,b,c"]])
def test_file_without_a_usable_record_is_refused_all_the_same(tmp_path: Path, again: bool, rows: list[str]) -> None:
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=rf"{path}:2: ") as caught:
        read(str(path), columns=SKIP, again=again)
    assert "on_bad" not in str(caught.value)
    assert len(rows) == 2 or str(caught.value).startswith(f"{path}: none of its records can be used; correct them: ")


def test_group_that_is_missing_is_a_bad_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ["text,label,user", "a,x,1", "b,x,", "c,x,2"])
    found = read(str(path), columns=Columns(group="user", on_bad="skip"))
    assert [example.group for example in found.examples] == ["1", "2"]
