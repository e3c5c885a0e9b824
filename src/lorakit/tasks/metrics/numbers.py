"""Scores of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lorakit.tasks.metrics.bootstrap import Floats, Ranking, Statistic
from lorakit.tasks.metrics.labels import Flags, mean

ROUNDING = 1e-12  # share of a sum of squares below which a spread is none


def number_statistics(gold: Sequence[float], answers: Sequence[float]) -> dict[str, Statistic | Ranking]:
    """Pearson's and Spearman's correlation (NaN where one side is constant), mean absolute and root mean squared error."""
    x, y = np.asarray(gold, dtype=np.float64), np.asarray(answers, dtype=np.float64)
    return {
        "pearson": Statistic(_moments(_centred(x), _centred(y)), _pearson),
        "spearman": spearman(x, y),
        "mae": mean(np.abs(x - y)),
        "rmse": Statistic(mean((x - y) ** 2).counts, lambda sums: np.sqrt(sums[..., 0] / sums[..., 1])),
    }


def spearman(x: Floats, y: Floats) -> Ranking:
    """Pearson's correlation of the ranks (Spearman 1904), equal numbers sharing the mean of theirs. Shapes: (N,)."""
    rank_x, rank_y = _ranks(x), _ranks(y)

    def of(weights: Floats) -> Floats:
        middle = (weights.sum(axis=-1, keepdims=True) + 1) / 2
        x, y = rank_x(weights) - middle, rank_y(weights) - middle
        xx, yy, xy = ((weights * product).sum(axis=-1) for product in (x * x, y * y, x * y))
        return _where(xx * yy > 0, xy, np.sqrt(xx * yy))

    return Ranking(len(x), of)


def _ranks(x: Floats) -> Callable[[Floats], Floats]:
    """From how many times each number is there, (..., N), to the rank of each, (..., N), the first being 1."""
    order = np.argsort(x)
    first, end = (np.searchsorted(x[order], x, side) for side in ("left", "right"))  # of those that are equal

    def of(weights: Floats) -> Floats:
        below = np.concatenate([np.zeros_like(weights[..., :1]), weights[..., order].cumsum(axis=-1)], axis=-1)
        mean: Floats = (below[..., first] + below[..., end] + 1) / 2
        return mean

    return of


def quadratic_kappa(gold: Floats, answers: Floats) -> Statistic:
    """Cohen's kappa of ranks with quadratic weights (Cohen 1968): 1 - mean squared difference / the one expected of
    independent sides with these distributions; NaN where both sides are the same constant."""
    return Statistic(_moments(gold, answers), _kappa)


def _kappa(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    expected = n * (xx + yy) - 2 * x * y
    return 1 - _where(expected > 0, n * (xx + yy - 2 * xy), expected)


def _centred(x: Floats) -> Floats:
    """Less the mean, so that sums of squares lose no digits; exactly 0 where all are equal."""
    return x - x.mean() if np.ptp(x) else np.zeros_like(x)


def _moments(x: Floats, y: Floats) -> Floats:
    """Shapes: (N,), (N,), (N, 6)."""
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _pearson(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread_x, spread_y = n * xx - x * x, n * yy - y * y
    # a resample of one number, which is far from the mean of all, has a spread of rounding errors
    is_spread = (spread_x > ROUNDING * n * xx) & (spread_y > ROUNDING * n * yy)
    return _where(is_spread, n * xy - x * y, np.sqrt(np.maximum(spread_x, 0) * np.maximum(spread_y, 0)))


def _where(is_defined: Flags, above: Floats, below: Floats) -> Floats:
    """The quotient where it is defined, NaN elsewhere."""
    value: Floats = np.where(is_defined, above / np.where(is_defined, below, 1), np.nan)
    return value
