"""Tasks by name: which data each reads, which labels it finds there, and how it is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lorakit.data.example import Example
from lorakit.data.tags import entities
from lorakit.errors import DataError, ModelError, did_you_mean
from lorakit.recipe import TaskSection
from lorakit.tasks.base import Task
from lorakit.tasks.sequence_classification import SequenceClassification
from lorakit.tasks.text2text_ner import Text2TextNer
from lorakit.tasks.token_classification import TokenClassification, tag_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = {  # task -> kind of model
    "sequence_classification": "sequence_classification",
    "token_classification": "token_classification",
    "text2text_ner": "text2text",
}


def reads_words(task_name: str) -> bool:
    """Whether the task's data are tagged words rather than texts with a label."""
    return task_name != "sequence_classification"


def find_labels(task_name: str, examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels in the training data, in a fixed order: numbers by value, names by alphabet.

    Raises:
        DataError: there are fewer than two labels, or no entity.
    """
    labels = _in_order({label for example in examples for label in _labels_of(example, task_name)})
    place = examples[0].where.rpartition(":")[0]
    if reads_words(task_name) and not labels:
        raise DataError(f"{place}: no entity in the training data: every tag is O")
    if not reads_words(task_name) and len(labels) < 2:
        raise DataError(f"{place}: every training example has the label {labels[0]!r}; two labels at least are needed")
    return tag_names(labels) if task_name == "token_classification" else labels


def check_labels(task_name: str, examples: Iterable[Example], labels: Sequence[str]) -> None:
    """Raise a DataError with file and line at the first label that the training data do not have."""
    known = {label.removeprefix("B-").removeprefix("I-") for label in labels} if reads_words(task_name) else set(labels)
    for example in examples:
        for label in _labels_of(example, task_name):
            if label not in known:
                raise DataError(
                    f"{example.where}: label {label!r} is not in the training data; {did_you_mean(label, known)}"
                )


def _labels_of(example: Example, task_name: str) -> list[str]:
    if reads_words(task_name):
        return [entity.type for entity in entities(example.tags)]
    return [] if example.label is None else [example.label]


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    def key(label: str) -> tuple[bool, int, str]:
        number = label.removeprefix("-").isdecimal()
        return (not number, int(label) if number else 0, label)

    return tuple(sorted(labels, key=key))


def make_task(
    section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
) -> Task:
    """The task that the recipe names, over one tokenizer and one set of labels."""
    if section.name == "sequence_classification":
        return SequenceClassification(tokenizer, labels, max_length)
    if section.name == "token_classification":
        if not tokenizer.is_fast:
            raise ModelError(
                f"task.name = 'token_classification': {type(tokenizer).__name__} cannot tell which sub-word belongs to "
                "which word; use a base model with a fast tokenizer, or text2text_ner with a T5"
            )
        return TokenClassification(tokenizer, labels, max_length)
    return Text2TextNer(tokenizer, labels, max_length, section.prefix, section.max_target_length, section.constrained)
