"""A text, or a pair of texts, to any number of labels, none included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, inputs_of
from lorakit.tasks.metrics.bootstrap import Ranking, Scores, Statistic
from lorakit.tasks.metrics.labels import HALF, best_threshold, multi_label_scores, multi_label_statistics
from lorakit.tasks.sequence import SequenceTask, texts_of


@dataclass(frozen=True)
class MultiLabelClassification(SequenceTask):
    """One yes or no a label; an answer is the list of the labels' probabilities.

    Average precision chooses the best checkpoint, since it needs no threshold; the thresholds are tuned afterwards,
    each to the F1 of its label on the validation examples, and decide which labels are answered. So the scores that
    end in `_tuned` are a little too good on validation; those of `data.test` are not.
    """

    info = TASKS["multi_label_classification"]
    thresholds: Mapping[str, float] = field(default_factory=dict)  # by label; empty: 0.5 for all

    def target(self, example: Example) -> list[float]:
        assert isinstance(example.label, tuple)
        return [float(label in example.label) for label in self.labels]

    def n_targets(self, batch: Batch) -> int:
        return batch["labels"].numel()

    @torch.no_grad()
    def start(self, head: nn.Linear, examples: Sequence[Example]) -> None:
        """Begin at each label's share of the examples, so that no step is spent on making all of them rare."""
        counts = sum(np.array(self.target(example)) for example in examples)  # one by one: they may be a stream
        shares = (counts + 0.5) / (len(examples) + 1)  # never 0 or 1
        head.bias.copy_(torch.from_numpy(shares).logit())

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits  # (B, C)
        return F.binary_cross_entropy_with_logits(logits.float(), batch["labels"], reduction="none").sum(1)

    def predict(self, model: nn.Module, batch: Batch) -> list[list[float]]:
        probabilities: list[list[float]] = model(**inputs_of(batch)).logits.float().sigmoid().tolist()
        return probabilities

    def score(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Scores:
        return multi_label_scores(self._gold(examples), np.array(answers), self.labels, self.thresholds)

    def statistics(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> dict[str, Statistic | Ranking]:
        return multi_label_statistics(self._gold(examples), np.array(answers), self.labels, self.thresholds)

    def _gold(self, examples: Sequence[Example]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Shapes: (N, C)."""
        return np.array([self.target(example) for example in examples], dtype=bool)

    @property
    def tuned(self) -> dict[str, Any]:
        return {"thresholds": dict(self.thresholds)} if self.thresholds else {}

    def tune(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> dict[str, Any]:
        columns = zip(self.labels, self._gold(examples).T, np.array(answers).T, strict=True)
        return {"thresholds": {label: best_threshold(gold, found) for label, gold, found in columns}}

    def with_tuned(self, tuned: Mapping[str, Any]) -> Self:
        return replace(self, thresholds={label: float(tuned["thresholds"][label]) for label in self.labels})

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        probabilities = dict(zip(self.labels, answer, strict=True))
        found = [label for label, p in probabilities.items() if p >= self.thresholds.get(label, HALF)]
        return {**texts_of(example), "labels": found, "probabilities": probabilities}

    def expected(self, example: Example) -> list[str]:
        assert isinstance(example.label, tuple)
        return [label for label in self.labels if label in example.label]
