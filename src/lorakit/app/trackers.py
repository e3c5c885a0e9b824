"""Logging to TensorBoard, Weights & Biases, MLflow or trackio: the lines of metrics.jsonl, as they are written.

Trackers subscribe to a run's events; the training loop does not know them. A tracker that fails is dropped for the rest of
the run, which continues.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorakit.errors import ConfigError, LorakitError, first_line
from lorakit.recipe import Recipe
from lorakit.runtime.events import Event, Logged, Note, Report, Started
from lorakit.runtime.files import atomic_json
from lorakit.training.results import Result

STATE = "trackers.json"  # in the run folder: each tracker's id of the run
PROJECT = "lorakit"
FILES = ("recipe.toml", "scores.json", "report.html")  # uploaded at the end
LONGEST = 500  # characters of a setting, MLflow's oldest limit


@dataclass(frozen=True)
class Opening:
    """What a tracker needs to start a run, or to continue it."""

    name: str
    project: str | None  # None: from the tracker's environment variable, else PROJECT
    folder: Path
    settings: Mapping[str, Any]  # of the recipe, as section.key
    id: str | None  # the tracker's id of the run, if it is resumed
    step: int  # steps done before


class Tracker(Protocol):
    """One run in one tracker."""

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of a step."""

    def leave(self, scores: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log the scores and files of a finished run."""

    def close(self, is_whole: bool) -> None:
        """Close the run as finished (or waiting to be resumed), or else as failed."""


class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows all runs beside each other."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.id = "tensorboard"
        begins = opening.step + 1  # hide what a killed process logged for later steps
        self.writer = SummaryWriter(str(opening.folder / self.id), purge_step=begins)
        if opening.id is None:
            self._text("recipe", json.dumps(opening.settings, indent=2))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def leave(self, scores: Mapping[str, float], files: Sequence[Path]) -> None:
        self._text("scores", json.dumps(scores, indent=2))

    def close(self, is_whole: bool) -> None:
        self.writer.close()

    def _text(self, name: str, text: str) -> None:
        self.writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()))


class WandB:
    """Weights & Biases; WANDB_MODE=offline needs neither network nor account."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        self.run = wandb.init(
            project=_project(opening, "WANDB_PROJECT"),
            name=opening.name,
            config=dict(opening.settings),
            id=opening.id,
            resume=None if opening.id is None else "allow",
            reinit="create_new",  # several runs of one process at the same time
        )
        self.id = str(self.run.id)
        self.run.define_metric("*", step_metric="step")  # wandb's own counter refuses a step that is logged again

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def leave(self, scores: Mapping[str, float], files: Sequence[Path]) -> None:
        self.run.summary.update(dict(scores))
        for file in files:
            self.run.save(str(file), base_path=str(file.parent), policy="now")

    def close(self, is_whole: bool) -> None:
        self.run.finish(exit_code=0 if is_whole else 1)


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI or its default location."""

    def __init__(self, opening: Opening) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()
        if opening.id is not None:
            self.id = opening.id
            self.client.update_run(self.id, status="RUNNING")
            return
        experiment = mlflow.set_experiment(_project(opening, "MLFLOW_EXPERIMENT_NAME"))
        self.id = str(self.client.create_run(experiment.experiment_id, run_name=opening.name).info.run_id)
        for key, value in opening.settings.items():
            self.client.log_param(self.id, key, str(value)[:LONGEST])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def leave(self, scores: Mapping[str, float], files: Sequence[Path]) -> None:
        for name, value in scores.items():
            self.client.log_metric(self.id, name, value)
        for file in files:
            self.client.log_artifact(self.id, str(file))

    def close(self, is_whole: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if is_whole else "FAILED")


class Trackio:
    """trackio, local unless TRACKIO_SPACE_ID is set; `trackio show` opens its page."""

    def __init__(self, opening: Opening) -> None:
        import trackio

        self.id = opening.id or opening.name
        self.run = trackio.init(
            project=_project(opening, "TRACKIO_PROJECT"),
            name=self.id,
            config=dict(opening.settings),
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            resume="never" if opening.id is None else "allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def leave(self, scores: Mapping[str, float], files: Sequence[Path]) -> None:
        self.run.log(dict(scores))

    def close(self, is_whole: bool) -> None:
        self.run.finish()


TRACKERS: Mapping[str, tuple[str, Callable[[Opening], Tracker]]] = {  # name in the recipe -> its package and class
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
    "mlflow": ("mlflow", MLflow),
    "trackio": ("trackio", Trackio),
}


def _project(opening: Opening, variable: str) -> str:
    return opening.project or os.environ.get(variable) or PROJECT


def check_trackers(recipe: Recipe) -> None:
    """Raise a ConfigError if a tracker that the recipe names is not installed."""
    for name in recipe.output.trackers:
        package, _ = TRACKERS[name]
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(f"output.trackers: {name} is not installed; pip install 'lorakit[{name}]'")


class Trackers:
    """Forwards a run's events to `report`, and the lines of its metrics.jsonl to the recipe's trackers."""

    def __init__(self, recipe: Recipe, folder: Path, report: Report) -> None:
        self.recipe, self.folder, self.report = recipe, folder, report
        self.open: dict[str, Tracker] = {}

    def __call__(self, event: Event) -> None:
        self.report(event)
        match event:
            case Started(start=start):
                self._start(start)
            case Logged(line):
                for name, tracker in list(self.open.items()):
                    with self._dropped_if_it_fails(name):
                        tracker.log(line["step"], _values(line))

    def _start(self, step: int) -> None:
        """Open each tracker; one that does not know a resumed run yet gets all earlier lines."""
        known = _known(self.folder)
        for name in self.recipe.output.trackers:
            opening = Opening(
                name="/".join(self.folder.absolute().parts[-2:]).removeprefix("runs/"),
                project=self.recipe.output.project,
                folder=self.folder,
                settings={key: value for key, value in self.recipe.flat().items() if value is not None},
                id=known.get(name) if step else None,
                step=step,
            )
            with self._dropped_if_it_fails(name):
                self.open[name] = tracker = TRACKERS[name][1](opening)
                if step and opening.id is None:
                    for text in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                        line = json.loads(text)
                        tracker.log(line["step"], _values(line))
        if self.open:
            ids = {**known, **{name: tracker.id for name, tracker in self.open.items()}}
            atomic_json(self.folder / STATE, ids)

    def close(self, outcome: Result | LorakitError | None) -> None:
        """Close all trackers: a finished run with its scores and files, a paused one as it is, any other as failed."""
        files = [self.folder / name for name in FILES if (self.folder / name).is_file()]
        for name, tracker in list(self.open.items()):
            with self._dropped_if_it_fails(name):
                if isinstance(outcome, Result) and not outcome.is_paused:
                    test = outcome.scores.get("test", {})
                    both = {"best": outcome.scores, "test": test}.items()
                    numbers = {f"{of}/{k}": v for of, s in both for k, v in s.items() if isinstance(v, float)}
                    tracker.leave(numbers, files)
                tracker.close(isinstance(outcome, Result))

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # only scores go to stdout
                yield
        except (Exception, SystemExit) as err:  # third-party code, which may raise anything
            why = first_line(err, "no message")
            self.report(Note(f"{name}: {type(err).__name__}: {why}; the run continues without it"))
            self.open.pop(name, None)


def _known(folder: Path) -> dict[str, str]:
    try:
        ids = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return {name: value for name, value in ids.items() if isinstance(value, str)}
    except (OSError, ValueError, AttributeError):
        return {}  # then the tracker starts a new run


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, under the names that trackers group by: train/loss, validation/accuracy."""
    part = "validation" if "validation" in line else "train"
    numbers = line.get("validation", line)
    return {f"{part}/{key}": value for key, value in numbers.items() if key != "step"}
