"""What every task offers, and the padding that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.data.example import Example

IGNORE = -100  # the label of positions that the loss leaves out
Item = Mapping[str, list[int]]  # one encoded example: input_ids, labels, ...
Batch = dict[str, Tensor]
Scores = dict[str, Any]  # names of scores in [0, 1], tables of them, counts; ready for JSON


class Task(Protocol):
    """One problem over one base model. `Answer` is a type of the task's own."""

    @property
    def name(self) -> str:
        """The task's name in the recipe."""
        ...

    @property
    def kind(self) -> str:
        """The kind of model, a key of models.KINDS."""
        ...

    @property
    def metric(self) -> str:
        """The key of `score` that chooses the best checkpoint; higher is better."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """What is told apart: classes, tags, or entity types."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        ...

    def encode(self, examples: Sequence[Example]) -> list[Item]:
        """Token ids and targets, tokenised once for the whole run."""
        ...

    def collate(self, items: Sequence[Item]) -> Batch:
        """A padded batch. Shapes: input_ids and attention_mask (B, T)."""
        ...

    def n_targets(self, batch: Batch) -> int:
        """Labelled positions: what the summed loss is divided by."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over labelled positions, a scalar."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """A raw answer for each row of the batch."""
        ...

    def answer(self, example: Example, raw: Any) -> Any:
        """The raw answer put in terms of the example."""
        ...

    def score(self, examples: Sequence[Example], answers: Sequence[Any]) -> Scores:
        """Scores of answers to labelled examples; `metric` is one of the keys."""
        ...

    def to_json(self, example: Example, answer: Any) -> dict[str, Any]:
        """One line of predictions.jsonl."""
        ...

    def expected(self, example: Example) -> Any:
        """What the answer should have been, in the form that `to_json` gives."""
        ...


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different length as one tensor (B, T), filled up with `value` at the end."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def pad_inputs(items: Sequence[Item], pad_id: int) -> Batch:
    """The inputs that every model takes. Shapes: input_ids, attention_mask and token_type_ids (B, T)."""
    ids = [item["input_ids"] for item in items]
    batch = {"input_ids": pad(ids, pad_id), "attention_mask": pad([[1] * len(row) for row in ids], 0)}
    if "token_type_ids" in items[0]:
        batch["token_type_ids"] = pad([item["token_type_ids"] for item in items], 0)
    return batch


def inputs_of(batch: Batch) -> Batch:
    """The part of a batch that goes into the model's forward."""
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
