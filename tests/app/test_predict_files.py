"""`lorakit predict --out FOLDER` on the command line; what it does is in tests/inference/test_batch_scoring.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.app.cli import how_to_go_on
from lorakit.data.example import Columns
from lorakit.inference import batch_scoring
from lorakit.inference.predictor import load
from tests.app.conftest import Cli
from tests.runs import read_lines, reviews
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
    shards = ("--file", "in-*.parquet", "--out", "out", "--keep", "id", "--shard-rows", 7, "--json")
    done = cli("predict", adapters / "north", *shards)
    assert (done.code, json.loads(done.out)) == (0, {"rows": N, "answered": N, "rejected": 0})
    rows = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda row: int(row["id"]))
    for name, options in (("plain", ()), ("merged", ("--merge",))):
        assert cli("predict", adapters / "north", *options, "--file", "in.jsonl", "--out", f"{name}.jsonl").code == 0
        answers = read_lines(tmp_path / f"{name}.jsonl")
        assert [row["score"] for row in rows] == pytest.approx([answer["score"] for answer in answers], abs=1e-5)
        for row, answer in zip(rows, answers, strict=True):
            assert dict(row["probabilities"]).keys() == answer["probabilities"].keys()
    for words, message in (
        (("north", "--merge"), "merged"),  # one folder, one way to answer
        (("south",), "adapter changed since the folder was started"),
    ):
        code, _, err = cli("predict", adapters / words[0], *words[1:], *shards)
        assert (code, message in err.splitlines()[-1]) == (2, True)


@pytest.mark.parametrize("name", ["bert_run", "tagger_run"])
def test_ending_of_out_says_the_format(
    cli: Cli, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(batch_scoring, "GROUP", 2)
    run = request.getfixturevalue(name)
    texts = ['Ada said "superb",\tand', "the film left Oslo", "a stale plot"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for ending in ("jsonl", "csv", "tsv", "parquet"):
        code, out, err = cli("predict", run, "--file", "in.jsonl", "--out", f"out.{ending}")
        assert (code, out, err.splitlines()[-1]) == (0, "", f"out.{ending}: 3 answers")
    wanted = read_lines(tmp_path / "out.jsonl")
    assert [answer["text"] for answer in wanted] == texts
    as_parquet = pq.read_table(tmp_path / "out.parquet").to_pylist(maps_as_pydicts="strict")
    assert [{key: value for key, value in answer.items() if key != "generated"} for answer in as_parquet] == wanted
    for table in (pd.read_csv(tmp_path / "out.csv"), pd.read_csv(tmp_path / "out.tsv", sep="\t")):
        found = table.to_dict("records")
        for column in {"probabilities", "entities"} & set(table):
            found = [{**row, column: json.loads(row[column])} for row in found]
        assert found == wanted


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_a_run_over_cp1252_reads_files_in_it_and_in_utf_8(cli: Cli, bert: Path, tmp_path: Path, encoding: str) -> None:
    columns = dataclasses.asdict(Columns(encoding="cp1252"))
    ship(tmp_path / "run", bert, "sequence_classification", ("bad", "good"), changes={"columns": columns})
    (tmp_path / "in.csv").write_text("text,label\na café film,good\nthe plot,bad\n", encoding=encoding)
    assert cli("predict", "run", "--file", "in.csv", "--out", "out.jsonl").code == 0
    assert cli("predict", "run", "--file", "in.csv", "--out", "out", "--format", "jsonl").code == 0
    single, shard = (read_lines(tmp_path / name)[0] for name in ("out.jsonl", "out/part-00000-000000000000.jsonl"))
    assert (single["text"], shard["score"]) == ("a café film", pytest.approx(single["score"]))
    assert "but it is also valid UTF-8" not in cli("check", "in.csv", "--run", "run").out
    assert load(tmp_path / "run").read_labelled(str(tmp_path / "in.csv")).examples[0].text == "a café film"


def test_each_row_is_answered_by_its_adapter(cli: Cli, adapters: Path, tmp_path: Path) -> None:
    words = ("--adapters", adapters, "--adapter-column", "shop", "--file", "in.jsonl")
    assert cli("predict", *words, "--out", "out", "--format", "jsonl", "--keep", "shop").code == 0
    assert cli("predict", *words, "--out", "out.jsonl")[:2] == (0, "")
    shard = read_lines(tmp_path / "out/part-00000-000000000000.jsonl")
    assert [line["shop"] for line in shard] == ["north", "south"] * (N // 2)
    single = read_lines(tmp_path / "out.jsonl")
    assert [line["text"] for line in single] == [text for text, _ in reviews(N)]
    loaded = {name: load(adapters / name) for name in ("north", "south")}
    alone = [loaded[line["shop"]].predict([each["text"]])[0]["score"] for line, each in zip(shard, single, strict=True)]
    for answers in (shard, single):
        assert [line["score"] for line in answers] == pytest.approx(alone, abs=1e-5)


def test_stopped_command_is_repeated_to_go_on() -> None:
    words = ["predict", "runs/a", "--file", "in *.csv", "--out", "out"]
    assert how_to_go_on(words) == "; to continue: lorakit predict runs/a --file 'in *.csv' --out out"
