"""All that a run has computed, so that two runs can be compared to the last bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lorakit.training.checkpoint import newest_checkpoint
from lorakit.training.run_files import COSTS
from tests.runs import read_lines, scores_of, weights, without_timings

TIMINGS = COSTS[1:]


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """The newest checkpoint: parameters, best parameters, optimizer, random state, history."""
    checkpoint, notes = newest_checkpoint(folder / "checkpoints")
    history = {key: value for key, value in checkpoint.state["history"].items() if not key.endswith("seconds")}
    return {
        "notes": notes,
        "step": checkpoint.step,
        "history": {**history, "lines": without_timings(history["lines"])},
        **{name: tensor.numpy().tobytes() for name, tensor in checkpoint.tensors.items()},
    }


def outcome(folder: Path) -> dict[str, Any]:
    """Everything in a finished run folder that is computed, timings left out."""
    scores = scores_of(folder)
    return {
        "adapter": hashlib.sha256(weights(folder)).hexdigest(),
        "scores": {key: value for key, value in scores.items() if key not in TIMINGS},
        "metrics": without_timings(read_lines(folder / "metrics.jsonl")),
        "predictions": (folder / "predictions.jsonl").read_text(encoding="utf-8"),
        **checkpoint_facts(folder),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]
