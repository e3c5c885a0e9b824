"""Bootstrap intervals and paired tests against scipy on the same draws, exact binomial intervals, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from lorakit.tasks.metrics import bootstrap
from lorakit.tasks.metrics.bootstrap import (
    FEW,
    RESAMPLES,
    TAIL,
    Floats,
    Resampled,
    Statistic,
    difference,
    interval,
    intervals,
    mcnemar,
    resample,
    sign_flips,
)
from lorakit.tasks.metrics.entities import entity_statistics
from lorakit.tasks.metrics.labels import accuracy, ece, macro_average_precision
from lorakit.tasks.metrics.numbers import spearman

N = 200
LEVEL = 1 - 2 * TAIL


def rights(share: float, n: int = N, seed: int = 0) -> list[bool]:
    """The same share of right answers, in random places."""
    return [bool(x) for x in np.random.default_rng(seed).permutation(np.arange(n) < round(share * n))]


def mean_of(values: Floats) -> Statistic:
    return Statistic(np.stack([values, np.ones_like(values)], 1), lambda sums: sums[..., 0] / sums[..., 1])


def scored(right: list[bool]) -> Resampled:
    return resample({"accuracy": accuracy(right)})["accuracy"]


# Intervals


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_interval_equals_that_of_scipy_on_the_same_draws(share):
    right = rights(share)
    theirs = stats.bootstrap(
        (np.array(right, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        confidence_level=LEVEL,
        random_state=np.random.RandomState(0),
        vectorized=True,
    ).confidence_interval
    assert interval(scored(right), N) == pytest.approx(tuple(theirs))


def test_statistic_of_several_sums_equals_that_of_scipy_on_the_same_draws():
    rng = np.random.default_rng(0)
    tags = np.array(["O", "B-A", "B-B"])
    gold, predicted = (rng.choice(tags, (50, 4)).tolist() for _ in range(2))
    found = entity_statistics(gold, predicted)["entity_f1"]
    theirs = stats.bootstrap(
        tuple(found.counts.T),
        lambda right, guessed, wanted: 2 * right.sum() / (guessed.sum() + wanted.sum()),
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.RandomState(0),
    ).confidence_interval
    assert interval(resample({"f": found})["f"], 50) == pytest.approx(tuple(theirs))


def test_smaller_resample_has_the_first_ones_of_the_usual_one():
    """So that runs with other folds are compared on draws that overlap."""
    values = np.random.default_rng(0).normal(size=30)
    theirs = np.random.RandomState(0).randint(0, 30, (RESAMPLES, 30))[:, :20]
    np.testing.assert_allclose(resample({"m": mean_of(values)}, 20)["m"].values, values[theirs].mean(1))


@pytest.fixture(scope="module")
def drawn() -> Floats:
    """Which of 40 examples each resample holds."""
    return np.random.RandomState(0).randint(0, 40, (RESAMPLES, 40))[:60]


def test_average_precision_of_each_resample_equals_that_of_scikit_learn(drawn):
    """Equal probabilities among it, and a label that some resamples lack."""
    rng = np.random.default_rng(0)
    gold = rng.permuted(np.arange(40)[:, None] < (20, 8, 1), axis=0)
    found = (gold * 0.3 + rng.random((40, 3))).round(1)
    wanted = []
    for chosen in drawn:
        there = gold[chosen].any(axis=0)
        wanted.append(metrics.average_precision_score(gold[chosen][:, there], found[chosen][:, there], average="macro"))
    assert any(not gold[chosen].any(axis=0).all() for chosen in drawn)
    values = resample({"ap": macro_average_precision(gold, found)})["ap"].values
    np.testing.assert_allclose(values[: len(drawn)], wanted)


def test_spearman_of_each_resample_equals_that_of_scipy(drawn):
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 5, 40) / 2
    answers = (gold + rng.normal(size=40)).round(1)
    wanted = [stats.spearmanr(gold[chosen], answers[chosen]).statistic for chosen in drawn]
    np.testing.assert_allclose(resample({"s": spearman(gold, answers)})["s"].values[: len(drawn)], wanted)


def test_ece_of_each_resample_is_its_own(drawn):
    rng = np.random.default_rng(0)
    probabilities, gold = rng.dirichlet((0.5, 0.5, 0.5), 40), rng.integers(0, 3, 40)
    alone = [ece(gold[chosen], probabilities[chosen]).of(np.ones(40)) for chosen in drawn]
    np.testing.assert_allclose(resample({"e": ece(gold, probabilities)})["e"].values[: len(drawn)], alone)


@pytest.mark.parametrize("n", [1, 12, 300])
def test_interval_of_a_perfect_score_is_the_exact_binomial_one(n):
    exact = stats.binomtest(n, n).proportion_ci(LEVEL)
    assert interval(scored([True] * n), n) == pytest.approx((exact.low, 1.0))


def test_every_statistic_sees_the_same_draws_whatever_stands_beside_it():
    first, second = accuracy(rights(0.7)), mean_of(np.arange(N, dtype=float))
    together = resample({"first": first, "second": second})
    assert np.array_equal(together["first"].values, resample({"first": first})["first"].values)
    assert np.array_equal(together["second"].values, resample({"x": second})["x"].values)


@pytest.mark.parametrize("at_once", [1, 7 * N, 2**22])
def test_memory_limit_changes_no_number(monkeypatch, at_once):
    wanted = scored(rights(0.7)).values
    monkeypatch.setattr(bootstrap, "AT_ONCE", at_once)
    assert np.array_equal(scored(rights(0.7)).values, wanted)


def test_undefined_resamples_are_left_out():
    values = np.array([np.nan] * 10 + list(range(RESAMPLES - 10)))
    assert interval(Resampled(1.0, values, None), N) == pytest.approx(tuple(np.quantile(values[10:], (TAIL, 1 - TAIL))))


def test_intervals_of_no_statistic_are_none():
    assert intervals(resample({}), N) == {}


# Pairs


def test_p_of_single_answers_is_that_of_mcnemar():
    first, second = rights(0.7, seed=1), rights(0.8, seed=2)
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    found = difference([scored(first)], [scored(second)])
    assert (found.test, found.p) == ("exact McNemar", stats.binomtest(gained, gained + lost).pvalue)
    assert found.value == pytest.approx((gained - lost) / N)
    assert found.low < found.value < found.high


def test_mcnemar_of_the_same_answers_is_no_difference():
    assert mcnemar([True, False], [True, False]) == 1.0


def test_difference_interval_equals_that_of_scipy_on_the_same_draws():
    rng = np.random.default_rng(0)
    first = rng.normal(size=N)
    second = first + rng.normal(0.1, 0.5, N)
    theirs = stats.bootstrap(
        (second - first,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=np.random.RandomState(0)
    )
    a, b = (resample({"mean": mean_of(values)})["mean"] for values in (first, second))
    found = difference([a], [b])
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval))
    assert found.spread == pytest.approx(theirs.standard_error, rel=0.01)
    assert found.test == "paired bootstrap"
    wanted = stats.ttest_rel(first, second).pvalue
    assert found.p == pytest.approx(wanted, abs=4 * (wanted / RESAMPLES) ** 0.5)  # 4 standard errors of counting


def test_difference_of_several_pairs_is_their_mean_and_spreads_over_them():
    pairs = [(rights(0.7, seed=s), rights(0.7 + gain, seed=s)) for s, gain in ((1, 0.0), (2, 0.1), (3, 0.2))]
    first, second = ([scored(pair[i]) for pair in pairs] for i in (0, 1))
    found = difference(first, second)
    alone = [difference([a], [b]) for a, b in zip(first, second, strict=True)]
    assert found.value == pytest.approx(np.mean([one.value for one in alone]))
    assert found.high - found.low > max(one.high - one.low for one in alone)
    assert found.test == "paired bootstrap"


# Few examples


@pytest.mark.parametrize("n", [6, 9])
def test_p_of_few_means_is_that_of_scipy_s_exact_permutation_test(n):
    rng = np.random.default_rng(n)
    gains = rng.normal(0.5, 1, n)
    theirs = stats.permutation_test((gains,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flips(gains) == pytest.approx(theirs)
    a, b = (resample({"nll": mean_of(values)})["nll"] for values in (np.zeros(n), gains))
    found = difference([a], [b])
    assert (found.test, found.p, found.least_p) == ("sign flips", pytest.approx(theirs), 2 / 2**n)


def test_p_of_drawn_flips_is_near_that_of_a_t_test():
    gains = np.random.default_rng(1).normal(0.4, 1, 40)
    wanted = stats.ttest_1samp(gains, 0).pvalue
    assert sign_flips(gains) == pytest.approx(wanted, abs=4 * (wanted / 4096) ** 0.5 + 1 / 4096)


@pytest.mark.parametrize("n", [3, 8])
def test_few_equal_systems_raise_no_false_alarm_too_many(n):
    """Of systems that are equally good p lies below 5 % in no more than 5 % of 400 draws, of whatever kind the score."""
    rng, rounds = np.random.default_rng(n), 400
    alarms = {"mean": 0, "entity_f1": 0}
    tags = np.array(["O", "B-A", "B-B"])
    for _ in range(rounds):
        gold, *sides = (rng.choice(tags, (n, 4)).tolist() for _ in range(3))
        runs = [
            resample(
                {"mean": mean_of(rng.exponential(size=n)), "entity_f1": entity_statistics(gold, side)["entity_f1"]}
            )
            for side in sides
        ]
        for name in alarms:
            alarms[name] += difference([runs[0][name]], [runs[1][name]]).p < 0.05
    assert all(stats.binomtest(count, rounds, 0.05, alternative="greater").pvalue > 0.01 for count in alarms.values())
    assert n > 5 or not any(alarms.values())


def test_few_examples_have_no_test_of_what_is_no_mean():
    few, many = ([entity_statistics([["B-A"]] * n, [["O"]] * n)["entity_f1"] for _ in range(2)] for n in (FEW - 1, FEW))
    for sides, test in ((few, "none for so few examples"), (many, "paired bootstrap")):
        a, b = (resample({"f1": side})["f1"] for side in sides)
        assert difference([a], [b]).test == test
