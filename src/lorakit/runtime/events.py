"""What a run tells its caller while it goes on; the command line draws it, a notebook may ignore it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.tasks.metrics.bootstrap import Scores


@dataclass(frozen=True)
class Note:
    """Something the user should know, in one line."""

    text: str


@dataclass(frozen=True)
class Started:
    """Training begins: steps in all, and the step it begins after (0 unless resumed)."""

    steps: int
    start: int
    metric: str


@dataclass(frozen=True)
class Step:
    """What one optimizer update did. `loss` is the mean over labelled positions, `tokens` counts real ones."""

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
