"""Answers to many examples, in their order, however they are batched and shared among ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from lorakit.data.batches import sorted_batches
from lorakit.data.example import Example
from lorakit.models import depends_on_batch
from lorakit.runtime.device import evaluating, to_device
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.signals import ELSEWHERE, Stop
from lorakit.tasks.base import Item, Task

T = TypeVar("T")


class Most(NamedTuple):
    """What one forward takes in prediction: more tokens do not fit a CPU's cache, fewer rows leave a decoder idle.

    On a CPU, where the tokens are bounded, many short texts go together: a small model's forward costs more than its sums.
    """

    examples: int
    cpu_examples: int
    cpu_tokens: int


READ = Most(64, 256, 2048)  # by models that read a text once
WRITTEN = Most(128, 128, 8192)  # by those that write token by token
CHUNK = 4096  # examples that are answered together: enough to sort them by length, few enough to hold


def chunks(values: Iterable[T]) -> Iterator[list[T]]:
    """Neighbours, CHUNK at a time."""
    rest = iter(values)
    while some := list(islice(rest, CHUNK)):
        yield some


def batches_of(model: nn.Module, task: Task, items: Sequence[Item], device: torch.device) -> list[list[int]]:
    """What the forwards over these items take, as positions: longest first, as many as suit the device.

    Where the model's answer depends on padding there is none.
    """
    most = WRITTEN if task.kind == "text2text" else READ
    limits = (most.cpu_examples, most.cpu_tokens) if device.type == "cpu" else (most.examples, None)
    return sorted_batches([len(item["input_ids"]) for item in items], *limits, alike=depends_on_batch(model))


def answer_all(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    items: Sequence[Sequence[Item]],
    device: torch.device,
    *,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
) -> list[Any]:
    """The task's answer to each example, in the order of `examples`; `items` has those of each example.

    Raises:
        KeyboardInterrupt: `stop` was asked for, of this rank or another one.
    """
    answers: list[Any] = []
    for some, own in zip(chunks(examples), chunks(items), strict=True):
        raws = predict_all(model, task, own, device, ranks=ranks, stop=stop)
        answers += [task.answer(*row) for row in zip(some, raws, strict=True)]
    return answers


def predict_all(
    model: nn.Module,
    task: Task,
    items: Sequence[Sequence[Item]],
    device: torch.device,
    *,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
) -> list[list[Any]]:
    """The raw answers to the items of each example, in the order of `items`, on every rank; `stop` as `answer_all`.

    The batches are the same whatever the number of ranks, and each is answered by one of them: so are the answers.
    """
    flat = [item for of_example in items for item in of_example]
    batches = batches_of(model, task, flat, device)
    own: list[list[Any]] = []
    broken_off = False
    try:
        with evaluating(model), stop.immediate() if stop else nullcontext():
            for positions in batches[ranks.rank :: ranks.size]:
                batch = to_device(task.collate([flat[i] for i in positions]), device)
                own.append(list(task.predict(model, batch)))
    except KeyboardInterrupt:
        if ranks.size == 1:
            raise
        broken_off = True
    if ranks.any(broken_off):
        if stop and not stop.asked:
            stop.asked = ELSEWHERE
        raise KeyboardInterrupt
    gathered = ranks.gather(own)
    raws: list[Any] = [None] * len(flat)
    for number, positions in enumerate(batches):
        for i, raw in zip(positions, gathered[number % ranks.size][number // ranks.size], strict=True):
            raws[i] = raw
    rest = iter(raws)
    return [[next(rest) for _ in of_example] for of_example in items]
