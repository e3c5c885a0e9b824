"""Calibration against scikit-learn, a count by hand, and a search over temperatures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from lorakit.tasks.metrics.labels import at_temperature, best_temperature, calibration_statistics, values
from lorakit.tasks.metrics.labels import ece as ece_statistic

C = 4


def ece(gold: np.ndarray, probabilities: np.ndarray) -> float:
    return values({"ece": ece_statistic(gold, probabilities)})["ece"]


@pytest.fixture(scope="module")
def answers() -> tuple[list[int], np.ndarray]:
    """Gold labels drawn from softmax(logits), and probabilities that are three times too sure."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1000, C))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gold = [int(rng.choice(C, p=row)) for row in true]
    return gold, torch.tensor(3 * logits).softmax(-1).numpy()


def test_brier_and_nll_equal_those_of_scikit_learn(answers):
    gold, probabilities = answers
    assert values(calibration_statistics(gold, probabilities)) == pytest.approx(
        {
            "brier": metrics.brier_score_loss(gold, probabilities, scale_by_half=False, labels=range(C)),
            "nll": metrics.log_loss(gold, probabilities, labels=range(C)),
        }
    )


def test_ece_is_that_of_a_count_bin_by_bin(answers):
    gold, probabilities = answers
    confidence, right = probabilities.max(1), probabilities.argmax(1) == gold
    wanted = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            wanted += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert ece(gold, probabilities) == pytest.approx(wanted)


def test_confidence_on_the_edge_of_two_bins_is_in_the_lower_one():
    probabilities = np.array([[0.6, 0.4], [0.62, 0.38]])  # 0.6 ends the ninth of 15 bins
    assert ece([0, 1], probabilities) == pytest.approx((abs(1 - 0.6) + abs(0 - 0.62)) / 2)


def test_temperature_divides_the_logits(answers):
    _, probabilities = answers
    wanted = (torch.tensor(probabilities).log() / 2.5).softmax(-1).numpy()
    np.testing.assert_allclose(at_temperature(probabilities, 2.5), wanted)
    np.testing.assert_allclose(at_temperature(probabilities, 1.0), probabilities)


def test_temperature_takes_a_probability_of_0():
    np.testing.assert_allclose(at_temperature(np.array([1.0, 0.0]), 1.0), [1.0, 0.0], atol=1e-30)


def test_best_temperature_is_that_of_a_search_and_undoes_what_was_done(answers):
    gold, probabilities = answers
    found = best_temperature(gold, probabilities)
    grid = np.linspace(1, 5, 81)
    nll = [metrics.log_loss(gold, at_temperature(probabilities, t), labels=range(C)) for t in grid]
    assert found == pytest.approx(grid[np.argmin(nll)], abs=grid[1] - grid[0])
    assert found == pytest.approx(3, rel=0.15)
    assert ece(gold, at_temperature(probabilities, found)) < ece(gold, probabilities) / 3


def test_temperature_without_an_error_to_learn_from_is_1():
    assert best_temperature([0, 1], np.array([[0.9, 0.1], [0.4, 0.6]])) == 1.0
