"""Answers to many examples, in order, batched and divided among ranks.

By one adapter, or by many over one base: then a forward has rows of all of them, and each task reads its rows of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from lorakit.data.batches import sorted_batches
from lorakit.data.choices import MOST as MOST_CHOICES
from lorakit.data.example import Example, of_text
from lorakit.errors import DataError
from lorakit.inference.side import Side
from lorakit.lora import routed
from lorakit.models import depends_on_batch
from lorakit.runtime.device import evaluating, to_device
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.signals import ELSEWHERE, Stop
from lorakit.tasks.base import Batch, Item, Task, inputs_of, pad_inputs

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """An adapter of a model, and its task."""

    task: Task
    tokenizer: Any = None  # that pads rows of several adapters
    key: str | None = None  # its name in the hosts; None leaves the model's routing unchanged
    outputs: int | None = None  # of its head; another adapter's may be wider
    layers: Mapping[str, nn.Module] = field(default_factory=dict)  # of its task, by name, that the model lacks (a CRF)


class Row(NamedTuple):
    """One item, and the adapter that answers it."""

    adapter: Adapter
    item: Item


class Most(NamedTuple):
    """The size of a forward in prediction: more tokens do not fit a CPU's cache, fewer rows leave a decoder idle.

    On a CPU tokens are bounded rather than rows, so that many short texts share the overhead of a forward.
    """

    examples: int
    cpu_examples: int
    cpu_tokens: int


READ = Most(64, 256, 2048)  # encoders
WRITTEN = Most(128, 256, 16384)  # text-to-text models
CHUNK = 4096  # examples answered together: enough to sort by length, few enough for memory


def check_input(example: Example, side: Side, place: str) -> None:
    """Raise a DataError that begins with `place` if a text is empty, or lacks the second text or the choices it needs."""
    if not example.text.strip():
        raise DataError(f"{place} is empty")
    if empty := next((n for n, choice in enumerate(example.choices, start=1) if not choice.strip()), None):
        raise DataError(f"{place}: choice {empty} is empty")
    if side.task.info.wants == "choices":
        if not example.choices:
            raise DataError(
                f"{place}: this run picks one of several choices, but there are none; give them in columns of a file, "
                "with --choice, with rank() in Python, or with /rerank"
            )
        if not 2 <= len(example.choices) <= MOST_CHOICES:
            raise DataError(f"{place}: {len(example.choices)} choices, not 2 to {MOST_CHOICES}")
    elif example.choices:
        raise DataError(f"{place}: this run does not pick one of several choices, its task is {side.task.name}")
    elif side.task.info.wants == "related":
        if example.pair is None and side.task.info.has_head:
            raise DataError(f"{place}: this run scores pairs of texts")
    elif (example.pair is None) != (side.columns.pair is None):
        form = "pairs of texts" if side.columns.pair else "single texts"
        raise DataError(f"{place}: this run was trained on {form}")


def as_input(task: Task, example: Example) -> Example:
    """A text as the task takes it: split into words for a task over words."""
    return of_text(example.text) if task.info.wants == "words" else example


def chunks(values: Iterable[T]) -> Iterator[list[T]]:
    """Consecutive values, CHUNK at a time."""
    rest = iter(values)
    while some := list(islice(rest, CHUNK)):
        yield some


def batches_of(model: nn.Module, task: Task, items: Sequence[Item], device: torch.device) -> list[list[int]]:
    """Batches of positions of these items: longest first, of a size that suits the device.

    There is no padding if the model's output depends on it.
    """
    most = WRITTEN if task.info.model_kind == "text2text" else READ
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
        KeyboardInterrupt: a signal came, on this rank or another one.
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
    """The raw answers to the items of each example, in the order of `items`, on every rank; `stop` as `answer_all`."""
    adapter = Adapter(task=task)
    rows = [Row(adapter, item) for of_example in items for item in of_example]
    with evaluating(model):
        raws = iter(answer_rows(model, rows, device, ranks=ranks, stop=stop))
    return [[next(raws) for _ in of_example] for of_example in items]


def answer_rows(
    model: nn.Module, rows: Sequence[Row], device: torch.device, *, ranks: Ranks = ALONE, stop: Stop | None = None
) -> list[Any]:
    """The raw answer to each row, in order and on every rank, of a model that is in eval mode.

    The batches are the same whatever the number of ranks, and each is answered by one of them: so are the answers. In a
    batch an adapter's rows are neighbours. Text-to-text models drop finished rows, so there each adapter has its own batches.
    A text of which a vector is wanted goes through the model once, however often it stands in the rows.
    """
    groups: dict[Adapter | None, list[int]] = {}
    first: dict[tuple[Adapter, tuple[int, ...]], int] = {}  # the place of each text of an embedding model
    repeats: dict[int, int] = {}  # the first place of the same text, by place
    for place, (adapter, item) in enumerate(rows):
        kind = adapter.task.info.model_kind
        if kind == "embedding" and (at := first.setdefault((adapter, tuple(item["input_ids"])), place)) != place:
            repeats[place] = at
        else:
            groups.setdefault(adapter if kind == "text2text" else None, []).append(place)
    batches = [
        sorted((own[i] for i in batch), key=lambda place: rows[place].adapter.key or "")
        for own in groups.values()
        for batch in batches_of(model, rows[own[0]].adapter.task, [rows[place].item for place in own], device)
    ]
    answered: list[list[Any]] = []
    broken_off = False
    try:
        with stop.immediate() if stop else nullcontext():
            for batch in batches[ranks.rank :: ranks.size]:
                answered.append(_forward(model, [rows[place] for place in batch], device))
    except KeyboardInterrupt:
        if ranks.size == 1:
            raise
        broken_off = True
    if ranks.any(broken_off):
        if stop and not stop.signal:
            stop.signal = ELSEWHERE
        raise KeyboardInterrupt
    gathered = ranks.gather(answered)
    raws: list[Any] = [None] * len(rows)
    for number, batch in enumerate(batches):
        for place, raw in zip(batch, gathered[number % ranks.size][number // ranks.size], strict=True):
            raws[place] = raw
    for place, at in repeats.items():
        raws[place] = raws[at]
    return raws


def _forward(model: Any, rows: Sequence[Row], device: torch.device) -> list[Any]:
    """The raw answers of one forward; an adapter's rows are neighbours."""
    segments = [(adapter, [row.item for row in own]) for adapter, own in groupby(rows, key=attrgetter("adapter"))]
    first, items = segments[0]
    routing = [(adapter.key, len(own)) for adapter, own in segments]
    with routed(model, routing) if first.key else nullcontext():
        if len(segments) == 1 and not first.layers:
            return list(first.task.predict(model, to_device(first.task.collate(items), device)))
        inputs = to_device(pad_inputs([row.item for row in rows], first.tokenizer), device)
        logits = model(**inputs).logits  # (B, C) or (B, T, C), C of the widest head
    raws: list[Any] = []
    for (adapter, items), own in zip(segments, logits.split([len(own) for _, own in segments]), strict=True):
        batch = to_device(adapter.task.collate(items), device)
        raws += adapter.task.predict(Answered(own[..., : adapter.outputs], adapter.layers), batch)
    return raws


class Answered(nn.Module):
    """Replaces the model for a task, and returns logits that were computed already."""

    def __init__(self, logits: Tensor, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.logits = logits
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, **inputs: Tensor) -> Any:
        """Shapes: input_ids (B, T), logits (B, C) or (B, T, C)."""
        length = inputs["input_ids"].shape[1]  # other rows of the forward may have been longer
        return SimpleNamespace(logits=self.logits[:, :length] if self.logits.dim() == 3 else self.logits)


# Answers to labelled examples with their loss, which costs no second forward where a text is read once


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
        if self.task.info.contrasts:  # whose loss depends on what else is in the batch
            return [Judged(raw, 0.0, 0) for raw in self.task.predict(model, batch)]
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
