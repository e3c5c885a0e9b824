"""When the blocks below the adapters are answered from a cache: the answers themselves are kept by lorakit.lora.Prefix."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils.data import ConcatDataset

from lorakit.inference.answer import batches_of
from lorakit.inference.speed_up import PLAIN
from lorakit.lora import Prefix, frozen_blocks
from lorakit.runtime.device import to_device
from lorakit.runtime.events import Note, Report, ignore
from lorakit.tasks.base import Item, Task, inputs_of
from lorakit.training.prepare import Prepared

MOST_BYTES = 2 * 2**30  # that the answers may take on disk


def keep_prefix(runs: Sequence[Prepared], report: Report = ignore) -> None:
    """Cache the blocks below all adapters for the texts of training and validation, where that holds and pays.

    It does not hold where the base has dropout, and does not pay where each text is to be read once.
    """
    first = runs[0]
    parts = {id(part): part for run in runs for part in (run.parts["train"], run.parts["validation"])}
    again = len(parts) < 2 * len(runs) or any(run.plan.steps > run.plan.steps_per_epoch for run in runs)
    if first.kernels != PLAIN and not first.base.drops and again:
        items: Any = ConcatDataset([cast(Any, part.flat) for part in parts.values()])  # read as they are asked for
        cache_frozen_blocks(first.model, first.task, items, first.device, report)


def cache_frozen_blocks(
    model: Any, task: Task, items: Sequence[Item], device: torch.device, report: Report = ignore
) -> None:
    """Compute what the model's frozen blocks answer to these items, and look it up from now on.

    Not where no block is frozen, or the answers take more than MOST_BYTES or the disk has.
    """
    if not (blocks := frozen_blocks(model)):
        return
    n_tokens = sum(len(item["input_ids"]) for item in items)
    if n_tokens * model.config.hidden_size * model.dtype.itemsize > MOST_BYTES:
        return
    batches = (task.collate([items[i] for i in batch]) for batch in batches_of(model, task, items, device))
    prefix = Prefix(model, blocks)
    try:
        prefix.fill((to_device(inputs_of(batch), device) for batch in batches), n_tokens)
    except OSError as err:
        report(
            Note(f"the blocks below the adapters are computed in every epoch: {tempfile.gettempdir()}: {err.strerror}")
        )
    else:
        report(Note(str(prefix)))
