"""Tasks of recipes: the labels that each finds in its data, and the task itself, imported when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.data.columns import finite_number
from lorakit.data.example import Example
from lorakit.data.tags import entities
from lorakit.errors import AdapterError, ConfigError, DataError, did_you_mean
from lorakit.pooling import Layout
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_labels(task_name: str, examples: Iterable[Example], order: Sequence[str] = ()) -> tuple[str, ...]:
    """The labels in the given order, or those in the training data in a fixed one: numbers by value, names by alphabet.

    Raises:
        ConfigError: no order is given and the task takes one.
        DataError: there are fewer than two labels, or no entity.
    """
    if order:
        return tuple(order)
    info = TASKS[task_name]
    if info.wants in ("related", "target", "choices"):  # classes and letters are not learned
        return ()
    rest = iter(examples)  # read once: they may be more than memory takes
    first = next(rest)
    names = {label for example in chain([first], rest) for label in _labels_of(example)}
    numbers = {name for name in names if name.removeprefix("-").isdecimal()}
    labels = tuple(sorted(names, key=lambda name: (name not in numbers, int(name) if name in numbers else 0, name)))
    place = first.where.rpartition(":")[0]
    if info.wants == "words" and not labels:
        raise DataError(f"{place}: the training data has no entities: every tag is O")
    if info.wants == "label" and len(labels) < 2:
        raise DataError(f"{place}: every training example has the label {labels[0]!r}; at least two labels are needed")
    if "order" in info.keys:
        labels = _by_value(labels)
    if info.wants == "labels" and not labels:
        raise DataError(f"{place}: no training example has a label")
    return info.labels(labels)


def _by_value(labels: Sequence[str]) -> tuple[str, ...]:
    values = {label: finite_number(label) for label in labels}
    if None in values.values() or len(set(values.values())) < len(labels):
        raise ConfigError(
            "task.order is missing; the labels are not different numbers, so list them from lowest to highest: "
            + ", ".join(labels)
        )
    return tuple(sorted(labels, key=float))


def check_labels(task_name: str, examples: Iterable[Example], labels: Sequence[str]) -> None:
    """Raise a DataError with file and line at the first label that the training data (or the order) do not have."""
    info = TASKS[task_name]
    if info.wants in ("related", "target", "choices"):
        return
    known = {label.removeprefix("B-").removeprefix("I-") for label in labels} if info.wants == "words" else set(labels)
    place = "order" if "order" in info.keys else "training data"
    for example in examples:
        if isinstance(example.label, Mapping) and not info.takes_shares:
            raise DataError(f"{example.where}: a soft label; {task_name} needs one label for each example")
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


def task_layers(section: TaskSection, labels: tuple[str, ...]) -> dict[str, nn.Module]:
    """What the task trains besides what a base model of its kind has, by name; saved with the adapter."""
    made: dict[str, nn.Module] = resolve_name(section.info.layers)(section, labels) if section.info.layers else {}
    return made


def layout_of(section: TaskSection, max_length: int) -> Layout:
    """What sentence-transformers has to know of a task's model."""
    prompts = {"query": section.query_prompt or "", "document": section.document_prompt or ""}
    return Layout(bool(section.normalize), prompts if any(prompts.values()) else {}, max_length)


def make_task(
    section: TaskSection,
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    max_length: int,
    tuned: Mapping[str, Any] | None = None,
) -> Task:
    """The task that the recipe names, over one tokenizer and one set of labels, with what a run tuned for it."""
    metrics = section.info.metrics_of(labels)
    if section.selection_metric not in metrics:
        hint = did_you_mean(section.selection_metric, metrics)
        raise ConfigError(f"task.metric = {section.metric!r} is not a score of {section.name}; {hint}")
    task: Task = resolve_name(section.info.made_by)(section, tokenizer, labels, max_length)
    if tuned:
        try:
            return task.with_tuned(tuned)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise AdapterError(f"lorakit.json: damaged: tuned values do not fit {section.name}: {tuned}") from err
    return task
