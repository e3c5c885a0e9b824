"""How long, in batches of which size and at which rate to train where the recipe does not say: by the number of examples.

The first rows are from a few runs on SST-2 and banking77 with MiniLM (docs/LOG.md, 2026-11-29); the last two are what was good on
whole data sets before.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lorakit.recipe import ChosenTrain, TrainSection
from lorakit.runtime.events import Note, Report, ignore

FULL_SHARE = 0.1  # of the rate of an adapter, where the weights themselves are trained
EVALUATIONS = 8  # in a run whose epochs are chosen


class Row(NamedTuple):
    """What is chosen for at most so many examples."""

    examples: float
    epochs: int
    batch_size: int
    lr: float


ROWS = (
    Row(100, 8, 16, 5e-4),
    Row(1_000, 20, 32, 1e-3),
    Row(3_000, 8, 32, 1e-3),
    Row(10_000, 4, 32, 5e-4),
    Row(math.inf, 3, 32, 5e-4),
)


def choose(train: TrainSection, n: int, report: Report = ignore) -> ChosenTrain:
    """The settings with nothing left open; what was chosen for `n` training examples is reported."""
    row = next(row for row in ROWS if n <= row.examples)
    batch_size = train.batch_size or row.batch_size
    steps_per_epoch = math.ceil(n / batch_size)
    epochs = train.epochs or (row.epochs if train.max_steps is None else math.ceil(train.max_steps / steps_per_epoch))
    lr = train.lr or row.lr * (FULL_SHARE if train.method == "full" else 1)
    values = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    chosen = {key: value for key, value in values.items() if getattr(train, key) is None}
    if train.epochs is None and train.eval_every is None:
        steps = min(epochs * steps_per_epoch, train.max_steps or math.inf)
        values["eval_every"] = math.ceil(steps / EVALUATIONS)
    if chosen:
        report(
            Note(f"{n:,} training examples: {', '.join(f'train.{key} = {value:g}' for key, value in chosen.items())}")
        )
    return ChosenTrain.model_validate({**train.model_dump(), **values})
