"""Hard negatives: the nearest other texts by cosine, none that may belong to the query."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

from tests.app.conftest import Cli
from tests.related import recipe, save_table
from tests.runs import fit, read_lines

ROWS = [
    ("the film was superb", "a superb film"),
    ("the film was superb", "a lovely film"),  # the same query, with another text of its own
    ("the plot was stale", "a stale plot"),
    ("the cast was boring", "a boring cast"),
    ("the scene was moving", "a moving scene"),
]


def test_negatives_are_the_nearest_texts_of_others(cli: Cli, encoder: Path, tmp_path: Path) -> None:
    data = save_table(tmp_path / "pairs.csv", ["anchor", "positive"], ROWS)
    done = cli("mine", data, "--model", encoder, "--out", "mined.jsonl", "--negatives", 2, "--margin", 1, "--json")
    assert done.code == 0, done.err
    lines = read_lines(Path("mined.jsonl"))
    assert json.loads(done.out) == {
        "out": "mined.jsonl",
        "pairs": 5,
        "negatives": sum(len(line["negatives"]) for line in lines),
        "documents": 5,
    }
    oracle = SentenceTransformer(str(encoder), device="cpu")
    documents = [document for _, document in ROWS]
    for line in lines:
        own = {document for query, document in ROWS if query == line["query"]}
        cosines = oracle.encode(documents) @ oracle.encode(line["query"])
        bound = cosines[documents.index(line["positive"])]
        others = [documents[i] for i in np.argsort(-cosines) if documents[i] not in own and cosines[i] <= bound]
        assert line["negatives"] == others[:2]
    assert any(line["negatives"] for line in lines)
    none = cli("mine", data, "--model", encoder, "--out", "none.jsonl", "--margin", 0.3)
    assert none.code == 3 and "use a --margin above 0.3" in none.err and not Path("none.jsonl").exists()


def test_a_run_mines_and_a_reranker_is_trained_on_what_it_found(
    cli: Cli, encoder: Path, tables: Path, tmp_path: Path
) -> None:
    fit(recipe(encoder, tables / "pairs.csv"), tmp_path / "run")
    done = cli("mine", tables / "pairs.csv", "--model", tmp_path / "run", "--out", "mined.jsonl")
    assert done.code == 0, done.err
    trained = cli("train", "mined.jsonl", "--model", encoder, "--task", "rerank", "train.max_steps=1")
    assert trained.code == 0, trained.err


def test_data_that_are_no_pairs_are_refused(cli: Cli, encoder: Path, tables: Path) -> None:
    for data, words, message in (
        (tables / "classes.csv", (), "Use --pair NAME"),
        (tables / "scores.csv", (), "scores.csv:2: this pair has a score"),
        (tables / "pairs.csv", ("--out", "mined.csv"), "negatives are written as .jsonl"),
    ):
        done = cli("mine", data, "--model", encoder, *(words or ("--out", "mined.jsonl")))
        assert done.code in (2, 3) and message in done.err
        assert not Path("mined.jsonl").exists()
