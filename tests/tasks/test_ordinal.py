"""Ordinal classification against its definition, transformers' loss, and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn import metrics
from tests.tiny import items_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.data.example import Example
from lorakit.errors import ConfigError, DataError
from lorakit.recipe import make_recipe
from lorakit.task_info import steps
from lorakit.tasks.registry import check_labels, find_labels
from lorakit.tasks.sequence import OrdinalClassification

LABELS = ("poor", "fair", "good", "great")
TEXTS = ["Fine film .", "the film in Brussels , the EU .", "Peter", "black film visits Peter"]
EXAMPLES = [Example(text, label=label) for text, label in zip(TEXTS, LABELS, strict=True)]


@pytest.fixture
def task(word_pieces: PreTrainedTokenizerFast) -> OrdinalClassification:
    return OrdinalClassification(word_pieces, LABELS, max_length=32)


@pytest.fixture
def model(make_classifier: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    return make_classifier(len(steps(LABELS)))


def by_definition(logits: list[float]) -> list[float]:
    """Going up a step at a time, each with its own probability."""
    here, found = 1.0, []
    for logit in logits:
        up = 1 / (1 + np.exp(-logit))
        found.append(here * (1 - up))
        here *= up
    return [*found, here]


@torch.no_grad()
def test_answers_are_those_of_the_definition(task, model):
    batch = task.collate(items_of(task, EXAMPLES))
    wanted = [by_definition(row) for row in model(**{k: v for k, v in batch.items() if k != "labels"}).logits.tolist()]
    np.testing.assert_allclose(task.predict(model, batch), wanted, rtol=1e-5)
    np.testing.assert_allclose(np.sum(wanted, axis=1), 1)


def test_loss_is_the_negative_log_likelihood(task, model):
    batch = task.collate(items_of(task, EXAMPLES))
    answers = task.predict(model, batch)
    wanted = -sum(np.log(answer[LABELS.index(e.label)]) for e, answer in zip(EXAMPLES, answers, strict=True))
    assert batch["n_targets"].sum() == len(EXAMPLES)
    assert task.losses(model, batch).sum().item() == pytest.approx(wanted, rel=1e-5)


def test_loss_of_two_labels_is_that_of_transformers(word_pieces, make_classifier):
    model = make_classifier(1)
    model.config.problem_type = "multi_label_classification"
    examples = [Example(text, label=label) for text, label in zip(TEXTS, "abba", strict=True)]
    task = OrdinalClassification(word_pieces, ("a", "b"), max_length=32)
    batch = task.collate(items_of(task, examples))
    theirs = model(**batch | {"labels": batch["labels"].unsqueeze(1).float()}).loss
    torch.testing.assert_close(task.losses(model, batch).sum(), theirs * len(examples))


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ([0.6, 0.0, 0.0, 0.4], "poor"),
        ([0.4, 0.0, 0.2, 0.4], "good"),
        ([0, 0, 0, 1], "great"),
        ([0.5, 0.5, 0, 0], "poor"),
    ],
)
def test_answered_label_is_the_median(task, answer, label):
    line = task.to_json(EXAMPLES[0], answer)
    assert list(line) == ["text", "label", "score", "probabilities"]
    assert (line["label"], line["score"]) == (label, answer[LABELS.index(label)])


@pytest.fixture(scope="module")
def answered() -> tuple[list[Example], list[list[float]]]:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, len(LABELS), 120)
    answers = [by_definition((1.5 * (rank - np.arange(3)) + rng.normal(size=3)).tolist()) for rank in gold]
    return [Example("x", label=LABELS[rank]) for rank in gold], answers


def test_scores_equal_those_of_scikit_learn(task, answered):
    scores = task.evaluate(*answered).scores
    names = map(task.expected, answered[0]), map(task._median, answered[1])
    gold, found = ([LABELS.index(label) for label in side] for side in names)
    assert scores["quadratic_kappa"] == pytest.approx(metrics.cohen_kappa_score(gold, found, weights="quadratic"))
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(gold, found))
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(gold, found))
    assert scores["nll"] == pytest.approx(metrics.log_loss(gold, answered[1], labels=range(len(LABELS))))
    assert set(task.info.metrics) <= scores.keys()


def test_statistics_equal_the_scores(task, answered):
    scores, statistics, _ = task.evaluate(*answered)
    assert statistics.keys() == {key for key, value in scores.items() if isinstance(value, float)}
    for name, statistic in statistics.items():
        assert float(statistic.value(statistic.counts.sum(0))) == pytest.approx(scores[name])


def test_kappa_of_one_constant_is_undefined(task):
    scores = task.evaluate([EXAMPLES[1]] * 3, [[0.1, 0.8, 0.1, 0.0]] * 3).scores
    assert (scores["accuracy"], scores["quadratic_kappa"]) == (1.0, None)


def test_order_is_given_or_by_value():
    examples = [Example("x", label=label) for label in ("10", "2", "-1.5", "2")]
    assert find_labels("ordinal_classification", examples) == ("-1.5", "2", "10")
    assert find_labels("ordinal_classification", examples, ("2", "-1.5", "10", "3")) == ("2", "-1.5", "10", "3")


@pytest.mark.parametrize("labels", [("fair", "poor"), ("1", "2", "1.0"), ("1", "nan"), ("0", "inf")])
def test_order_of_what_is_not_all_different_numbers_is_asked_for(labels):
    with pytest.raises(ConfigError, match=rf"^task\.order is missing; .*from lowest to highest: {', '.join(labels)}"):
        find_labels("ordinal_classification", [Example("x", label=label) for label in labels])


@pytest.mark.parametrize("order", [("a",), ("a", "b", "a")])
def test_order_needs_two_different_labels(order):
    raw = {"model": {"base": "minilm"}, "task": {"name": "ordinal_classification", "order": order}}
    with pytest.raises(ConfigError, match=r"task\.order = .*needs at least two labels, each once"):
        make_recipe(raw)


def test_label_outside_of_the_order_is_refused():
    with pytest.raises(DataError, match=r"^a\.csv:2: label 'god' is not in the order; did you mean 'good'\?"):
        check_labels("ordinal_classification", [Example("x", label="god", where="a.csv:2")], LABELS)


def test_shares_are_refused():
    with pytest.raises(DataError, match=r"^a\.csv:2: a soft label; ordinal_classification needs one label"):
        check_labels("ordinal_classification", [Example("x", label={"good": 1.0}, where="a.csv:2")], LABELS)
