"""When to cache the outputs of the blocks below the adapters; the cache itself is lorakit.lora.Prefix."""

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

MOST_BYTES = 2 * 2**30  # the most disk space for the cache


def keep_prefix(runs: Sequence[Prepared], report: Report = ignore) -> None:
    """Cache the outputs of the blocks below all adapters for training and validation texts, if that is valid and worth it.

    It is not valid if the base has dropout, and not worth it if each text is read once.
    """
    first = runs[0]
    parts = {id(part): part for run in runs for part in (run.parts["train"], run.parts["validation"])}
    again = len(parts) < 2 * len(runs) or any(run.plan.steps > run.plan.steps_per_epoch for run in runs)
    if first.kernels != PLAIN and not first.base.drops and again:
        items: Any = ConcatDataset([cast(Any, part.flat) for part in parts.values()])  # read on demand
        cache_frozen_blocks(first.model, first.task, items, first.device, report)


def cache_frozen_blocks(
    model: Any, task: Task, items: Sequence[Item], device: torch.device, report: Report = ignore
) -> None:
    """Compute the outputs of the model's frozen blocks for these items, and look them up from now on.

    Does nothing if no block is frozen, or the outputs take more than MOST_BYTES or the free disk space.
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
