"""Scores, which way is better, and how far chance can have moved one: the bootstrap over examples (Efron 1979), also in pairs.

A resample draws as many examples as there are, with replacement. The draws depend on the number of examples alone, so
resample i of every run over the same examples holds the same ones, and two runs are compared resample by resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

Scores = dict[str, Any]  # scores by name, tables of them, counts; ready for JSON
Floats = np.ndarray[Any, np.dtype[np.float64]]
LOWER = frozenset({"ece", "brier", "nll", "mae", "rmse"})  # scores of which less is better; none of them is a share
SIGNIFICANT = 0.05  # p below which a difference is more than chance explains
RESAMPLES = 1000
Z = 1.96  # standard errors on each side of a 95 % interval
TAIL = 0.025  # on either side of a 95 % interval
FEW = 50  # examples below which the bootstrap finds differences that are none: up to 14 % of the time at 8, 10 % at 20
FLIPS = 2**12  # sign flips of few examples: all there are up to 12 of them
AT_ONCE = 2**22  # drawn examples in memory


class Statistic(NamedTuple):
    """A score as a function of sums over examples, which is what resampling needs."""

    counts: Floats  # (N, K): what each example adds
    value: Callable[[Floats], Floats]  # sums (..., K) to scores (...)

    @property
    def n(self) -> int:
        """The number of examples."""
        return len(self.counts)

    def of(self, weights: Floats) -> Floats:
        """The score where each example is there so many times. Shapes: (..., N) to (...)."""
        return self.value(weights @ self.counts)


class Ranking(NamedTuple):
    """A score of the order of n examples, which is no function of sums over them."""

    n: int
    of: Callable[[Floats], Floats]  # how many times each example is there, (..., N), to scores (...)


class Evaluation(NamedTuple):
    """How good some answers are."""

    scores: Scores
    statistics: Mapping[str, Statistic | Ranking]  # those of the scores that can be resampled, by their names
    tuned: Mapping[str, Any] = MappingProxyType({})  # the best for these examples (thresholds, say), ready for JSON

    def with_intervals(self) -> Scores:
        """The scores, and under `intervals` the 95 % interval of each that can be resampled."""
        n = next((statistic.n for statistic in self.statistics.values()), 0)
        return {**self.scores, "intervals": intervals(resample(self.statistics), n)}


def goodness(scores: Scores, metric: str) -> float:
    """The score that chooses the best checkpoint, its sign turned where less is better; -inf where it is undefined."""
    value = scores.get(metric)
    if value is None or not math.isfinite(value):
        return -math.inf
    return float(-value if metric in LOWER else value)


class Resampled(NamedTuple):
    """A score, its value on each resample, which examples were right where the score is the share of them, and what each
    of few examples adds where the score is their mean (or grows with it)."""

    value: float
    values: Floats  # (RESAMPLES,)
    right: tuple[bool, ...] | None
    each: tuple[float, ...] | None = None
    n: int | None = None  # examples; unset: many


class Interval(NamedTuple):
    """The 95 % interval of a score."""

    low: float
    high: float


def resample(statistics: Mapping[str, Statistic | Ranking], drawn: int | None = None) -> dict[str, Resampled]:
    """Each statistic on the same RESAMPLES resamples of its examples, of `drawn` each; unset: as many as there are.

    Fewer are for cross-validation: as many as each of its models was trained on. Those models depend on the examples, too, which
    the usual resample does not see: over 16 to 300 examples its interval covered the true score 82 to 88 times in 100, that of
    fewer 90 to 96 times (docs/LOG.md, 2026-11-30).
    """
    if not statistics:
        return {}
    n = next(iter(statistics.values())).n
    parts = [[statistic.of(weights) for statistic in statistics.values()] for weights in _weights(n, drawn or n)]
    resampled = {}
    for (name, statistic), values in zip(statistics.items(), zip(*parts, strict=True), strict=True):
        right = each = None
        if isinstance(statistic, Statistic) and statistic.counts.shape[1] == 2:
            numbers, ones = statistic.counts.T
            if (ones == 1).all():  # a function of the mean of a number an example
                right = tuple(map(bool, numbers)) if np.isin(numbers, (0, 1)).all() else None
                each = tuple(numbers.tolist()) if n < FEW else None
        resampled[name] = Resampled(float(statistic.of(np.ones(n))), np.concatenate(values), right, each, n)
    return resampled


def _weights(n: int, drawn: int) -> Iterator[Floats]:
    """How often each of n examples is in each resample of `drawn` of them, (chunk, n): some resamples at a time."""
    draws = np.random.RandomState(0)  # the one generator whose numbers numpy never changes; runs of years are compared
    rows = max(1, AT_ONCE // n)
    for start in range(0, RESAMPLES, rows):
        chunk = min(rows, RESAMPLES - start)
        places = draws.randint(0, n, (chunk, n))[:, :drawn] + n * np.arange(chunk)[:, None]
        yield np.bincount(places.ravel(), minlength=chunk * n).reshape(chunk, n).astype(np.float64)


def interval(score: Resampled, n: int) -> Interval:
    """The percentile interval of a score over n examples.

    A score of 1 on every resample has no spread to show; its interval begins where all of n examples would still be
    right once in 40 times, 0.025^(1/n), which is the exact binomial bound for accuracy (Clopper and Pearson 1934).
    """
    low, high = quantiles(score.values)
    return Interval(TAIL ** (1 / n), 1.0) if low == high == 1.0 else Interval(low, high)


def quantiles(values: Floats) -> Interval:
    """The middle 95 % of some values; those that are undefined (a correlation of one value, say) are left out."""
    defined = values[np.isfinite(values)]
    low, high = np.quantile(defined, (TAIL, 1 - TAIL)) if len(defined) else (np.nan, np.nan)
    return Interval(float(low), float(high))


def intervals(scores: Mapping[str, Resampled], n: int) -> dict[str, list[float]]:
    """[low, high] of each score over n examples, ready for JSON; of none that is undefined."""
    return {name: list(interval(score, n)) for name, score in scores.items() if math.isfinite(score.value)}


def wilson(count: float, n: int) -> Interval:
    """The 95 % interval of a share, count of n (Wilson 1927)."""
    share, square = count / n, Z * Z / n
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def around_mean(values: Sequence[float]) -> Interval:
    """The 95 % interval of a mean, by its standard error."""
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(float(np.mean(values)) - half, float(np.mean(values)) + half)


class Difference(NamedTuple):
    """By how much a second score is higher than a first one: 95 % interval, two-sided p, and the test that gave it."""

    value: float
    low: float
    high: float
    p: float
    test: str
    spread: float  # standard deviation over resamples
    least_p: float  # that the test could have given, had all examples spoken for one side; 1 where there is no test


def difference(first: Sequence[Resampled], second: Sequence[Resampled]) -> Difference:
    """The mean difference over pairs of runs (of equal seeds), each over the same examples.

    Interval: resamples of examples and, where there are several pairs, of pairs. p: McNemar's exact test where single
    right answers are counted and there is one pair; else twice the smaller share of resamples beyond 0, itself counted.
    Of fewer than FEW examples the bootstrap sees too little: there p is that of the sign-flip test, exact for means, or
    for several pairs the larger one of both; other scores of so few have no test, and p is 1.
    """
    values = np.stack([b.values - a.values for a, b in zip(first, second, strict=True)])  # (pairs, RESAMPLES)
    drawn = np.random.RandomState(1).randint(0, len(values), values.shape)
    spread = np.take_along_axis(values, drawn, 0).mean(0) if len(values) > 1 else values[0]
    spread = spread[np.isfinite(spread)]
    value = float(np.mean([b.value - a.value for a, b in zip(first, second, strict=True)]))
    beyond = min((spread <= 0).sum(), (spread >= 0).sum())
    p, test = min(1.0, 2 * float(beyond + 1) / (len(spread) + 1)), "paired bootstrap"
    least_p, n = 2 / (len(spread) + 1), first[0].n or FEW
    if len(values) == 1 and first[0].right is not None and second[0].right is not None:
        p, test, least_p = mcnemar(first[0].right, second[0].right), "exact McNemar", 2 * 0.5**n
    elif n < FEW:
        each = [(a.each, b.each) for a, b in zip(first, second, strict=True)]
        gains = [np.subtract(b, a) for a, b in each if a is not None and b is not None]
        if len(gains) < len(each):
            p, test, least_p = 1.0, "none for so few examples", 1.0
        else:
            flipped, test, least_p = sign_flips(np.mean(gains, axis=0)), "sign flips", 2 / min(2**n, FLIPS)
            p = flipped if len(values) == 1 else max(p, flipped)
    return Difference(
        value, *quantiles(spread), p, test, float(spread.std()) if len(spread) else math.nan, min(1, least_p)
    )


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The two-sided p of the exact test on the examples that only one of two is right on (McNemar 1947)."""
    from scipy.stats import binomtest  # late: 0.3 s

    changed = [b for a, b in zip(first, second, strict=True) if a != b]
    return float(binomtest(sum(changed), len(changed)).pvalue) if changed else 1.0


def sign_flips(gains: Floats) -> float:
    """The two-sided p of a mean gain where each could as well have the other sign (Fisher 1935). Shape: (n,).

    All 2^n signs are counted, or FLIPS of them drawn at random, the true ones among them.
    """
    n = len(gains)
    if 2**n <= FLIPS:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)  # (2^n, n)
    else:
        signs = np.vstack([np.ones(n, dtype=int), np.random.RandomState(2).choice((-1, 1), (FLIPS - 1, n))])
    sums = np.abs(signs @ gains)
    return float((sums >= sums[0] * (1 - 1e-9)).mean())  # equal sums may differ in rounding
