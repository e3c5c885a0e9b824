"""Scores of written texts against one reference each, as functions of sums over examples; from 0 to 1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lorakit.tasks.metrics.bootstrap import Floats, Statistic
from lorakit.tasks.metrics.labels import mean

ORDERS = 6  # of chrF: n-grams of 1 to 6 characters
BETA2 = 4  # its recall counts for twice its precision


def text_statistics(gold: Sequence[str], written: Sequence[str]) -> dict[str, Statistic]:
    """chrF, ROUGE-1, 2 and L, and the share of texts that are equal.

    chrF (Popovic 2015) is that of the corpus, without white space, as sacrebleu has it (divided by 100). ROUGE (Lin 2004) is
    the mean F1 an example over lower-case words of a-z and 0-9, without stemming, as rouge-score has it: for texts in other
    scripts it says nothing.
    """
    pairs = list(zip(gold, written, strict=True))
    words = [[re.findall("[a-z0-9]+", text.lower()) for text in pair] for pair in pairs]
    return {
        "chrf": Statistic(np.array([_character_counts(*pair) for pair in pairs], dtype=np.float64), _chrf),
        "rouge_1": mean(np.array([_overlap(*_grams(pair, 1)) for pair in words])),
        "rouge_2": mean(np.array([_overlap(*_grams(pair, 2)) for pair in words])),
        "rouge_l": mean(np.array([_f1(_longest_common(*pair), *map(len, pair)) for pair in words])),
        "exact_match": mean(np.array([float(reference == text) for reference, text in pairs])),
    }


def _character_counts(gold: str, written: str) -> list[int]:
    """For each order the n-grams written, those of the reference, and those in both."""
    sides = ["".join(text.split()) for text in (gold, written)]
    counts = []
    for n in range(1, ORDERS + 1):
        reference, hypothesis = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in sides)
        both = (reference & hypothesis).total()
        counts += [hypothesis.total() if reference else 0, reference.total(), both]
    return counts


def _chrf(sums: Floats) -> Floats:
    """Shapes: (..., 18) to (...)."""
    written, reference, both = np.moveaxis(sums.reshape(*sums.shape[:-1], ORDERS, 3), -1, 0)
    there = (written > 0) & (reference > 0)
    n = np.maximum(there.sum(-1), 1)
    precision = (np.where(there, both, 0) / np.where(there, written, 1)).sum(-1) / n
    recall = (np.where(there, both, 0) / np.where(there, reference, 1)).sum(-1) / n
    bottom = BETA2 * precision + recall
    score: Floats = (1 + BETA2) * precision * recall / np.where(bottom > 0, bottom, 1)
    return score


def _grams(pair: Iterable[Sequence[str]], n: int) -> list[Counter[tuple[str, ...]]]:
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in pair]


def _overlap(gold: Counter[tuple[str, ...]], written: Counter[tuple[str, ...]]) -> float:
    return _f1((gold & written).total(), gold.total(), written.total())


def _f1(both: int, gold: int, written: int) -> float:
    return 2 * both / (gold + written) if both else 0.0


def _longest_common(gold: Sequence[str], written: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(written) + 1)
    for word in gold:
        before = row
        row = [0]
        for j, other in enumerate(written):
            row.append(before[j] + 1 if word == other else max(row[j], before[j + 1]))
    return row[-1]
