"""Tasks that answer a text, or a pair of texts, as a whole: by a label, several labels, an ordered label or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import ConfigError, DataError, NumericsError, did_you_mean
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, Cut, Fit, Item, Task, count_longer, inputs_of, pad_inputs
from lorakit.tasks.metrics.bootstrap import Evaluation, Floats, Statistic
from lorakit.tasks.metrics.labels import (
    HALF,
    at_temperature,
    best_temperature,
    best_threshold,
    calibration_statistics,
    classification_scores,
    classification_statistics,
    ece,
    mean,
    multi_label_scores,
    multi_label_statistics,
    values,
)
from lorakit.tasks.metrics.numbers import number_statistics, quadratic_kappa

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SequenceTask(Task):
    """Encoding, padding and counting; what a label is, and how an answer is judged, the tasks themselves say."""

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_length: int

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        return cls(tokenizer, labels, max_length)

    def target(self, example: Example) -> list[Any]:
        """What the loss compares with the logits of this labelled example."""
        raise NotImplementedError

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        encoded = self._tokenized(examples, truncation=True, max_length=self.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        inputs = [{key: encoded[key][i] for key in keys} for i in range(len(examples))]
        return [
            [item if example.label is None else item | {"labels": self.target(example)}]
            for item, example in zip(inputs, examples, strict=True)
        ]

    def _tokenized(self, examples: Sequence[Example], **options: Any) -> Any:
        pairs = [example.pair for example in examples] if examples[0].pair is not None else None
        texts = [self.source(example) for example in examples]
        return self.tokenizer(texts, pairs, return_attention_mask=False, **options)  # padding makes it anew

    def source(self, example: Example) -> str:
        """The text that the model reads, before the second one of a pair."""
        return example.text

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        def tokenize(positions: list[int]) -> list[list[int]]:
            ids: list[list[int]] = self._tokenized([examples[i] for i in positions], verbose=False)["input_ids"]
            return ids

        return Cut(texts=count_longer([item["input_ids"] for (item,) in items], self.max_length, tokenize))

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = pad_inputs(items, self.tokenizer)
        if "labels" in items[0]:
            batch["labels"] = self.stack([item["labels"] for item in items])
            batch["n_targets"] = self.n_targets(batch["labels"])
        return batch

    def stack(self, targets: Sequence[list[Any]]) -> Tensor:
        """The targets of a batch. Shapes: (B, ...)."""
        return torch.tensor(targets)

    def n_targets(self, labels: Tensor) -> Tensor:
        """The labelled positions of each row. Shapes: (B, ...) to (B,)."""
        return torch.ones(len(labels), dtype=torch.long)

    def answer(self, example: Example, raws: Sequence[Any]) -> Any:
        if not np.isfinite(raws[0]).all():
            raise NumericsError(f"the model's output is not finite: {raws[0]} for {example.text[:40]!r}")
        return raws[0]


def shares_of(example: Example) -> Mapping[str, float]:
    """The labels of an example with their shares; a label alone has all of it."""
    assert isinstance(example.label, (str, Mapping))
    return {example.label: 1.0} if isinstance(example.label, str) else example.label


def most_probable(example: Example, labels: Sequence[str]) -> str:
    """The label of an example; of a soft one the most probable, the first of several."""
    shares = shares_of(example)
    return max((label for label in labels if label in shares), key=shares.__getitem__)


def texts_of(example: Example) -> dict[str, str]:
    """The text, and the second one of a pair, as answers show them."""
    return {"text": example.text} | ({} if example.pair is None else {"pair": example.pair})


# One of several labels


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


# Any number of labels, none included


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


# A number


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


# One of several labels that have an order


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
