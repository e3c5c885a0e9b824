"""Answers to many examples, in their order, however they are batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorakit.data.batches import sorted_batches
from lorakit.data.example import Example
from lorakit.engine.runtime import evaluating
from lorakit.engine.train import to_device
from lorakit.tasks.base import Item, Task

BATCH_SIZE = 64  # examples per forward in prediction


def answer_all(
    model: nn.Module, task: Task, examples: Sequence[Example], items: Sequence[Sequence[Item]], device: torch.device
) -> list[Any]:
    """The task's answer to each example, in the order of `examples`; `items` has those of each example."""
    return [task.answer(*row) for row in zip(examples, predict_all(model, task, items, device), strict=True)]


def predict_all(model: nn.Module, task: Task, items: Sequence[Sequence[Item]], device: torch.device) -> list[list[Any]]:
    """The raw answers to the items of each example, in the order of `items`."""
    flat = [item for of_example in items for item in of_example]
    raws: list[Any] = [None] * len(flat)
    with evaluating(model):
        for positions in sorted_batches([len(item["input_ids"]) for item in flat], BATCH_SIZE):
            batch = to_device(task.collate([flat[i] for i in positions]), device)
            for i, raw in zip(positions, task.predict(model, batch), strict=True):
                raws[i] = raw
    rest = iter(raws)
    return [[next(rest) for _ in own] for own in items]
