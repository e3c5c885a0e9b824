"""Scores of labels and of their probabilities: functions of sums over examples where they can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorakit.tasks.metrics.bootstrap import Floats, Ranking, Scores, Statistic

BINS = 15  # of confidence, in the calibration error
COLDEST, HOTTEST = 0.05, 20.0  # temperatures
TINY = float(np.finfo(np.float32).tiny)  # a probability that rounding made 0
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def classification_scores(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Scores:
    """Accuracy, macro F1, Matthews' correlation, with two labels the F1 of the second (the positive one), scores per
    class, and the confusion matrix (rows gold, columns predicted). A predicted label may be none of `labels`."""
    scores = values(classification_statistics(gold, predicted, labels))
    if len(labels) == 2:
        scores["positive_label"] = labels[1]
    flags = flags_of(gold, labels), flags_of(predicted, labels)
    matrix = flags[0].T.astype(int) @ flags[1]
    return {
        **scores,
        "per_class": per_label(*flags, labels),
        "confusion": {"labels": list(labels), "matrix": matrix.tolist()},
    }


def flags_of(names: Sequence[str], labels: Sequence[str]) -> Flags:
    """Which of the labels each name is, if any. Shapes: (N,) to (N, C)."""
    return np.array([[name == label for label in labels] for name in names])


def classification_statistics(
    gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> dict[str, Statistic]:
    """Those of the classification scores that are functions of sums."""
    counts = label_counts(flags_of(gold, labels), flags_of(predicted, labels))
    statistics = {
        "accuracy": accuracy([g == p for g, p in zip(gold, predicted, strict=True)]),
        "macro_f1": Statistic(counts, macro_f1),
        "mcc": Statistic(counts, mcc),
    }
    if len(labels) == 2:
        statistics["f1"] = Statistic(counts, lambda sums: _f1(*(sums[..., k] for k in (1, 3, 5))))  # of the second
    return statistics


def values(statistics: Mapping[str, Statistic | Ranking]) -> Scores:
    """The scores over all examples; None for one that is undefined, such as the correlation with a constant."""
    numbers = {name: float(statistic.of(np.ones(statistic.n))) for name, statistic in statistics.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def per_label(gold: Flags, predicted: Flags, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and number of gold examples of each label. Shapes: gold and predicted (N, C)."""
    counts = label_counts(gold, predicted).sum(axis=0).reshape(3, -1).astype(int).T.tolist()
    return {label: prf(*row) for label, row in zip(labels, counts, strict=True)}


def label_counts(gold: Flags, predicted: Flags) -> Floats:
    """What each example adds to the numbers of right, predicted and gold ones of each label.

    Shapes: gold and predicted (N, C), counts (N, 3 C).
    """
    return np.concatenate([gold & predicted, predicted, gold], axis=1).astype(np.float64)


def micro_f1(sums: Floats) -> Floats:
    """F1 over all labels together. Shapes: sums of `label_counts` (..., 3 C), F1 (...)."""
    return _f1(*(part.sum(axis=-1) for part in np.split(sums, 3, axis=-1)))


def macro_f1(sums: Floats) -> Floats:
    """The mean of the labels' F1, which is 0 for a label that is nowhere. Shapes: as `micro_f1`."""
    mean: Floats = _f1(*np.split(sums, 3, axis=-1)).mean(axis=-1)
    return mean


def mcc(sums: Floats) -> Floats:
    """Matthews' correlation for any number of labels (Gorodkin 2004, eq. 8); 0 where one side is constant.

    Shapes: as `micro_f1`, each example with one gold label.
    """
    right, predicted, gold = np.split(sums, 3, axis=-1)
    n = gold.sum(axis=-1)
    unknown = n - predicted.sum(axis=-1)  # answers that are none of the labels
    covariance = right.sum(axis=-1) * n - (predicted * gold).sum(axis=-1)
    spread = (n**2 - (predicted**2).sum(axis=-1) - unknown**2) * (n**2 - (gold**2).sum(axis=-1))
    value: Floats = np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)
    return value


def accuracy(right: Sequence[bool] | Flags) -> Statistic:
    """The share of right answers."""
    return mean(np.asarray(right, dtype=np.float64))


def mean(numbers: Floats) -> Statistic:
    """The mean of a number an example. Shapes: (N,)."""
    return Statistic(np.stack([numbers, np.ones_like(numbers)], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def prf(right: float, predicted: int, gold: int) -> dict[str, float]:
    """Precision, recall and F1 from numbers of right, predicted and gold ones; 0 where a denominator is 0."""
    return {
        "precision": right / predicted if predicted else 0.0,
        "recall": right / gold if gold else 0.0,
        "f1": 2 * right / (predicted + gold) if predicted + gold else 0.0,
        "support": gold,
    }


def _f1(right: Floats, predicted: Floats, gold: Floats) -> Floats:
    """0 where nothing is predicted and nothing is gold."""
    value: Floats = 2 * right / np.maximum(predicted + gold, 1)
    return value


# Scores of several yes or no an example, and the thresholds that make a yes of a probability.


HALF = 0.5


def multi_label_scores(
    gold: Flags, probabilities: Floats, labels: Sequence[str], thresholds: Mapping[str, float]
) -> Scores:
    """The statistics' values; per label, what is at the thresholds, and the average precision where it has an example.

    Shapes: gold and probabilities (N, C).
    """
    table = per_label(gold, probabilities >= _row(labels, thresholds), labels)
    for label, row, truth, p in zip(labels, table.values(), gold.T, probabilities.T, strict=True):
        row["average_precision"] = float(average_precision(truth, p).of(np.ones(len(gold)))) if truth.any() else None
        row["threshold"] = thresholds.get(label, HALF)
    return {**values(multi_label_statistics(gold, probabilities, labels, thresholds)), "per_label": table}


def multi_label_statistics(
    gold: Flags, probabilities: Floats, labels: Sequence[str], thresholds: Mapping[str, float]
) -> dict[str, Statistic | Ranking]:
    """Macro average precision; F1 and subset accuracy at 0.5 and, where they were tuned, at the thresholds.

    A label without a gold example has no average precision, and the mean is over the others; its F1 is 0 and counts.

    Shapes: gold and probabilities (N, C).
    """
    statistics: dict[str, Statistic | Ranking] = {
        "macro_average_precision": macro_average_precision(gold, probabilities)
    }
    for at, limits in {"at_0.5": {}, **({"tuned": thresholds} if thresholds else {})}.items():
        predicted = probabilities >= _row(labels, limits)
        counts = label_counts(gold, predicted)
        statistics[f"micro_f1_{at}"] = Statistic(counts, micro_f1)
        statistics[f"macro_f1_{at}"] = Statistic(counts, macro_f1)
        statistics[f"subset_accuracy_{at}"] = accuracy((gold == predicted).all(axis=1))
    return statistics


def macro_average_precision(gold: Flags, probabilities: Floats) -> Ranking:
    """The mean of the labels' average precision over those that have a gold example, NaN where none has."""
    each = [average_precision(truth, p) for truth, p in zip(gold.T, probabilities.T, strict=True)]

    def of(weights: Floats) -> Floats:
        precisions = np.stack([label.of(weights) for label in each])  # (C, ...)
        n = (~np.isnan(precisions)).sum(axis=0)
        value: Floats = np.where(n > 0, np.nansum(precisions, axis=0) / np.maximum(n, 1), np.nan)
        return value

    return Ranking(len(gold), of)


def average_precision(gold: Flags, probabilities: Floats) -> Ranking:
    """The mean over gold examples of the precision among all that are at least as probable; NaN where none is gold.

    It is the area under the steps of precision over recall (Manning et al. 2008, section 8.4). Shapes: (N,).
    """
    order = np.argsort(-probabilities)
    rising, is_gold = -probabilities[order], gold[order]
    last = np.searchsorted(rising, rising[is_gold], "right") - 1  # for each gold one, the last that is as probable
    last_gold = is_gold.cumsum()[last] - 1  # the same among the gold ones

    def of(weights: Floats) -> Floats:
        drawn = weights[..., order]
        right = drawn[..., is_gold]
        precision = right.cumsum(axis=-1)[..., last_gold] / np.maximum(drawn.cumsum(axis=-1)[..., last], 1)
        with np.errstate(invalid="ignore"):
            value: Floats = (right * precision).sum(axis=-1) / right.sum(axis=-1)
        return value

    return Ranking(len(gold), of)


def _row(labels: Sequence[str], thresholds: Mapping[str, float]) -> Floats:
    return np.array([thresholds.get(label, HALF) for label in labels])


def best_threshold(gold: Flags, probabilities: Floats) -> float:
    """The threshold of the highest F1; of several the nearest to 0.5, and 0.5 itself where nothing is better.

    Each lies halfway between two probabilities that differ, so that it decides other examples as it decides these.

    Shapes: (N,).
    """
    order = np.argsort(-probabilities)
    falling = probabilities[order]
    cuts = np.append((falling[:-1] + falling[1:]) / 2, falling[-1] / 2)  # the i-th lets i + 1 examples through
    usable = np.append(falling[:-1] > falling[1:], True)
    f1 = 2 * gold[order].cumsum() / (np.arange(len(gold)) + 1 + gold.sum())
    half = 2 * (gold & (probabilities >= HALF)).sum() / max(1, (probabilities >= HALF).sum() + gold.sum())
    best = f1[usable].max()
    if best <= half:
        return HALF
    candidates = cuts[usable & (f1 == best)]
    return float(candidates[np.abs(candidates - HALF).argmin()])


# Calibration


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
