"""Training from Python and from the command line alike: one call that leaves a complete run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.app.figures import write_figures
from lorakit.engine.events import Report, ignore
from lorakit.engine.fit import Result, Run, check_run_folder, open_run_folder
from lorakit.engine.prepare import prepare
from lorakit.engine.ranks import joined
from lorakit.engine.runtime import deterministic
from lorakit.recipe import Recipe, make_recipe


def train(*, report: Report = ignore, resume: str | None = None, **sections: Mapping[str, Any]) -> Result:
    """Train as the sections of a recipe say (`model={"base": ...}, data={"train": ...}, ...`).

    Raises:
        LorakitError: what is asked for cannot be done; nothing is left half written.
    """
    return train_recipe(make_recipe(sections), report=report, resume=resume)


def train_recipe(recipe: Recipe, *, report: Report = ignore, resume: str | None = None) -> Result:
    """Train a recipe into its run folder, pictures included. `resume` is `auto` or a checkpoint's path.

    Under torchrun this process is one of several, all of which call this; the first of them writes and reports.
    """
    folder = Path(recipe.output.dir or default_folder(recipe))
    with deterministic(recipe.train.deterministic), joined() as ranks:
        report = report if ranks.is_first else ignore
        ranks.first(check_run_folder, folder, resume)  # before the work of preparing
        prepared = prepare(recipe, report, ranks)
        run = Run(prepared, folder, report)
        if resume is not None:
            run.resume(resume)
        ranks.first(open_run_folder, folder, resume)
        result = run.fit()
        ranks.first(write_figures, result, run.history.lines, prepared)
    return result


def default_folder(recipe: Recipe) -> Path:
    """runs/<name of the training file or data set>."""
    source = (recipe.data.train or "run").partition("#")[0].rstrip("/")
    return Path("runs") / (Path(source).stem or "run").replace(":", "-").replace("@", "-")
