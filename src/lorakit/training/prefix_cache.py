"""When a run keeps what the blocks below its adapters answer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, cast

from torch.utils.data import ConcatDataset

from lorakit.inference.answer import batches_of
from lorakit.inference.speed_up import PLAIN
from lorakit.lora import Prefix, frozen_blocks
from lorakit.runtime.device import to_device
from lorakit.runtime.events import Note, Report, ignore
from lorakit.tasks.base import inputs_of
from lorakit.training.prepare import Prepared

MOST_BYTES = 2 * 2**30  # that the answers may take on disk


def keep_prefix(runs: Sequence[Prepared], report: Report = ignore) -> None:
    """Compute what the blocks below all adapters answer to the texts of training and validation, and look it up from now on.

    Not where that would not hold (the base has dropout), cannot be (nothing is frozen there, or the answers take more than
    MOST_BYTES or the disk has), or would not pay: each text is to be read once.
    """
    first = runs[0]
    model: Any = first.model
    parts = {id(part): part for run in runs for part in (run.parts["train"], run.parts["validation"])}
    again = len(parts) < 2 * len(runs) or any(run.plan.steps > run.plan.steps_per_epoch for run in runs)
    if first.kernels == PLAIN or first.base.drops or not again:
        return
    blocks = frozen_blocks(model)
    if not blocks:
        return
    items: Any = ConcatDataset([cast(Any, part.flat) for part in parts.values()])  # read as they are asked for
    lengths = [len(item["input_ids"]) for item in items]
    if sum(lengths) * model.config.hidden_size * model.dtype.itemsize > MOST_BYTES:
        return
    task = first.task
    batches = (task.collate([items[i] for i in batch]) for batch in batches_of(model, task, items, first.device))
    prefix = Prefix(model, blocks)
    try:
        prefix.fill((to_device(inputs_of(batch), first.device) for batch in batches), sum(lengths))
    except OSError as err:
        report(
            Note(f"the blocks below the adapters are computed in every epoch: {tempfile.gettempdir()}: {err.strerror}")
        )
    else:
        report(Note(str(prefix)))
