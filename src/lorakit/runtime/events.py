"""The events that a run reports to its caller; the command line shows them, a notebook may ignore them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.tasks.metrics.bootstrap import Scores


@dataclass(frozen=True)
class Note:
    """A message to the user, in one line."""

    text: str


@dataclass(frozen=True)
class Started:
    """Training begins: the total number of steps, and the step it continues from (0 unless resumed)."""

    steps: int
    start: int
    metric: str


@dataclass(frozen=True)
class Step:
    """One optimizer update. `loss` is the mean over labelled positions; `tokens` excludes padding."""

    number: int  # from 1
    epoch: float  # epochs done after this step
    loss: float
    lr: float
    grad_norm: float  # before clipping
    examples: int
    tokens: int
    micro_batch_size: int  # examples per forward, of each process
    skipped: bool = False  # loss or gradient were not finite, so there was no update


@dataclass(frozen=True)
class Evaluated:
    """The validation examples were scored after a step."""

    step: int
    scores: Scores
    is_best: bool


@dataclass(frozen=True)
class Logged:
    """A line was added to metrics.jsonl."""

    line: Mapping[str, Any]


Event = Note | Started | Step | Evaluated | Logged
Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A report to nobody."""
