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
from lorakit.tasks.base import Batch, Fit, inputs_of
from lorakit.tasks.metrics.bootstrap import Evaluation
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

    def n_targets(self, labels: Tensor) -> Tensor:
        return torch.full((len(labels),), labels.shape[1])

    def fit(self, examples: Sequence[Example]) -> Fit:
        """The head starts at each label's share of the examples, so that no step is spent on making all of them rare."""
        counts = sum(np.array(self.target(example)) for example in examples)  # one by one: they may be a stream
        shares = (counts + 0.5) / (len(examples) + 1)  # never 0 or 1
        return Fit(self, torch.from_numpy(shares).logit())

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits  # (B, C)
        return F.binary_cross_entropy_with_logits(logits.float(), batch["labels"], reduction="none").sum(1)

    def predict(self, model: nn.Module, batch: Batch) -> list[list[float]]:
        probabilities: list[list[float]] = model(**inputs_of(batch)).logits.float().sigmoid().tolist()
        return probabilities

    def evaluate(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Evaluation:
        gold = np.array([self.target(example) for example in examples], dtype=bool)  # (N, C)
        probabilities = np.array(answers)
        columns = zip(self.labels, gold.T, probabilities.T, strict=True)
        return Evaluation(
            multi_label_scores(gold, probabilities, self.labels, self.thresholds),
            multi_label_statistics(gold, probabilities, self.labels, self.thresholds),
            {"thresholds": {label: best_threshold(truth, p) for label, truth, p in columns}},
        )

    def with_tuned(self, tuned: Mapping[str, Any]) -> Self:
        return replace(self, thresholds={label: float(tuned["thresholds"][label]) for label in self.labels})

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        probabilities = dict(zip(self.labels, answer, strict=True))
        labels = [label for label, p in probabilities.items() if p >= self.thresholds.get(label, HALF)]
        return {**texts_of(example), "labels": labels, "probabilities": probabilities}

    def expected(self, example: Example) -> list[str]:
        assert isinstance(example.label, tuple)
        return [label for label in self.labels if label in example.label]
