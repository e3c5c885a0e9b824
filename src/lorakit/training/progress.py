"""Scores, counts and times of a run so far; part of every checkpoint."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lorakit.runtime.events import Step


@dataclass
class History:
    """Scores, counts and times of a run up to now."""

    best: float = float("-inf")  # of `goodness`
    best_step: int = 0
    since_best: int = 0  # evaluations
    seconds: float = 0.0  # of training without evaluations; a joint step is divided in proportion to tokens
    saving_seconds: float = 0.0  # of checkpoints
    examples: int = 0
    skipped_in_a_row: int = 0  # steps with non-finite loss or gradient
    skipped: int = 0  # the same, in total
    micro_batch_size: int | None = None  # if memory does not fit the recipe's
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl

    @property
    def last_scores(self) -> dict[str, Any]:
        """Those of the last evaluation, without its loss but with its `step`; empty before the first."""
        line = next((line for line in reversed(self.lines) if "validation" in line), None)
        if line is None:
            return {}
        return {**{key: value for key, value in line["validation"].items() if key != "loss"}, "step": line["step"]}

    def first_score(self, metric: str) -> float | None:
        """The metric before the first step, where it was taken."""
        line = next((line for line in self.lines if "validation" in line), None)
        return line["validation"].get(metric) if line is not None and line["step"] == 0 else None


@dataclass
class Interval:
    """Mean losses over intervals of steps, so that metrics.jsonl stays short."""

    every: int  # steps
    losses: list[float] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0

    def add(self, step: Step, seconds: float) -> dict[str, Any] | None:
        """The line of metrics.jsonl that this step completes, or None."""
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


# Training that goes wrong without an error: a loss that rises, or does not change.


WINDOW = 20  # steps
CLIMBED = 2.0  # times the lowest mean over a window
STILL = 1e-5  # spread over a window, as a share of its mean


@dataclass
class LossWatch:
    """Watches the loss of each step, and gives each kind of warning once."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first: float = float("inf")  # mean over the first window
    lowest: float = float("inf")  # mean over any window
    warned: set[str] = field(default_factory=set)

    def add(self, number: int, loss: float, lr: float) -> str | None:
        """A warning after step `number`, or None."""
        self.losses.append(loss)
        if len(self.losses) < WINDOW:
            return None
        mean = sum(self.losses) / WINDOW
        if self.lowest == float("inf"):
            self.first = mean
        self.lowest = min(self.lowest, mean)
        where = f"steps {number - WINDOW + 1} to {number}: the loss"
        if mean > CLIMBED * self.lowest and mean > self.first:
            return self._once("climbs", f"{where} is {mean:.4g}, up from {self.lowest:.4g}; lower train.lr (now {lr})")
        if max(self.losses) - min(self.losses) <= STILL * abs(mean):
            return self._once("still", f"{where} stays at {mean:.4g}; are all labels the same, or is train.lr too low?")
        return None

    def _once(self, what: str, text: str) -> str | None:
        if what in self.warned:
            return None
        self.warned.add(what)
        return text
