"""A text, or a pair of texts, to a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import DataError
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, Fit, inputs_of
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.labels import values
from lorakit.tasks.metrics.numbers import number_statistics
from lorakit.tasks.sequence import SequenceTask, texts_of


@dataclass(frozen=True)
class SequenceRegression(SequenceTask):
    """Regression by mean squared error; an answer is a number in the data's own units.

    The model's output is the number less the training mean, over the training spread (standard deviation), so that
    learning rates mean the same whatever the units; both are kept in lorakit.json, as `tuned`. A merged model, or
    peft, gives that output: value = mean + spread * output.
    """

    info = TASKS["sequence_regression"]
    mean: float = 0.0
    spread: float = 1.0

    def fit(self, examples: Sequence[Example]) -> Fit:
        numbers = [self.expected(example) for example in examples]
        mean = math.fsum(numbers) / len(numbers)
        spread = math.hypot(*(x - mean for x in numbers)) / math.sqrt(len(numbers))
        if len(set(numbers)) == 1:
            place = examples[0].where.rpartition(":")[0]
            raise DataError(f"{place}: every training example has the number {numbers[0]:g}; nothing can be learned")
        return Fit(replace(self, mean=mean, spread=spread), tuned={"mean": mean, "spread": spread})

    def target(self, example: Example) -> list[float]:
        return [(self.expected(example) - self.mean) / self.spread]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits  # (B, 1)
        return F.mse_loss(logits.float(), batch["labels"], reduction="none").sum(1)

    def predict(self, model: nn.Module, batch: Batch) -> list[float]:
        logits: list[float] = model(**inputs_of(batch)).logits.float().squeeze(-1).tolist()
        return [self.mean + self.spread * z for z in logits]

    def evaluate(self, examples: Sequence[Example], answers: Sequence[float]) -> Evaluation:
        statistics = number_statistics([self.expected(example) for example in examples], answers)
        return Evaluation(values(statistics), statistics)

    def with_tuned(self, tuned: Mapping[str, Any]) -> Self:
        return replace(self, mean=float(tuned["mean"]), spread=float(tuned["spread"]))

    def to_json(self, example: Example, answer: float) -> dict[str, Any]:
        return {**texts_of(example), "value": answer}

    def expected(self, example: Example) -> float:
        assert isinstance(example.label, float)
        return example.label
