"""What a run has learned about itself so far, and how it is told; part of every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorakit.runtime.events import Step


@dataclass
class History:
    """Scores, counts and times of a run up to now."""

    best: float = float("-inf")  # of `goodness`
    best_step: int = 0
    since_best: int = 0  # evaluations
    seconds: float = 0.0  # of training alone, evaluations left out; of a joint step, the share of its tokens
    saving_seconds: float = 0.0  # of checkpoints
    examples: int = 0
    skipped_in_a_row: int = 0  # steps whose numbers were not finite
    skipped: int = 0  # the same, in all
    micro_batch_size: int | None = None  # what memory has room for, where that is less than the recipe's
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl

    @property
    def last_scores(self) -> dict[str, Any]:
        """Those of the last evaluation, with its `step`; empty before the first."""
        line = next((line for line in reversed(self.lines) if "validation" in line), None)
        return {} if line is None else {**line["validation"], "step": line["step"]}


@dataclass
class Interval:
    """Means of the loss over intervals of steps, so that metrics.jsonl stays short."""

    every: int  # steps
    losses: list[float] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0

    def add(self, step: Step, seconds: float) -> dict[str, Any] | None:
        """The line that this step completes, if it does."""
        self.losses.append(step.loss)
        self.examples += step.examples
        self.seconds += seconds
        if step.number % self.every:
            return None
        line = {
            "step": step.number,
            "epoch": step.epoch,
            "loss": sum(self.losses) / len(self.losses),
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "examples_per_s": self.examples / self.seconds if self.seconds else 0.0,
        }
        self.losses, self.examples, self.seconds = [], 0, 0.0
        return line
