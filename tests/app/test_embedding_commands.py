"""Every command on a run of an embedding model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.app.conftest import Cli, every_command_reads


@pytest.mark.parametrize(("form", "metric"), [("scores", "spearman"), ("classes", "ndcg_at_10")])
def test_every_command_takes_a_run_of_an_embedding_model(
    form: str,
    metric: str,
    cli: Cli,
    encoder: Path,
    tables: Path,
    tmp_path: Path,
) -> None:
    data, run = tables / f"{form}.csv", tmp_path / "run"
    words = ("train.epochs=1", "train.lr=1e-2", f"output.dir={run}", f"data.validation={data}")
    trained = cli("train", data, "--model", encoder, "--task", "embedding", *words)
    assert trained.code == 0, trained.err

    first, second, *_ = (line for line in trained.out.splitlines() if line.startswith(metric))
    assert first.endswith("for the untouched base") and "[" in second

    evaluated = json.loads(cli("evaluate", run, data, "--json").out)
    assert 0 < evaluated[metric] <= 1
    answer = json.loads(cli("predict", run, "the film was superb").out)
    assert answer["text"] == "the film was superb" and np.linalg.norm(answer["embedding"]) == pytest.approx(1, abs=1e-6)
    if form == "classes":
        done = cli("predict", run, "--file", data, "--out", "answers.parquet")
        assert done.code == 0, done.err
        assert len(pq.read_table("answers.parquet")["embedding"][0]) == 16
    every_command_reads(cli, run, data)
    page = (run / "report.html").read_text()
    assert f"The untouched base scores {metric}" in page and "no label" not in page
    assert "SentenceTransformer" in (run / "adapter" / "README.md").read_text()


def test_every_command_takes_a_run_of_a_reranker(cli: Cli, encoder: Path, tables: Path, tmp_path: Path) -> None:
    data, run = tables / "pairs.csv", tmp_path / "run"
    trained = cli("train", data, "--model", encoder, "--task", "rerank", "train.epochs=1", f"output.dir={run}")
    assert trained.code == 0, trained.err
    assert 0 < json.loads(cli("evaluate", run, data, "--json").out)["ndcg_at_10"] <= 1
    (tmp_path / "pairs.csv").write_text("anchor,positive\nsuperb,the film was superb\n")
    (answer,) = cli("predict", run, "--file", "pairs.csv").out.splitlines()
    assert json.loads(answer).keys() == {"text", "pair", "score"}
    every_command_reads(cli, run, data)
    card = (run / "adapter" / "README.md").read_text()
    assert "text-ranking" in card and "logits.sigmoid()" in card
