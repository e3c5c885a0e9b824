"""Which of a question's choices is right: each is read with the question, and the scores of all are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase as LETTERS
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import DataError, NumericsError
from lorakit.task_info import TASKS, TaskInfo
from lorakit.tasks.base import Batch, Cut, Item, inputs_of
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.labels import accuracy, mean, values
from lorakit.tasks.sequence import SequenceTask

TINY = 1e-38  # a probability of 0 has no logarithm


@dataclass(frozen=True)
class MultipleChoice(SequenceTask):
    """Cross-entropy over the choices of each question, of which there may be different numbers; the mean over questions.

    As AutoModelForMultipleChoice of transformers has it: one score a choice, from the pair of the text and the choice. An item is
    a choice; an answer is the list of the choices' probabilities.
    """

    info: ClassVar[TaskInfo] = TASKS["multiple_choice"]

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        items = iter(super().encode([pair for example in examples for pair in pairs_of(example)]))
        encoded = list[list[Item]]()
        for example in examples:
            right = None if example.label is None else LETTERS.index(str(example.label))
            own: list[Item] = [{**next(items)[0], "begins": [int(i == 0)]} for i in range(len(example.choices))]
            encoded.append(own if right is None else [{**item, "labels": [i == right]} for i, item in enumerate(own)])
        return encoded

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        pairs = [pair for example in examples for pair in pairs_of(example)]
        return super().cut(pairs, [[item] for own in items for item in own])

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = super().collate(items)
        batch["question"] = torch.tensor([item["begins"][0] for item in items]).cumsum(0)
        if "labels" in batch:
            batch["labels"] = batch["labels"][:, 0]
            batch["n_targets"] = batch["labels"].long()
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """That of a question stands in the row of its right choice."""
        scores: Tensor = model(**inputs_of(batch)).logits.float()[:, 0]  # (B,)
        others = batch["question"][:, None] != batch["question"]  # (B, B)
        every = scores.expand_as(others).masked_fill(others, -torch.inf).logsumexp(1)
        return (every - scores) * batch["labels"]

    def predict(self, model: nn.Module, batch: Batch) -> list[float]:
        scores: list[float] = model(**inputs_of(batch)).logits.float()[:, 0].tolist()
        return scores

    def answer(self, example: Example, raws: Sequence[Any]) -> list[float]:
        if not np.isfinite(raws).all():
            raise NumericsError(f"the model's output is not finite: {raws} for {example.text[:40]!r}")
        probabilities: list[float] = torch.tensor(raws).softmax(0).tolist()
        return probabilities

    def evaluate(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Evaluation:
        """The share of questions whose most probable choice is right, and the mean of -log the right one's probability."""
        gold = [LETTERS.index(self.expected(example)) for example in examples]
        statistics = {
            "accuracy": accuracy([answer.index(max(answer)) == i for answer, i in zip(answers, gold, strict=True)]),
            "nll": mean(-np.log([max(answer[i], TINY) for answer, i in zip(answers, gold, strict=True)])),
        }
        return Evaluation(values(statistics), statistics)

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        probabilities = dict(zip(LETTERS, answer, strict=False))
        best = max(probabilities, key=probabilities.__getitem__)
        return {
            "text": example.text,
            "choices": list(example.choices),
            "label": best,
            "score": probabilities[best],
            "probabilities": probabilities,
        }

    def expected(self, example: Example) -> str:
        assert isinstance(example.label, str)
        return example.label


def pairs_of(example: Example) -> list[Example]:
    """The pairs that are read: the text with each choice. Raises a DataError where there is none."""
    if not example.choices:
        raise DataError(f"{example.where or 'a text'}: no choices to choose among")
    return [replace(example, pair=choice, label=None) for choice in example.choices]
