"""Training that goes wrong without an error: a loss that climbs, or one that stands still."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW = 20  # steps
CLIMBED = 2.0  # times the lowest mean over a window
STILL = 1e-5  # spread over a window, as a share of its mean


@dataclass
class LossWatch:
    """Looks at the loss of each step, and warns once of each thing."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first: float = float("inf")  # mean over the first window
    lowest: float = float("inf")  # mean over any window
    told: set[str] = field(default_factory=set)

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
            return self._once("climbs", f"{where} is {mean:.4g}, it was {self.lowest:.4g}: lower train.lr (now {lr})")
        if max(self.losses) - min(self.losses) <= STILL * abs(mean):
            return self._once("still", f"{where} stands at {mean:.4g}: is every label the same, or train.lr too low?")
        return None

    def _once(self, what: str, text: str) -> str | None:
        if what in self.told:
            return None
        self.told.add(what)
        return text
