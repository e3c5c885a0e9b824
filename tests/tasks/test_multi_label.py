"""Multi-label classification against transformers, scikit-learn and a search over all thresholds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics
from tests.runs import changed, sections
from tests.tiny import items_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.data.example import Example
from lorakit.models import save_model
from lorakit.pooling import Layout
from lorakit.tasks.metrics.labels import best_threshold
from lorakit.tasks.sequence import MultiLabelClassification
from lorakit.training.prepare import prepare

LABELS = ("cast", "music", "plot", "never")
GOLD = (("plot",), (), ("cast", "music"), ("cast", "plot"))
TEXTS = ["Fine film .", "the film in Brussels , the EU .", "Peter", "black film visits Peter"]
EXAMPLES = [Example(text, label=gold) for text, gold in zip(TEXTS, GOLD, strict=True)]
N = 200


@pytest.fixture
def task(word_pieces: PreTrainedTokenizerFast) -> MultiLabelClassification:
    return MultiLabelClassification(word_pieces, LABELS, max_length=32)


@pytest.fixture
def model(make_classifier: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    model = make_classifier(len(LABELS))
    model.config.problem_type = "multi_label_classification"
    return model


@pytest.fixture(scope="module")
def answered() -> tuple[list[Example], list[list[float]]]:
    """Random gold labels, none of them `never`, and probabilities that know a little about them."""
    rng = np.random.default_rng(0)
    gold = rng.random((N, len(LABELS))) < np.array([0.5, 0.1, 0.3, 0.0])
    probabilities = np.clip(0.3 * gold + 0.7 * rng.random(gold.shape), 0, 1).round(2)  # rounded: with ties
    examples = [
        Example("x", label=tuple(name for name, is_there in zip(LABELS, row, strict=True) if is_there)) for row in gold
    ]
    return examples, probabilities.tolist()


def flags(examples: list[Example]) -> np.ndarray:
    return np.array([[label in example.label for label in LABELS] for example in examples])


def test_loss_is_that_of_transformers_times_the_targets(task, model):
    batch = task.collate(items_of(task, EXAMPLES))
    assert batch["labels"].tolist() == flags(EXAMPLES).astype(float).tolist()
    assert batch["n_targets"].sum() == len(EXAMPLES) * len(LABELS)
    torch.testing.assert_close(task.losses(model, batch).sum(), model(**batch).loss * batch["n_targets"].sum())


@torch.no_grad()
def test_answers_are_probabilities_that_need_not_sum_to_one(task, model):
    batch = task.collate(items_of(task, [Example(text) for text in TEXTS]))
    assert "labels" not in batch
    torch.testing.assert_close(torch.tensor(task.predict(model, batch)), model(**batch).logits.sigmoid())


@pytest.mark.parametrize("tuned", [False, True])
def test_scores_equal_those_of_scikit_learn(task, answered, tuned):
    examples, answers = answered
    task = task.with_tuned(task.evaluate(examples, answers).tuned) if tuned else task
    scores, gold, found = task.evaluate(examples, answers).scores, flags(examples), np.array(answers)
    limits = {"at_0.5": [0.5] * len(LABELS)} | ({"tuned": list(task.thresholds.values())} if tuned else {})
    for at, thresholds in limits.items():
        predicted = found >= np.array(thresholds)
        for average in ("micro", "macro"):
            wanted = metrics.f1_score(gold, predicted, average=average, zero_division=0.0)
            assert scores[f"{average}_f1_{at}"] == pytest.approx(wanted)
        assert scores[f"subset_accuracy_{at}"] == pytest.approx(metrics.accuracy_score(gold, predicted))
    report = metrics.classification_report(gold, predicted, target_names=LABELS, output_dict=True, zero_division=0.0)
    assert {label: row["f1"] for label, row in scores["per_label"].items()} == pytest.approx(
        {label: report[label]["f1-score"] for label in LABELS}
    )
    there = gold.any(axis=0)  # scikit-learn warns of a label that is nowhere, and counts it as 0
    wanted = metrics.average_precision_score(gold[:, there], found[:, there], average="macro")
    assert scores["macro_average_precision"] == pytest.approx(wanted)
    assert scores["per_label"]["never"]["average_precision"] is None
    assert any(key.endswith("_tuned") for key in scores) == tuned


def test_statistics_equal_the_scores(task, answered):
    examples, answers = answered
    task = task.with_tuned(task.evaluate(examples, answers).tuned)
    scores, statistics, _ = task.evaluate(examples, answers)
    assert statistics.keys() == {key for key, value in scores.items() if isinstance(value, float)}
    for name, statistic in statistics.items():
        assert float(statistic.of(np.ones(statistic.n))) == pytest.approx(scores[name])


def test_best_threshold_is_that_of_a_search_over_all_of_them():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        gold, probabilities = rng.random(30) < 0.3, rng.random(30).round(1)
        values = np.unique(probabilities)
        every = [0.5, 0.0, *values, *((values[1:] + values[:-1]) / 2), 1.1]
        f1 = {t: metrics.f1_score(gold, probabilities >= t, zero_division=0.0) for t in every}
        found = best_threshold(gold, probabilities)
        assert metrics.f1_score(gold, probabilities >= found, zero_division=0.0) == pytest.approx(max(f1.values()))
        assert found == 0.5 or f1[0.5] != pytest.approx(max(f1.values()))
    assert best_threshold(np.zeros(5, dtype=bool), np.linspace(0, 1, 5)) == 0.5  # of a label without a gold example


def test_thresholds_decide_the_answered_labels(task):
    answer = [0.6, 0.4, 0.7, 0.1]
    line = task.to_json(EXAMPLES[0], answer)
    assert list(line) == ["text", "labels", "probabilities"]
    assert line["labels"] == ["cast", "plot"]
    tuned = task.with_tuned({"thresholds": dict(zip(LABELS, (0.65, 0.4, 0.65, 0.2), strict=True))})
    assert tuned.to_json(EXAMPLES[0], answer)["labels"] == ["music", "plot"]
    assert task.expected(Example("x", label=("plot", "cast"))) == ["cast", "plot"]


def test_new_head_starts_at_the_shares_of_the_labels(bert: Path, files: Path):
    prepared = prepare(changed(sections(bert, files, "multi_label_classification")))
    examples = prepared.parts["train"].examples
    bias = prepared.model.get_submodule("classifier").base.bias
    for label, logit in zip(prepared.task.labels, bias.tolist(), strict=True):
        count = sum(label in example.label for example in examples)
        assert 1 / (1 + np.exp(-logit)) == pytest.approx((count + 0.5) / (len(examples) + 1), abs=1e-6)


def test_head_that_the_checkpoint_brings_is_left_alone(bert: Path, files: Path, tmp_path: Path):
    first = prepare(changed(sections(bert, files, "multi_label_classification"), "train.method=full"))
    with torch.no_grad():
        first.model.classifier.bias.fill_(0.25)
    save_model(first.model, first.base.tokenizer, tmp_path / "whole", Layout(max_length=64))
    again = prepare(changed(sections(tmp_path / "whole", files, "multi_label_classification")))
    assert again.model.get_submodule("classifier").base.bias.tolist() == [0.25] * len(again.task.labels)
