"""Training from Python and from the command line alike: one call that leaves a complete run folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from lorakit.app.figures import write_figures
from lorakit.app.report.page import write_report
from lorakit.app.seeds import group_folder, seed_recipes, summary
from lorakit.engine.atomic import atomic_text
from lorakit.engine.events import Evaluated, Event, Note, Report, Started, ignore
from lorakit.engine.fit import Run
from lorakit.engine.prepare import prepare
from lorakit.engine.ranks import joined
from lorakit.engine.results import Result
from lorakit.engine.resume import find_checkpoint, same_recipe
from lorakit.engine.run_folder import run_folder
from lorakit.engine.runtime import deterministic
from lorakit.engine.signals import stop_on_signals
from lorakit.errors import ConfigError, Interrupted, LorakitError, NumericsError, RankLost, StorageError
from lorakit.recipe import Recipe, make_recipe
from lorakit.tasks.base import Scores

END_ALL = {error.exit_code for error in (Interrupted, StorageError, RankLost)}  # also as another rank tells of them
PAUSE = "the end of a rung"  # what a Stop has been asked by


def train(*, report: Report = ignore, resume: str | None = None, **sections: Mapping[str, Any]) -> Result:
    """Train as the sections of a recipe say (`model={"base": ...}, data={"train": ...}, ...`).

    Raises:
        LorakitError: what is asked for cannot be done; nothing is left half written. An Interrupted after a signal:
            the run can be resumed.
    """
    return train_recipe(make_recipe(sections), report=report, resume=resume)


def train_recipe(
    recipe: Recipe, *, report: Report = ignore, resume: str | None = None, until: float | None = None
) -> Result:
    """Train a recipe into its run folder, pictures and report included. `resume` is `auto` or a checkpoint's path.

    With train.seeds there is a run for each seed, and the scores are their means. `until` may stop a run early, as said
    at `train_recipes`. Under torchrun this process is one of several, all of which
    call this; the first of them writes and reports.
    """
    folder = Path(recipe.output.dir or default_folder(recipe))
    if recipe.train.seeds:
        return _train_seeds(recipe, folder, report, resume)
    with deterministic(recipe.train.deterministic), joined() as ranks, stop_on_signals() as stop, ExitStack() as stack:
        report = report if ranks.is_first else ignore
        ranks.first(stack.enter_context, run_folder(folder, resume, report))  # before the work of preparing
        checkpoint = None if resume is None else ranks.first(find_checkpoint, folder, resume, report)
        if checkpoint is not None:
            with ranks.together():
                recipe = same_recipe(checkpoint, recipe, report)
        prepared = prepare(recipe, report, ranks)
        run = Run(prepared, folder, report, stop)
        if checkpoint is not None:
            run.restore(checkpoint)
        if until is not None:
            run.report = _Pause(run, until)
        try:
            result = run.fit()
        except KeyboardInterrupt:
            if stop.asked != PAUSE:
                raise
            return Result(folder, _so_far(run))
        ranks.first(write_figures, result, run.history.lines, prepared)
        ranks.first(write_report, folder)
    return result


def train_recipes(
    recipes: Sequence[Recipe], *, report: Report = ignore, resume: str | None = None, until: float | None = None
) -> list[Result | LorakitError]:
    """Train each recipe into its own `output.dir`; for each its Result, or the error that ended that one alone.

    With `until` each stops at its first evaluation after that share of its steps and is saved. It is a run of its full
    length that waits: the learning rate is that of the whole schedule, and with resume = "auto" it goes on. Its Result
    has the scores of that evaluation, with its `step`; there is no scores.json yet.

    Raises:
        LorakitError: a mistake that all of them share, a full disk, a signal. Two recipes have one folder.
    """
    folders = Counter(str(recipe.output.dir or default_folder(recipe)) for recipe in recipes)
    if twice := [folder for folder, n in folders.items() if n > 1]:
        raise ConfigError(f"output.dir = {twice[0]!r}: each of the recipes needs a folder of its own")
    results: list[Result | LorakitError] = []
    for number, recipe in enumerate(recipes, start=1):
        report(Note(f"run {number} of {len(recipes)}: {recipe.output.dir or default_folder(recipe)}"))
        try:
            results.append(train_recipe(recipe, report=report, resume=resume, until=until))
        except LorakitError as err:
            if err.exit_code in END_ALL:
                raise
            results.append(err)
    first = results[0] if results else None
    if isinstance(first, LorakitError) and not isinstance(first, NumericsError) and len(set(map(str, results))) == 1:
        raise first
    return results


def _train_seeds(recipe: Recipe, folder: Path, report: Report, resume: str | None) -> Result:
    if resume not in (None, "auto"):
        raise ConfigError(f"--resume {resume}: train.seeds has a checkpoint for each seed; say --resume auto")
    is_first = os.environ.get("RANK", "0") == "0"
    with group_folder(folder, recipe, resume, report) if is_first else nullcontext():
        results = train_recipes(seed_recipes(recipe, folder), report=report, resume=resume)
        for seed, result in zip(recipe.train.seeds, results, strict=True):
            if isinstance(result, LorakitError):
                report(Note(f"train.seed = {seed} failed:"))
                raise result
        scores = summary([result for result in results if isinstance(result, Result)])
        if is_first:
            atomic_text(folder / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    return Result(folder, scores)


class _Pause:
    """A report that asks the run to stop, as a signal does, at its first evaluation after a share of its steps."""

    def __init__(self, run: Run, until: float) -> None:
        self.report, self.stop = run.report, run.stop
        self.steps = range(max(1, round(until * run.prepared.plan.steps)), run.prepared.plan.steps)  # where it may
        self.last = _so_far(run).get("step", 0)

    def __call__(self, event: Event) -> None:
        self.report(event)
        if isinstance(event, Evaluated):
            self.last = event.step
        if isinstance(event, Evaluated | Started) and self.last in self.steps:
            self.stop.asked = self.stop.asked or PAUSE


def _so_far(run: Run) -> Scores:
    """The scores of the last evaluation."""
    scored = [line for line in run.history.lines if "validation" in line]
    last = {**scored[-1]["validation"], "step": scored[-1]["step"]} if scored else {}
    return {**last, "metric": run.prepared.task.metric}


def default_folder(recipe: Recipe) -> Path:
    """runs/<name of the training file or data set>."""
    source = (recipe.data.train or "run").partition("#")[0].rstrip("/")
    return Path("runs") / (Path(source).stem or "run").replace(":", "-").replace("@", "-")
