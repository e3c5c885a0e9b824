"""A text, or a pair of texts, to one of several labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.tasks.base import Batch, Item, Scores, inputs_of, pad_inputs
from lorakit.tasks.metrics import classification_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SequenceClassification:
    """Single-label classification; an answer is the list of the labels' probabilities."""

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_length: int
    name: str = "sequence_classification"
    kind: str = "sequence_classification"
    metric: str = "accuracy"

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        pairs = [example.pair for example in examples] if examples[0].pair is not None else None
        encoded = self.tokenizer(
            [example.text for example in examples], pairs, truncation=True, max_length=self.max_length
        )
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        numbers = {label: i for i, label in enumerate(self.labels)}
        return [
            {
                **{key: encoded[key][i] for key in keys},
                **({} if example.label is None else {"labels": [numbers[example.label]]}),
            }
            for i, example in enumerate(examples)
        ]

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = pad_inputs(items, self.tokenizer.pad_token_id)
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([item["labels"][0] for item in items])
        return batch

    def n_targets(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits  # (B, C)
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")

    def predict(self, model: nn.Module, batch: Batch) -> list[list[float]]:
        probabilities: list[list[float]] = model(**inputs_of(batch)).logits.float().softmax(-1).tolist()
        return probabilities

    def answer(self, example: Example, raw: list[float]) -> list[float]:
        return raw

    def score(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Scores:
        gold = [example.label or "" for example in examples]
        return classification_scores(gold, [self._best(answer) for answer in answers], self.labels)

    def _best(self, answer: list[float]) -> str:
        return self.labels[max(range(len(answer)), key=answer.__getitem__)]

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        return {
            "text": example.text,
            **({} if example.pair is None else {"pair": example.pair}),
            "label": self._best(answer),
            "score": max(answer),
            "probabilities": dict(zip(self.labels, answer, strict=True)),
        }

    def expected(self, example: Example) -> str | None:
        return example.label
