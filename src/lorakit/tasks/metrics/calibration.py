"""How far probabilities can be trusted, and the temperature that corrects them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakit.tasks.metrics.bootstrap import Floats, Statistic
from lorakit.tasks.metrics.labels import Flags, mean

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0
TINY = float(np.finfo(np.float32).tiny)  # a probability that rounding made 0


def calibration_statistics(gold: Sequence[int], probabilities: Floats) -> dict[str, Statistic]:
    """Brier score and negative log-likelihood (nats), each the mean of a number an example.

    The Brier score is the squared distance from the gold label's one-hot row, from 0 to 2 (Brier 1950, eq. 2).

    Shapes: (N,) numbers of labels, probabilities (N, C).
    """
    one_hot = np.eye(probabilities.shape[1])[list(gold)]
    return {
        "brier": mean(((probabilities - one_hot) ** 2).sum(axis=1)),
        "nll": mean(-np.log(_of_gold(gold, probabilities))),
    }


def ece(gold: Sequence[int], probabilities: Floats) -> Statistic:
    """Expected calibration error of the most probable label. Shapes: as `calibration_statistics`."""
    return calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == np.asarray(gold))


def calibration_error(confidence: Floats, is_right: Flags) -> Statistic:
    """Expected calibration error: |accuracy - confidence| over 15 bins of equal width, weighted by the examples in them
    (Guo et al. 2017, arXiv:1706.04599, eq. 3). Shapes: (N,) both.

    Of few examples it is above 0 even where the probabilities are right, and its interval then lies above 0 too.
    """
    counts = np.column_stack(
        [np.eye(BINS)[bins_of(confidence)] * (is_right - confidence)[:, None], np.ones(len(confidence))]
    )
    return Statistic(counts, lambda sums: np.abs(sums[..., :BINS]).sum(axis=-1) / sums[..., BINS])


def bins_of(confidence: Floats) -> Any:
    """The number of the bin of each confidence, from 0: bin m is (m / 15, (m + 1) / 15]. Shapes: (N,) to (N,)."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def at_temperature(probabilities: Floats, temperature: float) -> Floats:
    """softmax(logits / temperature), from softmax(logits). Shapes: (..., C)."""
    logits = np.log(np.maximum(probabilities, TINY)) / temperature
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scaled: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return scaled


def best_temperature(gold: Sequence[int], probabilities: Floats) -> float:
    """The temperature of the lowest negative log-likelihood (Guo et al. 2017, section 4.2), from 0.05 to 20.

    It is 1 where every answer is right: then the lowest one would be the best, for want of an error to learn from.
    """
    from scipy.optimize import minimize_scalar  # late: a tenth of a second

    if (probabilities.argmax(axis=1) == np.asarray(gold)).all():
        return 1.0

    def nll(log_temperature: float) -> float:
        return -float(np.log(_of_gold(gold, at_temperature(probabilities, np.exp(log_temperature)))).mean())

    minimum = minimize_scalar(nll, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded")
    return float(np.exp(minimum.x))


def _of_gold(gold: Sequence[int], probabilities: Floats) -> Floats:
    chosen: Floats = np.maximum(probabilities[np.arange(len(probabilities)), list(gold)], TINY)
    return chosen
