"""Regression against transformers, scipy and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn import metrics
from tests.tiny import items_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.data.example import Example
from lorakit.errors import DataError
from lorakit.tasks.metrics.bootstrap import RESAMPLES, goodness, intervals, resample
from lorakit.tasks.metrics.labels import values
from lorakit.tasks.metrics.numbers import number_statistics
from lorakit.tasks.sequence import SequenceRegression

NUMBERS = (1.5, -40.0, 1000.0, 3.0)
TEXTS = ["Fine film .", "the film in Brussels , the EU .", "Peter", "black film visits Peter"]
EXAMPLES = [Example(text, label=x, where=f"a.csv:{i}") for i, (text, x) in enumerate(zip(TEXTS, NUMBERS, strict=True))]


@pytest.fixture
def task(word_pieces: PreTrainedTokenizerFast) -> SequenceRegression:
    return SequenceRegression(word_pieces, (), max_length=32).fit(EXAMPLES).task


@pytest.fixture
def model(make_classifier: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    model = make_classifier(1)
    model.config.problem_type = "regression"
    return model


@pytest.fixture(scope="module", params=[0.0, 1e6])
def numbers(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Gold numbers and answers, far from zero too, with ties."""
    rng = np.random.default_rng(0)
    gold = request.param + rng.normal(size=100).round(1)
    return gold, gold + rng.normal(size=100)


def test_targets_have_mean_0_and_spread_1(task):
    targets = task.collate(items_of(task, EXAMPLES))["labels"]
    torch.testing.assert_close(targets.mean(), torch.tensor(0.0))
    torch.testing.assert_close(targets.std(correction=0), torch.tensor(1.0))


def test_loss_is_that_of_transformers_times_the_targets(task, model):
    batch = task.collate(items_of(task, EXAMPLES))
    assert batch["n_targets"].sum() == len(EXAMPLES)
    torch.testing.assert_close(task.losses(model, batch).sum(), model(**batch).loss * len(EXAMPLES))


@torch.no_grad()
def test_answers_are_in_the_units_of_the_data(task, model):
    items = items_of(task, EXAMPLES)
    z = model(**task.collate(items)).logits.squeeze(-1).numpy()
    found = task.predict(model, task.collate(items))
    np.testing.assert_allclose(found, np.mean(NUMBERS) + np.std(NUMBERS) * z, rtol=1e-6)


def test_units_survive_shipping(task, word_pieces):
    shipped = SequenceRegression(word_pieces, (), max_length=32).with_tuned(task.fit(EXAMPLES).tuned)
    assert shipped == task


def number_scores(gold: np.ndarray, answers: np.ndarray) -> dict[str, Any]:
    return values(number_statistics(gold, answers))


def test_scores_equal_those_of_scipy_and_scikit_learn(numbers):
    assert number_scores(*numbers) == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(*numbers).statistic,
            "spearman": scipy.stats.spearmanr(*numbers).statistic,
            "mae": metrics.mean_absolute_error(*numbers),
            "rmse": metrics.root_mean_squared_error(*numbers),
        }
    )


def test_statistics_of_a_resample_are_its_scores(numbers):
    chosen = np.random.default_rng(1).integers(0, 100, 100)
    resampled = number_scores(numbers[0][chosen], numbers[1][chosen])
    weights = np.bincount(chosen, minlength=100)
    found = {name: float(statistic.of(weights)) for name, statistic in number_statistics(*numbers).items()}
    assert found == pytest.approx(resampled)


@pytest.mark.parametrize("gold", [[1.0, 2.0, 4.0], [0.1, 0.1, 0.1]])
def test_correlation_with_a_constant_is_undefined(gold):
    scores = number_scores(gold, [0.7] * 3)
    assert (scores["pearson"], scores["spearman"]) == (None, None)
    assert scores["mae"] == pytest.approx(np.abs(np.array(gold) - 0.7).mean())
    assert goodness(scores, "pearson") == -math.inf < goodness({"pearson": -1.0}, "pearson")


def test_interval_leaves_out_resamples_without_a_correlation():
    """One gold number in 20 is another one, so that about a third of the resamples are constant."""
    gold = np.array([1e6] * 19 + [1e6 + 3.0])  # so large that sums of squares would be mostly rounding
    answers = gold + np.random.default_rng(0).normal(size=20)
    found = resample(number_statistics(gold, answers))
    drawn = np.random.RandomState(0).randint(0, 20, (RESAMPLES, 20))  # those of tests/tasks/test_intervals.py
    for name, score in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        wanted = [score(gold[i], answers[i]).statistic if np.ptp(gold[i]) else np.nan for i in drawn]
        np.testing.assert_allclose(found[name].values, wanted, atol=1e-6)
        assert 0.2 < np.isnan(wanted).mean() < 0.5
        assert intervals(found, 20)[name] == pytest.approx(np.nanquantile(wanted, (0.025, 0.975)), abs=1e-6)


def test_single_number_in_training_is_refused(word_pieces):
    same = [Example("x", label=3.5, where=f"a.csv:{i}") for i in range(3)]
    with pytest.raises(DataError, match=r"^a\.csv: every training example has the number 3\.5; nothing can be learned"):
        SequenceRegression(word_pieces, (), max_length=32).fit(same)


def test_json_has_the_text_and_the_value(task):
    assert task.to_json(Example("a", pair="b"), 3.25) == {"text": "a", "pair": "b", "value": 3.25}
    assert task.expected(EXAMPLES[1]) == NUMBERS[1]
