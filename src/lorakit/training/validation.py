"""Answers to validation examples with their loss beside them, which costs no second forward where a text is read once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from lorakit.data.example import Example
from lorakit.inference.answer import Answered
from lorakit.tasks.base import Batch, Task, inputs_of


class Judged(NamedTuple):
    """An answer, raw or of an example, with the loss of its labelled positions (a sum) and their number."""

    answer: Any
    loss: float
    n_targets: int


class _WithLoss:
    """The task, but for answers, which are Judged."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def predict(self, model: nn.Module, batch: Batch) -> list[Judged]:
        if self.task.info.model_kind != "text2text":  # which writes its answers, and has the loss of the right ones
            model = Answered(model(**inputs_of(batch)).logits, dict(model.named_children()))
        losses = self.task.losses(model, batch).tolist()
        return list(map(Judged, self.task.predict(model, batch), losses, batch["n_targets"].tolist()))

    def answer(self, example: Example, raws: Sequence[Judged]) -> Judged:
        answers, losses, n_targets = zip(*raws, strict=True)
        return Judged(self.task.answer(example, answers), sum(losses), sum(n_targets))


def with_loss(task: Task) -> Task:
    """The same task, whose answers to labelled examples are Judged."""
    return cast(Task, _WithLoss(task))


def mean_loss(judged: Sequence[Judged]) -> float | None:
    """The mean over all labelled positions, as training's; None where there is none, or it is not finite."""
    total, n = sum(each.loss for each in judged), sum(each.n_targets for each in judged)
    return total / n if n and math.isfinite(total) else None
