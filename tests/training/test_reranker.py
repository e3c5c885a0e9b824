"""Runs of rerankers. The oracle: sentence-transformers, of losses, of vectors and of exported folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses as oracles
from transformers import AutoTokenizer

import lorakit
from lorakit.app.commands.export import export_run
from lorakit.data.example import Example
from lorakit.errors import ConfigError, DataError
from lorakit.inference.answer import Answered
from lorakit.recipe import Recipe
from lorakit.tasks.reranker import Reranker
from lorakit.training.prepare import prepare
from tests.related import recipe as recipe_of
from tests.related import save_table
from tests.runs import changed, fit, scores_of

PAIRS = [("superb", "the film was superb"), ("stale", "a rather stale plot"), ("moving", "moving " * 40)]


def recipe(base: Path, data: Path, *words: str) -> Recipe:
    raw = recipe_of(base, data).model_dump(exclude_unset=True)
    return changed({**raw, "task": {"name": "reranker"}}, "train.lr=2e-2", "train.epochs=6", *words)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory, tables: Path) -> Path:
    """Pairs with scores from 0 to 1."""
    rows = list(csv.DictReader((tables / "scores.csv").read_text().splitlines()))
    path = tmp_path_factory.mktemp("ratings") / "scores.csv"
    return save_table(path, list(rows[0]), [(r["sentence1"], r["sentence2"], float(r["score"]) / 4.5) for r in rows])


class Scored:
    """A model of the oracle whose scores are given, for pairs of numbers as texts."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores, self.num_labels, self.device = scores, 1, torch.device("cpu")

    def preprocess(self, pairs: Sequence[tuple[str, str]], **_: Any) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor([int(text) for _, text in pairs])}

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"scores": self.scores[inputs["rows"]]}


GROUPS = ((1.0, 0.0, 0.0), (1.0, 0.0), (1.0, 0.0, 0.0, 0.0))
TAUGHT = ((3.5, -1.0, 0.25), (1.5, 2.5), (0.0, 1.0, -2.0, 1.0))  # by a teacher, for whom a negative may be the best


@pytest.mark.parametrize("groups", [GROUPS, TAUGHT])
@pytest.mark.parametrize("loss", ["bce", "pairwise", "listnet", "lambda", "margin_mse"])
def test_loss_and_gradient_are_those_of_sentence_transformers(loss: str, groups: Any, encoder: Path) -> None:
    section = changed({"model": {"base": "x"}, "task": {"name": "reranker", "loss": loss}}).task
    task = Reranker.make(section, AutoTokenizer.from_pretrained(encoder), (), 12)
    examples = [
        Example("superb", pair="film", negatives=("plot",) * len(rest), teacher=(first, *rest) * (groups is TAUGHT))
        for first, *rest in groups
    ]
    batch = task.collate([item for own in task.encode(examples) for item in own])
    scores = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mine = task.losses(Answered(scores, {}), batch).sum() / batch["n_targets"].sum()
    model: Any = Scored(scores)
    texts, place = [], iter(range(9))
    for group in groups:
        texts.append([str(next(place)) for _ in group])
    labels = [torch.tensor(group) for group in groups]
    if loss == "bce":
        expected = torch.nn.BCEWithLogitsLoss()(scores[:, 0], torch.cat(labels))
    elif loss == "listnet":
        expected = oracles.ListNetLoss(model)([["q"] * 3, texts], labels)
    elif loss == "lambda":
        expected = oracles.LambdaLoss(model)([["q"] * 3, texts], labels)
    elif loss == "margin_mse":  # whose oracle takes equally many texts of all queries
        margins = [torch.cat([own[:1] - own[1:] for own in of]) for of in (scores[:, 0].split([3, 2, 4]), labels)]
        expected = torch.nn.MSELoss()(*margins)
    else:
        expected = oracles.RankNetLoss(model, reduction_log="natural")([["q"] * 3, texts], labels)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, scores) for value in (mine, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "loss", "metric"),
    [
        ("pairs", "listnet", "mrr_at_10"),
        ("scores", "bce", "spearman"),
    ],
)
def test_reranker_learns_answers_and_is_read_by_sentence_transformers(
    form: str, loss: str, metric: str, encoder: Path, tables: Path, ratings: Path, tmp_path: Path
) -> None:
    data = ratings if form == "scores" else tables / "pairs.csv"
    words = (f"task.loss={loss}", f"task.metric={metric}", "train.micro_batch_size=3")
    result = fit(recipe(encoder, data, *words), tmp_path / "run")
    scores = result.scores
    assert scores[metric] > 0.8 and "base_score" not in scores  # its head is new
    assert (scores["linear_probe"] is None) == (loss != "bce")
    predictor = lorakit.load(result.folder)
    answers = predictor.predict(PAIRS)
    assert all(
        0 <= answer["score"] <= 1 and answer["pair"] == text for answer, (_, text) in zip(answers, PAIRS, strict=True)
    )
    ranked = predictor.rank("superb", [text for _, text in PAIRS], top=2)
    assert [entry["score"] for entry in ranked] == sorted((entry["score"] for entry in ranked), reverse=True)
    assert predictor.evaluate(predictor.read_labelled(str(data)).examples)[metric] == pytest.approx(scores[metric])
    lines = export_run(result.folder, "merged", tmp_path / "merged").lines
    assert any("CrossEncoder(" in line for line in lines)
    theirs = CrossEncoder(str(tmp_path / "merged"), device="cpu").predict(PAIRS)
    np.testing.assert_allclose(theirs, [answer["score"] for answer in answers], atol=1e-5)
    lines = export_run(result.folder, "peft", tmp_path / "peft").lines
    assert any("load_adapter(" in line for line in lines)
    adapted = CrossEncoder(str(encoder), num_labels=1, device="cpu")
    adapted.load_adapter(str(tmp_path / "peft"))
    np.testing.assert_allclose(adapted.predict(PAIRS), [answer["score"] for answer in answers], atol=1e-5)


def test_a_trained_cross_encoder_is_scored_before_the_first_step(encoder: Path, tables: Path, tmp_path: Path) -> None:
    first = fit(recipe(encoder, tables / "pairs.csv"), tmp_path / "first").folder
    export_run(first, "sentence-transformers", base := tmp_path / "base")
    again = fit(recipe(base, tables / "pairs.csv", "train.max_steps=1"), tmp_path / "again").scores
    assert again["base_score"] == pytest.approx(scores_of(first)["ndcg_at_10"], abs=1e-6)


@pytest.mark.parametrize(
    ("form", "words", "message"),
    [
        ("classes", (), r"a single text; task.name = 'reranker' needs pairs"),
        ("scores", (), r"scores.csv:3: the score 4.5 is not from 0 to 1"),
        ("scores", ("task.loss=listnet",), r"task.loss = 'listnet' compares the texts of a query"),
        ("pairs", ("task.metric=spearman",), r"task.metric = 'spearman' is not a score of these data"),
        ("pairs", ("task.loss=pairwise", "train.head_start=probe"), r"train.head_start = 'probe' fits single pairs"),
        ("pairs", ("task.loss=cosent",), r"task.loss = 'cosent': "),
        ("pairs", ("task.loss=margin_mse",), r"pairs.csv:2: no teacher's scores"),
    ],
)
def test_what_does_not_go_together_is_refused(
    form: str, words: Sequence[str], message: str, tables: Path, encoder: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(recipe(encoder, tables / f"{form}.csv", *words))


def test_pairs_without_negatives_and_texts_alone_are_refused(encoder: Path, tables: Path, tmp_path: Path) -> None:
    data = save_table(tmp_path / "pairs.csv", ["anchor", "positive"], [("film", "a film"), ("plot", "a plot")])
    with pytest.raises(DataError, match=r"pairs.csv: pairs without negatives, .* `lorakit mine`"):
        prepare(recipe(encoder, data))
    run = fit(recipe(encoder, tables / "pairs.csv", "train.max_steps=1"), tmp_path / "run").folder
    with pytest.raises(DataError, match=r"text 1 of 1: this run scores pairs of texts"):
        lorakit.load(run).predict(["alone"])
    with pytest.raises(DataError, match=r"reranker, does not make vectors"):
        lorakit.load(run).embed(["alone"])
