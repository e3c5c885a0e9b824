"""How long, in batches of which size and at which rate to train where the recipe does not say: by the number of examples.

The rows up to 1,000 examples are from a few runs on five data sets with MiniLM (docs/LOG.md, 2026-11-29 and 2026-11-30); the last
two are what was good on whole data sets before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lorakit.errors import ConfigError
from lorakit.recipe import ChosenTrain, HeadStart, Recipe, TrainSection
from lorakit.runtime.events import Note, Report, ignore

FULL_SHARE = 0.1  # of the rate of an adapter, where the weights themselves are trained
EVALUATIONS = 8  # in a run whose epochs are chosen
LOOKS = 4  # the same where they choose no step, but show how it went
CONTRAST, CONTRAST_TWO = 300, 100  # examples up to which an adapter learns from pairs first; of two labels
DROPOUT_FROM = 500  # examples; with fewer the base's dropout gave nothing, and adapters without it share their forwards


class Row(NamedTuple):
    """What is chosen for at most so many examples."""

    examples: float
    epochs: int
    batch_size: int
    lr: float


TWO_LABELS = (Row(100, 8, 16, 5e-4), Row(1_000, 10, 32, 1e-3))  # or a number: more steps brought nothing, or harm
ROWS = (
    Row(100, 20, 8, 1e-3),
    Row(1_000, 20, 32, 1e-3),
    Row(3_000, 8, 32, 1e-3),
    Row(10_000, 4, 32, 5e-4),
    Row(math.inf, 3, 32, 5e-4),
)


def choose_head_start(recipe: Recipe, items: Sequence[Mapping[str, Any]]) -> HeadStart:
    """`contrast` for few training examples with one label each, else `probe`, where the recipe says `auto`.

    Raises:
        ConfigError: the recipe says `contrast`, and an example has shares of several labels.
    """
    train = recipe.train
    is_classification = train.method == "lora" and recipe.task.name == "sequence_classification"
    has_one_label = is_classification and all(len(item["labels"]) == 1 for item in items)
    if train.head_start == "contrast" and not has_one_label:
        raise ConfigError("train.head_start = 'contrast' needs examples with one label each, not shares of several")
    is_choice = recipe.task.info.wants == "choices"
    is_by_query = is_choice or recipe.task.loss not in (None, "bce")  # of which a single row has no loss
    if train.head_start == "probe" and is_by_query:
        what = f"task.name = {recipe.task.name!r}" if is_choice else f"task.loss = {recipe.task.loss!r}"
        raise ConfigError(f"train.head_start = 'probe' fits single pairs, which {what} cannot judge")
    if train.head_start != "auto":
        return train.head_start
    if is_by_query:
        return "random"
    if not has_one_label or len(items) > CONTRAST:
        return "probe"
    n_labels = len({item["labels"][0] for item in items})
    return "contrast" if n_labels > 2 or len(items) <= CONTRAST_TWO else "probe"


def choose(
    train: TrainSection,
    n: int,
    is_binary: bool,
    report: Report = ignore,
    others: Mapping[str, float] | None = None,
    keeps_last: bool = False,
) -> ChosenTrain:
    """The settings with nothing left open; what was chosen for `n` training examples is reported, after `others` that were.

    `is_binary` is for whole texts with at most two labels, or a number; `keeps_last` for runs whose last step ships.
    """
    rows = (*TWO_LABELS, *ROWS) if is_binary else ROWS
    row = next(row for row in rows if n <= row.examples)
    batch_size = train.batch_size or row.batch_size
    steps_per_epoch = math.ceil(n / batch_size)
    epochs = train.epochs or (row.epochs if train.max_steps is None else math.ceil(train.max_steps / steps_per_epoch))
    lr = train.lr or row.lr * (FULL_SHARE if train.method == "full" else 1)
    values = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    chosen = {f"train.{key}": value for key, value in values.items() if getattr(train, key) is None}
    chosen = {**(others or {}), **chosen}
    if train.epochs is None and train.eval_every is None:
        steps = min(epochs * steps_per_epoch, train.max_steps or math.inf)
        values["eval_every"] = math.ceil(steps / (LOOKS if keeps_last else EVALUATIONS))
    if chosen:
        text = ", ".join(f"{key} = {value:g}" for key, value in chosen.items())
        report(Note(f"{n:,} training examples: {text}"))
    return ChosenTrain.model_validate({**train.model_dump(), **values})
