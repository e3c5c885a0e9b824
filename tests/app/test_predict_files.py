"""`lorakit predict --out FOLDER` on the command line; what it does is in tests/engine/test_scoring.py."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.app.failures import how_to_go_on
from tests.app.conftest import Cli
from tests.runs import reviews
from tests.shipped import ship

N = 30


@pytest.fixture
def adapters(bert: Path, tmp_path: Path) -> Path:
    for seed, name in enumerate(("north", "south")):
        ship(tmp_path / "adapters" / name, bert, "sequence_classification", ("bad", "good"), seed=seed)
    rows = [{"id": i, "shop": ("north", "south")[i % 2], "text": text} for i, (text, _) in enumerate(reviews(N))]
    for i in range(2):
        pq.write_table(pa.Table.from_pylist(rows[i::2]), tmp_path / f"in-{i}.parquet")
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "adapters"


def test_shards_have_the_answers_of_one_file(cli: Cli, adapters: Path, tmp_path: Path) -> None:
    options = ("--keep", "id", "--shard-rows", 7, "--json")
    found = cli("predict", adapters / "north", "--file", "in-*.parquet", "--out", "out", *options)
    assert (found.code, json.loads(found.out)) == (0, {"rows": N, "answered": N, "rejected": 0})
    shards = {record["id"]: record for record in pq.read_table(tmp_path / "out").to_pylist()}
    assert cli("predict", adapters / "north", "--file", "in.jsonl", "--out", "out.jsonl").code == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [shards[i]["score"] for i in range(N)] == pytest.approx([line["score"] for line in lines], abs=1e-5)
    assert [dict(shards[i]["probabilities"]).keys() for i in range(N)] == [
        line["probabilities"].keys() for line in lines
    ]
    merged = cli("predict", adapters / "north", "--merge", "--file", "in.jsonl", "--out", "merged.jsonl")
    assert merged.code == 0
    assert [
        json.loads(line)["score"] for line in (tmp_path / "merged.jsonl").read_text().splitlines()
    ] == pytest.approx([line["score"] for line in lines], abs=1e-5)
    again = cli("predict", adapters / "north", "--merge", "--file", "in-*.parquet", "--out", "out", *options)
    assert (again.code, "merged" in again.err.splitlines()[-1]) == (2, True)  # one folder, one way to answer
    other = cli("predict", adapters / "south", "--file", "in-*.parquet", "--out", "out", *options)
    assert (other.code, "adapter changed since the answers there were begun" in other.err.splitlines()[-1]) == (2, True)


def test_each_row_is_answered_by_its_adapter(cli: Cli, adapters: Path, tmp_path: Path) -> None:
    words = ("--adapters", adapters, "--adapter-column", "shop", "--file", "in.jsonl")
    assert cli("predict", *words, "--out", "out", "--format", "jsonl", "--keep", "shop").code == 0
    assert cli("predict", *words, "--out", "out.jsonl").code == 0
    shard, single = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("out/part-00000-000000000000.jsonl", "out.jsonl")
    )
    assert [line["shop"] for line in shard] == ["north", "south"] * (N // 2)
    assert [line["score"] for line in shard] == [line["score"] for line in single]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--file", "in-0.parquet", "in-1.parquet", "--out", "out"), "a pattern needs quotes"),
        (
            ("--file", "in-0.parquet", "--file", "in-1.parquet", "--out", "a.jsonl"),
            "2 files are answered into a folder",
        ),
        (("--file", "in.jsonl", "--out", "a.jsonl", "--keep", "id"), "--keep goes with --out FOLDER"),
        (("--file", "in.jsonl", "--out", "out", "--part", "3/2"), "'3/2': I/N, for example 1/4"),
        (("a text", "--merge", "--adapters", "adapters"), "--merge is for one RUN"),
        (("a text", "--out", "out"), "takes its texts by --file"),
    ],
)
def test_mistakes_are_told_in_one_line(cli: Cli, adapters: Path, words: tuple[str, ...], message: str) -> None:
    found = cli("predict", adapters / "north", *words)
    (line,) = found.err.splitlines()
    assert (found.code, found.out) == (2, "")
    assert message in line


def test_stopped_command_is_repeated_to_go_on() -> None:
    words = ["predict", "runs/a", "--file", "in *.csv", "--out", "out"]
    assert how_to_go_on(words) == "; to go on: lorakit predict runs/a --file 'in *.csv' --out out"
