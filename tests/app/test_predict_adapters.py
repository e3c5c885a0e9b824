"""`lorakit predict --adapters`: each row of a file by the adapter that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.inference.predictor import load
from tests.app.conftest import Cli
from tests.runs import reviews
from tests.shipped import ship


@pytest.fixture
def adapters(bert: Path, tmp_path: Path) -> Path:
    for seed, name in enumerate(("north", "south")):
        ship(tmp_path / "adapters" / name, bert, "sequence_classification", ("bad", "good"), seed=seed)
    return tmp_path / "adapters"


def test_rows_are_answered_by_the_adapters_they_name(cli: Cli, adapters: Path, tmp_path: Path) -> None:
    rows = [(text, ("north", "south")[i % 2]) for i, (text, _) in enumerate(reviews(12))]
    (tmp_path / "in.csv").write_text("\n".join(["text,shop", *map(",".join, rows)]) + "\n")
    words = ("--adapters", adapters, "--file", "in.csv", "--adapter-column", "shop")
    found = cli("predict", *words, "--out", "out.jsonl")
    assert (found.code, found.out) == (0, "")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == [text for text, _ in rows]
    loaded = {name: load(adapters / name) for name in ("north", "south")}
    alone = [loaded[name].predict([text])[0] for text, name in rows]
    assert [answer["score"] for answer in answers] == pytest.approx([answer["score"] for answer in alone], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ("--adapters", "adapters", "--file", "in.csv", "--adapter-column", "shop"),
            3,
            "in.csv:3: no adapter 'nort'; did",
        ),
        (
            ("--adapters", "adapters", "--file", "in.csv", "--adapter-column", "shp"),
            3,
            "--adapter-column = 'shp' is not a col",
        ),
        (("--adapters", "adapters", "--file", "in.csv"), 2, "names by --adapter-column"),
        (("run", "text", "--text", "x"), 2, "--text goes with --file"),
        (("--file", "in.csv"), 2, "Missing argument 'RUN'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    cli: Cli, adapters: Path, tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "in.csv").write_text("text,shop\na film,north\na plot,nort\n")
    found = cli("predict", *words)
    *notes, line = found.err.splitlines()
    assert (found.code, message in line) == (code, True)
    assert all("text is column 'text'" in note for note in notes)
