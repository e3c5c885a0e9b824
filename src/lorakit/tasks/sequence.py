"""What all tasks share that answer a text, or a pair of texts, as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from lorakit.data.example import Example
from lorakit.errors import NumericsError
from lorakit.recipe import TaskSection
from lorakit.tasks.base import Batch, Cut, Item, Task, count_longer, pad_inputs

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
