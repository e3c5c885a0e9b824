"""Tasks by name: which data each reads, which labels it finds there, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lorakit.data.columns import finite_number
from lorakit.data.example import Example, Wants
from lorakit.data.tags import entities
from lorakit.errors import AdapterError, ConfigError, DataError, did_you_mean
from lorakit.recipe import TaskSection
from lorakit.tasks.base import Task
from lorakit.tasks.multi_label_classification import MultiLabelClassification
from lorakit.tasks.ordinal_classification import OrdinalClassification, steps
from lorakit.tasks.sequence_classification import SequenceClassification
from lorakit.tasks.sequence_regression import SequenceRegression
from lorakit.tasks.tag_decoding import CRF, Crf
from lorakit.tasks.text2text.classification import Text2TextClassification
from lorakit.tasks.text2text.ner import Text2TextNer
from lorakit.tasks.token_classification import TokenClassification, tag_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a task is made of: its table in the recipe, the tokenizer, the labels, and the length limit in tokens.
Maker = Callable[["TaskSection", "PreTrainedTokenizerBase", tuple[str, ...], int], Task]


@dataclass(frozen=True)
class TaskKind:
    """What is known of a task before its data and its model are."""

    model: str  # a key of models.KINDS
    wants: Wants  # of each record
    make: Maker
    outputs: Callable[[tuple[str, ...]], tuple[str, ...]] = tuple  # names of the head's outputs, from the labels


TASKS: Mapping[str, TaskKind] = {
    "sequence_classification": TaskKind("sequence_classification", "label", SequenceClassification.make),
    "multi_label_classification": TaskKind("multi_label_classification", "labels", MultiLabelClassification.make),
    "ordinal_classification": TaskKind("multi_label_classification", "label", OrdinalClassification.make, steps),
    "sequence_regression": TaskKind("regression", "number", SequenceRegression.make, lambda labels: ("value",)),
    "token_classification": TaskKind("token_classification", "words", TokenClassification.make),
    "text2text_ner": TaskKind("text2text", "words", Text2TextNer.make),
    "text2text_classification": TaskKind("text2text", "label", Text2TextClassification.make),
}


def find_labels(task_name: str, examples: Iterable[Example], order: Sequence[str] = ()) -> tuple[str, ...]:
    """The labels in the given order, or those in the training data in a fixed one: numbers by value, names by alphabet.

    Raises:
        ConfigError: no order is given and the task takes one.
        DataError: there are fewer than two labels, or no entity.
    """
    if order:
        return tuple(order)
    wants = TASKS[task_name].wants
    rest = iter(examples)  # read once: they may be more than memory takes
    first = next(rest)
    labels = _in_order({label for example in chain([first], rest) for label in _labels_of(example)})
    place = first.where.rpartition(":")[0]
    if wants == "words" and not labels:
        raise DataError(f"{place}: no entity in the training data: every tag is O")
    if wants == "label" and len(labels) < 2:
        raise DataError(f"{place}: every training example has the label {labels[0]!r}; two labels at least are needed")
    if task_name == "ordinal_classification":
        return _by_value(labels)
    if wants == "labels" and not labels:
        raise DataError(f"{place}: no training example has a label")
    return tag_names(labels) if task_name == "token_classification" else labels


def _by_value(labels: Sequence[str]) -> tuple[str, ...]:
    values = {label: finite_number(label) for label in labels}
    if None in values.values() or len(set(values.values())) < len(labels):
        raise ConfigError(
            "task.order is missing: the labels are not all numbers that differ; name them from lowest to highest: "
            + ", ".join(labels)
        )
    return tuple(sorted(labels, key=float))


def check_labels(task_name: str, examples: Iterable[Example], labels: Sequence[str]) -> None:
    """Raise a DataError with file and line at the first label that the training data (or the order) do not have."""
    words = TASKS[task_name].wants == "words"
    known = {label.removeprefix("B-").removeprefix("I-") for label in labels} if words else set(labels)
    place = "order" if task_name == "ordinal_classification" else "training data"
    for example in examples:
        if isinstance(example.label, Mapping) and task_name != "sequence_classification":
            raise DataError(f"{example.where}: a label in shares; {task_name} takes one label an example")
        for label in _labels_of(example):
            if label not in known:
                raise DataError(f"{example.where}: label {label!r} is not in the {place}; {did_you_mean(label, known)}")


def _labels_of(example: Example) -> Iterable[str]:
    """The labels that a record names, whatever their form; a number names none."""
    if isinstance(example.label, str):
        return [example.label]
    if isinstance(example.label, (tuple, Mapping)):
        return example.label
    return [entity.type for entity in entities(example.tags)]


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    def key(label: str) -> tuple[bool, int, str]:
        number = label.removeprefix("-").isdecimal()
        return (not number, int(label) if number else 0, label)

    return tuple(sorted(labels, key=key))


def task_layers(section: TaskSection, labels: Sequence[str]) -> dict[str, nn.Module]:
    """What the task trains besides what a base model of its kind has, by name; saved with the adapter."""
    return {CRF: Crf(len(labels))} if section.crf else {}


def make_task(
    section: TaskSection,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    max_length: int,
    tuned: Mapping[str, Any] | None = None,
) -> Task:
    """The task that the recipe names, over one tokenizer and one set of labels, with what a run tuned for it."""
    task = TASKS[section.name].make(section, tokenizer, labels, max_length)
    if section.metric is not None:
        if section.metric not in task.metrics:
            hint = did_you_mean(section.metric, task.metrics)
            raise ConfigError(f"task.metric = {section.metric!r} is not a score of {section.name}; {hint}")
        task = replace(cast(Any, task), metric=section.metric)
    if tuned:
        try:
            task = task.with_tuned(tuned)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise AdapterError(f"lorakit.json: damaged: what was tuned does not fit {section.name}: {tuned}") from err
    return task
