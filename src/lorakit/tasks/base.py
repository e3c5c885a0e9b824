"""What every task offers, and the padding that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.task_info import TaskInfo
from lorakit.tasks.metrics.bootstrap import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of positions that the loss leaves out
Item = Mapping[str, list[Any]]  # one encoded example: input_ids, labels, ...; numbers all of them
Batch = dict[str, Tensor]


class Cut(NamedTuple):
    """What the length limits take away: texts not read to their end, targets not written to theirs, entities lost."""

    texts: int = 0
    targets: int = 0
    entities: int = 0


class Fit(NamedTuple):
    """What the training examples give before the first step."""

    task: Task
    head_bias: Tensor | None = None  # (outputs,): where the bias of a new output layer starts; None: at random
    tuned: Mapping[str, Any] = MappingProxyType({})  # what `with_tuned` makes the same task of, ready for JSON


class Task(Protocol):
    """One problem over one base model, and the facts about it.

    What `predict` gives for an item and `answer` for an example are types of the task's own; where the task wants words,
    an answer has their `tags`. A task that subclasses this has `fit`, `cut` and `with_tuned` of one with nothing to fit,
    to cut or to tune.
    """

    info: ClassVar[TaskInfo]

    def fit(self, examples: Sequence[Example]) -> Fit:
        """The task with what it takes from the training examples (a target's mean, say), and the start of a new head."""
        return Fit(self)

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        """Token ids and targets, tokenised once for the whole run: for each example one item, or one a window or a text."""
        ...

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        """What the length limits took away when these examples were encoded to these items."""
        return Cut()

    def collate(self, items: Sequence[Item]) -> Batch:
        """A padded batch. Shapes: input_ids and attention_mask (B, T).

        Where the items have targets it has `n_targets` (B,) too: the labelled positions of each row.
        """
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each row, summed over its labelled positions. Shapes: (B,)."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        """A raw answer for each row of the batch."""
        ...

    def answer(self, example: Example, raws: Sequence[Any]) -> Any:
        """The raw answers to the example's items, put in terms of the example."""
        ...

    def evaluate(self, examples: Sequence[Example], answers: Sequence[Any]) -> Evaluation:
        """How good the answers to labelled examples are; its scores have those of `info.metrics`."""
        ...

    def with_tuned(self, tuned: Mapping[str, Any]) -> Self:
        """The task with what `fit` or an evaluation gave; answers stay as they are, scores and JSON change."""
        return self

    def to_json(self, example: Example, answer: Any) -> dict[str, Any]:
        """One line of predictions.jsonl: the text, and the keys that `info.answer_columns` names."""
        ...

    def expected(self, example: Example) -> Any:
        """What the answer should have been, in the form that `to_json` gives."""
        ...


def rows_of(info: TaskInfo, drawn: Iterable[Any]) -> list[Item]:
    """The items of what training has drawn: items or, where the task contrasts, all items of an example."""
    return [item for example in drawn for item in example] if info.contrasts else list(drawn)


def count_longer(texts: Sequence[Sequence[int]], limit: int, tokenize: Callable[[list[int]], list[list[int]]]) -> int:
    """How many texts have more than `limit` tokens; `texts` are their ids, cut at the limit.

    Only those that fill the limit are tokenized again: `tokenize` returns the uncut ids of the texts at some positions.
    """
    full = [i for i, ids in enumerate(texts) if len(ids) >= limit]
    return sum(len(ids) > limit for ids in tokenize(full)) if full else 0


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Rows of different length as one tensor (B, T), filled up with `value` at the end, or at the start."""
    longest = max(map(len, rows))
    fills = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor(
        [[*fill, *row] if side == "left" else [*row, *fill] for row, fill in zip(rows, fills, strict=True)]
    )


def pad_inputs(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The inputs that every model takes. Shapes: input_ids, attention_mask and token_type_ids (B, T)."""
    ids, side = [item["input_ids"] for item in items], tokenizer.padding_side
    batch = {
        "input_ids": pad(ids, tokenizer.pad_token_id, side),
        "attention_mask": pad([[1] * len(row) for row in ids], 0, side),
    }
    if "token_type_ids" in items[0]:
        types = [item["token_type_ids"] for item in items]
        batch["token_type_ids"] = pad(types, tokenizer.pad_token_type_id, side)
    return batch


def inputs_of(batch: Batch) -> Batch:
    """The part of a batch that goes into the model's forward."""
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
