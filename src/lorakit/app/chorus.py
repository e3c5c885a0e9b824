"""The events of runs that are trained together, told as those of one; a run alone is told as it is."""

from __future__ import annotations

from dataclasses import replace

from lorakit.engine.events import Evaluated, Event, Note, Report, Started
from lorakit.engine.train import Step


class Chorus:
    """Counts the steps of all runs, and puts a run's name before what it says by itself."""

    def __init__(self, report: Report, members: int) -> None:
        self.report, self.members = report, members
        self.steps = self.done = 0

    def voice(self, name: str) -> Report:
        """What one run reports to."""
        return self.report if self.members == 1 else _Voice(self, name)


class _Voice:
    def __init__(self, chorus: Chorus, name: str) -> None:
        self.chorus, self.name = chorus, name
        self.metric, self.steps = "", 0

    def __call__(self, event: Event) -> None:
        chorus = self.chorus
        match event:
            case Note(text):
                chorus.report(Note(f"{self.name}: {text}"))
            case Started(steps, start, metric):
                self.metric, self.steps = metric, steps
                chorus.steps, chorus.done = chorus.steps + steps, chorus.done + start
                chorus.report(Started(chorus.steps, chorus.done, metric))
            case Step():
                chorus.done += 1
                chorus.report(replace(event, number=chorus.done))
            case Evaluated(step, scores, is_best):
                best = "  (best so far)" if is_best else ""
                value = float(scores[self.metric])
                text = f"step {step}/{self.steps}  validation {self.metric} {value:.4f}{best}"
                chorus.report(Note(f"{self.name}: {text}"))
