"""A run's events on stderr: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorakit.app.printing import visible
from lorakit.runtime.events import Evaluated, Event, Note, Started, Step
from lorakit.training.run_files import BEFORE, COSTS

PLAIN_EVERY_S = 10.0


class Screen:
    """Draws events on stderr; results go to stdout."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal  # a log has a line for a line
        self.progress: Progress | None = None
        self.began: float | None = None  # the end of the first step
        self.shown = time.monotonic()
        self.examples, self.start, self.steps = 0, 0, 0
        self.loss = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Note(text):
                self.say(text)
            case Started():
                self._started(event)
            case Step():
                self._step(event)
            case Evaluated():
                best = "  (best so far)" if event.is_best else ""
                value = digits(event.scores[self.metric])
                line = f"step {event.step}/{self.steps}  validation {self.metric} {value}{best}"
                self.say(line, "green" if event.is_best else None)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line, above the progress bar if there is one."""
        self.console.print(visible(text), style=style, markup=False)

    def close(self) -> None:
        """Remove the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _started(self, event: Started) -> None:
        self.close()  # of the run before
        self.examples, self.loss = 0, 0.0
        self.steps, self.start, self.metric = event.steps, event.start, event.metric
        self.began, self.shown = None, time.monotonic()
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[now]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                expand=True,
            )
            self.task = self.progress.add_task("training", total=event.steps, completed=event.start, now="")
            self.progress.start()

    def _step(self, step: Step) -> None:
        self.loss = step.loss if not self.loss else 0.95 * self.loss + 0.05 * step.loss
        if self.began is None:  # the time before (pairs to learn, a first score) says nothing of the other steps
            self.began, self.start = time.monotonic(), step.number
            return
        self.examples += step.examples
        elapsed = time.monotonic() - self.began
        rate = self.examples / max(elapsed, 1e-9)
        if self.progress is not None:
            self.progress.update(
                self.task, completed=step.number, now=f"loss {self.loss:.4f}  {rate:.0f} examples/s  left"
            )
        elif time.monotonic() - self.shown > PLAIN_EVERY_S:
            self.shown = time.monotonic()
            left = elapsed / (step.number - self.start) * (self.steps - step.number)
            self.say(f"step {step.number}/{self.steps}  loss {self.loss:.4f}  {rate:.0f} examples/s  {left:.0f} s left")


def digits(score: float | None) -> str:
    """A score with four digits, or "undefined" (for example the correlation with a constant)."""
    return "undefined" if score is None else f"{score:.4f}"


def score_lines(scores: dict[str, Any]) -> list[str]:
    """The scores of a run or an evaluation as a small table, followed by those of the test part."""
    intervals, deviation = scores.get("intervals", {}), scores.get("deviation", {})
    values = {}
    for key, value in scores.items():
        if (value is None or isinstance(value, float)) and key not in (*COSTS, *BEFORE):
            spread = "" if deviation.get(key) is None else f" ± {deviation[key]:.4f}"
            between = "" if intervals.get(key) is None else " [{:.3f}, {:.3f}]".format(*intervals[key])
            values[key] = f"{digits(value)}{spread}{between}{READINGS.get(key, '')}"
    rows = {name: row for key in ("per_class", "per_label", "per_type") for name, row in scores.get(key, {}).items()}
    width = max(18, *map(len, values), *(len(name) + 2 for name in rows))
    lines = [f"{key:<{width}} {value}" for key, value in values.items()]
    if scores.get("base_score") is not None:
        lines.insert(0, f"{scores['metric']:<{width}} {digits(scores['base_score'])} for the untouched base")
    for name, row in rows.items():
        numbers = "  ".join(f"{part} {row[part]:.3f}" for part in ("precision", "recall", "f1"))
        lines.append(f"  {name:<{width - 2}} {numbers}  n {row['support']}")
    if "errors" in scores:
        kinds = (f"{count} {kind.replace('_', ' ')}" for kind, count in scores["errors"].items() if kind != "correct")
        lines.append(f"  entity errors: {', '.join(kinds)}; {scores['errors']['correct']} correct")
    if calibration := scores.get("calibration"):
        unscaled, scaled = calibration["unscaled"], calibration["scaled"]
        changes = (f"{name} from {unscaled[name]:.3f} to {scaled[name]:.3f}" for name in ("ece", "nll"))
        where = "applied" if calibration["applied"] else "not applied; see task.calibrate"
        lines.append(f"  a temperature of {calibration['temperature']:.2f} ({where}) changes {', '.join(changes)}")
    if len(seeds := scores.get("seeds", ())) > 1:
        lines.append(f"mean and standard deviation over the seeds {', '.join(map(str, seeds))}")
    test = score_lines(scores["test"]) if "test" in scores else []
    return [*lines, *(f"test {line}" for line in test)]


READINGS = {"entity_f1": "  as conlleval counts", "entity_f1_strict": "  strict IOB2"}
