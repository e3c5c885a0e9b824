"""A text, or a pair of texts, to one of several labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import ConfigError, did_you_mean
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, Fit, inputs_of
from lorakit.tasks.metrics.bootstrap import Evaluation, Floats, Statistic
from lorakit.tasks.metrics.calibration import at_temperature, best_temperature, calibration_statistics, ece
from lorakit.tasks.metrics.labels import classification_scores, classification_statistics, values
from lorakit.tasks.sequence import SequenceTask, most_probable, shares_of, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SequenceClassification(SequenceTask):
    """Single-label classification by cross-entropy; an answer is the list of the labels' probabilities.

    A training label may be soft (a share for each label); scores compare with its most probable one. Class weights
    multiply the losses of a class; the sum is divided by the number of examples, not of weights, so that a step does
    not depend on how its batch is cut. Balanced ones are n / (C n_c), whose mean over the training examples is 1.

    The best checkpoint's temperature is tuned on validation and reported. Answers leave it out unless `calibrate`,
    so that they are what the model itself says, merged or in others' hands; it changes no label.
    """

    info = TASKS["sequence_classification"]
    balanced: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)  # of labels in the loss; others have 1
    calibrate: bool = False
    temperature: float | None = None  # unset: not tuned yet

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        task = cls(tokenizer, labels, max_length, calibrate=section.calibrate)
        if isinstance(section.class_weights, str):
            return replace(task, balanced=section.class_weights == "balanced")
        for label in section.class_weights:
            if label not in labels:
                raise ConfigError(f"task.class_weights: {label!r} is not a label; {did_you_mean(label, labels)}")
        return replace(task, weights=section.class_weights)

    def fit(self, examples: Sequence[Example]) -> Fit:
        if not self.balanced:
            return Fit(self)
        counts = dict.fromkeys(self.labels, 0.0)
        for example in examples:
            for label, share in shares_of(example).items():
                counts[label] += share
        there = [label for label, count in counts.items() if count]
        return Fit(replace(self, weights={label: len(examples) / (len(there) * counts[label]) for label in there}))

    def target(self, example: Example) -> list[float]:
        if isinstance(example.label, str):
            return [self.labels.index(example.label)]
        shares = shares_of(example)
        return [shares.get(label, 0.0) for label in self.labels]

    def stack(self, targets: Sequence[list[Any]]) -> Tensor:
        """The labels' numbers (B,), or shares (B, C) where one of the examples has a soft label."""
        if all(len(target) == 1 for target in targets):
            return torch.tensor([target[0] for target in targets])
        one_hot = torch.eye(len(self.labels)).tolist()
        return torch.tensor([one_hot[target[0]] if len(target) == 1 else target for target in targets])

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits.float()  # (B, C)
        weight = logits.new_tensor([self.weights.get(label, 1.0) for label in self.labels]) if self.weights else None
        return F.cross_entropy(logits, batch["labels"], weight=weight, reduction="none")

    def predict(self, model: nn.Module, batch: Batch) -> list[list[float]]:
        probabilities: list[list[float]] = model(**inputs_of(batch)).logits.float().softmax(-1).tolist()
        return probabilities

    def evaluate(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Evaluation:
        """Scores of the labels, and ece, brier and nll of the probabilities as they are answered. With a temperature
        `calibration` has both kinds; on the validation examples, which tuned it, the scaled ones are a little too good."""
        gold, best, raw = list(map(self.expected, examples)), list(map(self._best, answers)), np.array(answers)
        numbers = [self.labels.index(label) for label in gold]
        sure = _calibration(numbers, self._answered(raw))
        scores = {**classification_scores(gold, best, self.labels), **values(sure)}
        if self.temperature is not None:
            unscaled, scaled = (values(_calibration(numbers, p)) for p in (raw, at_temperature(raw, self.temperature)))
            about = {"temperature": self.temperature, "applied": self.calibrate}
            scores["calibration"] = {**about, "unscaled": unscaled, "scaled": scaled}
        statistics = {**classification_statistics(gold, best, self.labels), **sure}
        return Evaluation(scores, statistics, {"temperature": best_temperature(numbers, raw)})

    def _best(self, answer: list[float]) -> str:
        return self.labels[max(range(len(answer)), key=answer.__getitem__)]

    def _answered(self, probabilities: Floats) -> Floats:
        scale = self.calibrate and self.temperature is not None
        return at_temperature(probabilities, self.temperature or 1.0) if scale else probabilities

    def with_tuned(self, tuned: Mapping[str, Any]) -> Self:
        return replace(self, temperature=float(tuned["temperature"]))

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        probabilities = dict(zip(self.labels, self._answered(np.array(answer)).tolist(), strict=True))
        best = self._best(answer)
        return {**texts_of(example), "label": best, "score": probabilities[best], "probabilities": probabilities}

    def expected(self, example: Example) -> str:
        return most_probable(example, self.labels)


def _calibration(gold: Sequence[int], probabilities: Floats) -> dict[str, Statistic]:
    return {"ece": ece(gold, probabilities), **calibration_statistics(gold, probabilities)}
