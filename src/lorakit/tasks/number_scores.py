"""Scores of numbers, by scipy where they are no functions of sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakit.tasks.base import Floats, Scores, Statistic
from lorakit.tasks.label_scores import mean, values


def number_scores(gold: Sequence[float], answers: Sequence[float]) -> Scores:
    """Pearson's and Spearman's correlation (0 where one side is constant), mean absolute and root mean squared error."""
    from scipy.stats import rankdata  # late: a tenth of a second

    ranks = number_statistics(rankdata(gold), rankdata(answers))
    scores = values(number_statistics(gold, answers))
    return {"pearson": scores.pop("pearson"), "spearman": values(ranks)["pearson"], **scores}


def number_statistics(gold: Sequence[float] | Floats, answers: Sequence[float] | Floats) -> dict[str, Statistic]:
    """Those of the scores that are functions of sums."""
    x, y = np.asarray(gold, dtype=np.float64), np.asarray(answers, dtype=np.float64)
    return {
        "pearson": Statistic(_moments(_centred(x), _centred(y)), _pearson),
        "mae": mean(np.abs(x - y)),
        "rmse": Statistic(mean((x - y) ** 2).counts, lambda sums: np.sqrt(sums[..., 0] / sums[..., 1])),
    }


def quadratic_kappa(gold: Floats, answers: Floats) -> Statistic:
    """Cohen's kappa of ranks with quadratic weights (Cohen 1968): 1 - mean squared difference / the one expected of
    independent sides with these distributions; 0 where both sides are the same constant."""
    return Statistic(_moments(gold, answers), _kappa)


def _kappa(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    expected = n * (xx + yy) - 2 * x * y
    value: Floats = np.where(expected > 0, 1 - n * (xx + yy - 2 * xy) / np.where(expected > 0, expected, 1), 0.0)
    return value


def _centred(x: Floats) -> Floats:
    """Less the mean, so that sums of squares lose no digits; exactly 0 where all are equal."""
    return x - x.mean() if np.ptp(x) else np.zeros_like(x)


def _moments(x: Floats, y: Floats) -> Floats:
    """Shapes: (N,), (N,), (N, 6)."""
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _pearson(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spreads = (n * xx - x * x) * (n * yy - y * y)
    value: Floats = np.where(spreads > 0, (n * xy - x * y) / np.sqrt(np.where(spreads > 0, spreads, 1)), 0.0)
    return value
