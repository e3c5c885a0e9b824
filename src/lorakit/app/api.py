"""Training from Python and from the command line alike: one call that leaves a complete run folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lorakit.app.figures import write_figures
from lorakit.engine.events import Report, ignore
from lorakit.engine.fit import Result, Run
from lorakit.engine.prepare import prepare
from lorakit.engine.ranks import joined
from lorakit.engine.resume import find_checkpoint, same_recipe
from lorakit.engine.run_folder import run_folder
from lorakit.engine.runtime import deterministic
from lorakit.engine.signals import stop_on_signals
from lorakit.recipe import Recipe, make_recipe


def train(*, report: Report = ignore, resume: str | None = None, **sections: Mapping[str, Any]) -> Result:
    """Train as the sections of a recipe say (`model={"base": ...}, data={"train": ...}, ...`).

    Raises:
        LorakitError: what is asked for cannot be done; nothing is left half written. An Interrupted after a signal:
            the run can be resumed.
    """
    return train_recipe(make_recipe(sections), report=report, resume=resume)


def train_recipe(recipe: Recipe, *, report: Report = ignore, resume: str | None = None) -> Result:
    """Train a recipe into its run folder, pictures included. `resume` is `auto` or a checkpoint's path.

    Under torchrun this process is one of several, all of which call this; the first of them writes and reports.
    """
    folder = Path(recipe.output.dir or default_folder(recipe))
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
        result = run.fit()
        ranks.first(write_figures, result, run.history.lines, prepared)
    return result


def default_folder(recipe: Recipe) -> Path:
    """runs/<name of the training file or data set>."""
    source = (recipe.data.train or "run").partition("#")[0].rstrip("/")
    return Path("runs") / (Path(source).stem or "run").replace(":", "-").replace("@", "-")
