"""A text, or a pair of texts, to one of several labels that have an order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, inputs_of
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.calibration import calibration_statistics
from lorakit.tasks.metrics.labels import classification_scores, classification_statistics, mean, values
from lorakit.tasks.metrics.numbers import quadratic_kappa
from lorakit.tasks.sequence import SequenceTask, texts_of


@dataclass(frozen=True)
class OrdinalClassification(SequenceTask):
    """Ordinal classification by C - 1 steps; an answer is the list of the labels' probabilities.

    CORN (Shi, Cao & Raschka 2021, arXiv:2111.08851): p(y > k) is the product of the steps up to k, so it never grows
    with k, and the head stays a plain linear layer. The loss is their sum of binary cross-entropies over the steps
    that an example comes to, which is the negative log-likelihood of its label; we divide by the number of examples
    where they divide by that of steps. The label answered is the highest with p(y >= label) > 0.5, the median.
    """

    info = TASKS["ordinal_classification"]

    def target(self, example: Example) -> list[int]:
        return [self.labels.index(self.expected(example))]

    def stack(self, targets: Sequence[list[Any]]) -> Tensor:
        return torch.tensor([target[0] for target in targets])

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits.float()  # (B, C - 1)
        ranks, step = batch["labels"].unsqueeze(1), torch.arange(logits.shape[1], device=logits.device)
        is_beyond, comes_to = (ranks > step).float(), (ranks >= step).float()  # (B, C - 1)
        return F.binary_cross_entropy_with_logits(logits, is_beyond, weight=comes_to, reduction="none").sum(1)

    def predict(self, model: nn.Module, batch: Batch) -> list[list[float]]:
        logits = model(**inputs_of(batch)).logits.float()  # (B, C - 1)
        comes_to = F.pad(logits.sigmoid().cumprod(dim=1), (1, 0), value=1.0)  # p(y >= k): (B, C)
        stays = F.pad((-logits).sigmoid(), (0, 1), value=1.0)  # p(y = k, given y >= k)
        probabilities: list[list[float]] = (comes_to * stays).tolist()
        return probabilities

    def evaluate(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Evaluation:
        """Kappa with quadratic weights and the mean absolute error in ranks; scores of the labels; brier and nll."""
        gold, predicted = list(map(self.expected, examples)), list(map(self._median, answers))
        ranks, others = (np.array([self.labels.index(name) for name in names]) for names in (gold, predicted))
        kappa = quadratic_kappa(ranks.astype(np.float64), others.astype(np.float64))
        distances = {"quadratic_kappa": kappa, "mae": mean(np.abs(ranks - others).astype(np.float64))}
        sure = calibration_statistics(ranks.tolist(), np.array(answers))
        return Evaluation(
            {**values(distances), **classification_scores(gold, predicted, self.labels), **values(sure)},
            {**distances, **classification_statistics(gold, predicted, self.labels), **sure},
        )

    def _median(self, answer: list[float]) -> str:
        at_least = np.cumsum(answer[::-1])[::-1]
        return self.labels[max(int((at_least > 0.5).sum()) - 1, 0)]

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        probabilities = dict(zip(self.labels, answer, strict=True))
        median = self._median(answer)
        return {**texts_of(example), "label": median, "score": probabilities[median], "probabilities": probabilities}

    def expected(self, example: Example) -> str:
        assert isinstance(example.label, str)
        return example.label
