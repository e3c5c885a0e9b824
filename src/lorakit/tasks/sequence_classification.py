"""A text, or a pair of texts, to one of several labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.recipe import TaskSection
from lorakit.tasks.base import Batch, Cut, Item, Scores, Statistic, Untuned, count_longer, inputs_of, pad_inputs
from lorakit.tasks.label_scores import accuracy, classification_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SequenceClassification(Untuned):
    """Single-label classification; an answer is the list of the labels' probabilities."""

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_length: int
    name: str = "sequence_classification"
    kind: str = "sequence_classification"
    metric: str = "accuracy"

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        return cls(tokenizer, labels, max_length)

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        encoded = self._tokenized(examples, truncation=True, max_length=self.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        numbers = {label: i for i, label in enumerate(self.labels)}
        return [
            [
                {
                    **{key: encoded[key][i] for key in keys},
                    **({} if example.label is None else {"labels": [numbers[str(example.label)]]}),
                }
            ]
            for i, example in enumerate(examples)
        ]

    def _tokenized(self, examples: Sequence[Example], **options: Any) -> Any:
        pairs = [example.pair for example in examples] if examples[0].pair is not None else None
        return self.tokenizer([example.text for example in examples], pairs, **options)

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        def tokenize(positions: list[int]) -> list[list[int]]:
            ids: list[list[int]] = self._tokenized([examples[i] for i in positions], verbose=False)["input_ids"]
            return ids

        return Cut(texts=count_longer([item["input_ids"] for (item,) in items], self.max_length, tokenize))

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

    def answer(self, example: Example, raws: Sequence[list[float]]) -> list[float]:
        return raws[0]

    def score(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Scores:
        gold = [str(example.label) for example in examples]
        return classification_scores(gold, [self._best(answer) for answer in answers], self.labels)

    def statistics(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> dict[str, Statistic]:
        return {"accuracy": accuracy([e.label == self._best(a) for e, a in zip(examples, answers, strict=True)])}

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

    def expected(self, example: Example) -> Any:
        return example.label
