"""A text, or a pair of texts, to one of several labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.tasks.base import Batch, Scores, Statistic, inputs_of
from lorakit.tasks.label_scores import classification_scores, classification_statistics
from lorakit.tasks.sequence import SequenceTask, texts_of


@dataclass(frozen=True)
class SequenceClassification(SequenceTask):
    """Single-label classification; an answer is the list of the labels' probabilities."""

    name: str = "sequence_classification"
    kind: str = "sequence_classification"
    metric: str = "accuracy"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "macro_f1", "mcc", *(["f1"] if len(self.labels) == 2 else []))

    def target(self, example: Example) -> list[int]:
        return [self.labels.index(self.expected(example))]

    def stack(self, targets: Sequence[list[Any]]) -> Tensor:
        return torch.tensor([target[0] for target in targets])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits  # (B, C)
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")

    def predict(self, model: nn.Module, batch: Batch) -> list[list[float]]:
        probabilities: list[list[float]] = model(**inputs_of(batch)).logits.float().softmax(-1).tolist()
        return probabilities

    def score(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Scores:
        return classification_scores(*self._labels(examples, answers), self.labels)

    def statistics(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> dict[str, Statistic]:
        return classification_statistics(*self._labels(examples, answers), self.labels)

    def _labels(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> tuple[list[str], list[str]]:
        return [self.expected(example) for example in examples], [self._best(answer) for answer in answers]

    def _best(self, answer: list[float]) -> str:
        return self.labels[max(range(len(answer)), key=answer.__getitem__)]

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        return {
            **texts_of(example),
            "label": self._best(answer),
            "score": max(answer),
            "probabilities": dict(zip(self.labels, answer, strict=True)),
        }

    def expected(self, example: Example) -> str:
        assert isinstance(example.label, str)
        return example.label
