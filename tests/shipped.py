"""Adapter folders with random weights, as training would leave them, without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.data.example import Columns
from lorakit.inference.adapter_folder import write_side
from lorakit.inference.side import Base, Side
from lorakit.lora import BaseInfo, LoraConfig, adapter_parameters, add_adapter, save_adapter
from lorakit.models import load_base
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.registry import task_layers


def ship(
    folder: Path, base: Path, task: str, labels: Sequence[str], *, seed: int = 0, changes: Any = (), **lora: Any
) -> Path:
    """Write an adapter of random values; `lora` are settings of it, `changes` what lorakit.json has otherwise."""
    section = TaskSection(name=task, **lora.pop("knobs", {}))
    outputs = TASKS[task].outputs(tuple(labels))
    loaded = load_base(str(base), TASKS[task].model_kind, labels=outputs, pooling="auto")
    loaded = loaded.with_layers(task_layers(section, labels))
    config = LoraConfig(**{"target_modules": ("query", "value"), "modules_to_save": loaded.saved_modules, **lora})
    add_adapter(loaded.model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(loaded.model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_adapter(loaded.model, folder, config, BaseInfo(loaded.name, None, loaded.kind.peft_task_type))
    side = {
        "task": section.model_dump(),
        "labels": list(labels),
        "max_length": 32,
        "base": Base.of(loaded.name, None, loaded.fingerprint),
        "dtype": "fp32",
        "method": "lora",
        "pooling": loaded.pooling,
        "columns": dataclasses.asdict(Columns()),
    }
    write_side(folder, Side.model_validate({**side, **dict(changes)}))
    return folder
