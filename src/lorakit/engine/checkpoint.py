"""What a run must remember to go on as if it had never stopped, written as one unit: all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.digest import file_sha256
from lorakit.errors import NumericsError, OutputError
from lorakit.runtime.files import atomic_folder, remove_folder

MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
STATE = "state.json"
FORMAT = 2
KEEP = 2  # checkpoints kept; each holds the best parameters beside the newest


@dataclass(frozen=True)
class Checkpoint:
    """Tensors (parameters, optimizer moments, random state) and the plain values beside them."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder`/step-N with a manifest of sha256 sums; of those there, it and the KEEP - 1 before it remain.

    Raises:
        NumericsError: a tensor is not finite; nothing was written.
        OutputError: it cannot be written; nothing was taken away.
    """
    for name, value in checkpoint.tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NumericsError(f"step {checkpoint.step}: {name} is not finite, so no checkpoint was written")
    own = folder / f"step-{checkpoint.step:08d}"
    size = sum(value.nbytes for value in checkpoint.tensors.values())
    with atomic_folder(own, size, replace=True) as place:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()}, place / TENSORS
        )
        (place / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}), encoding="utf-8")
        sums = {name: file_sha256(place / name) for name in (TENSORS, STATE)}
        (place / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sums}), encoding="utf-8")
    paths = _newest_first(folder)
    kept = paths[paths.index(own) :][:KEEP]  # newer ones were passed over, being damaged
    for path in set(paths) - set(kept):
        remove_folder(path)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint whose sums are right, and a note for each newer one that was passed over.

    Raises:
        OutputError: there is none.
    """
    notes: list[str] = []
    for path in _newest_first(folder):
        try:
            return load_checkpoint(path), notes
        except OutputError as err:
            notes.append(f"{err}; taking the one before")
    raise OutputError(f"{folder}: no whole checkpoint to resume from")


def load_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, its sums checked. Raises an OutputError that names what is damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (format := manifest.get("format")) != FORMAT:
            raise OutputError(f"{path}: format {format} is of another lorakit; this one reads {FORMAT}")
        for name in (TENSORS, STATE):
            if file_sha256(path / name) != manifest["files"][name]:
                raise OutputError(f"{path / name}: damaged (its sha256 is not the manifest's)")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(state.pop("step"), load_file(path / TENSORS), state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as err:
        raise OutputError(f"{path}: no whole checkpoint: {type(err).__name__} {err}") from err


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and their optimizer state under the parameters' names."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            tensors[f"parameter/{name}"] = parameter
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
    return tensors


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        OutputError: a tensor is missing or has another shape than the parameter it belongs to.
    """
    _check_shapes(optimizer, tensors)
    keys = {key.partition("/")[0] for key in tensors} - {"parameter"}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            parameter.copy_(tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(parameter.device) for key in keys if f"{key}/{name}" in tensors
            }


def _check_shapes(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    kinds = {key.partition("/")[0] for key in tensors} & {"best", "exp_avg", "exp_avg_sq"} | {"parameter"}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for kind in kinds:
                found = tensors.get(f"{kind}/{name}")
                if found is None and kind.startswith("exp"):
                    continue  # no loss has reached it yet
                if found is None or found.shape != parameter.shape:
                    shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
                    raise OutputError(f"checkpoint: {kind}/{name} is {shape}, and not {tuple(parameter.shape)}")
