"""`lorakit predict --out FOLDER` on the command line; what it does is in tests/inference/test_batch_scoring.py."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.app.cli import how_to_go_on
from lorakit.inference import batch_scoring
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


@pytest.mark.parametrize("name", ["bert_run", "tagger_run"])
def test_ending_of_out_says_the_format(
    cli: Cli, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(batch_scoring, "GROUP", 2)
    run = request.getfixturevalue(name)
    texts = ['Ada said "superb",\tand', "the film left Oslo", "a stale plot"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for ending in ("jsonl", "csv", "tsv", "parquet"):
        assert cli("predict", run, "--file", "in.jsonl", "--out", f"out.{ending}")[:2] == (0, "")
    wanted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in wanted] == texts
    as_parquet = pq.read_table(tmp_path / "out.parquet").to_pylist(maps_as_pydicts="strict")
    assert [{key: value for key, value in answer.items() if key != "generated"} for answer in as_parquet] == wanted
    for table in (pd.read_csv(tmp_path / "out.csv"), pd.read_csv(tmp_path / "out.tsv", sep="\t")):
        found = table.to_dict("records")
        for column in {"probabilities", "entities"} & set(table):
            found = [{**row, column: json.loads(row[column])} for row in found]
        assert found == wanted


def test_ending_that_says_no_format_is_refused_before_anything_is_read(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("predict", "nowhere", "a text", "--out", "answers.txt")
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "--out answers.txt: answers are written as .jsonl, .ndjson, .csv, .tsv, .parquet" in err


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
