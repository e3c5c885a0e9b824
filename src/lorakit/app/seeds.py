"""One recipe trained with several seeds: its members, and their scores as mean and spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.recipe import Recipe
from lorakit.runtime.events import Report
from lorakit.runtime.files import atomic_text
from lorakit.training.results import Result
from lorakit.training.run_files import COSTS, MEMBER, RECIPE, run_folder

BOOKS = (RECIPE, "sweep.json", "optuna.log")  # files that may be written before the first run begins


@contextmanager
def group_folder(folder: Path, recipe: Recipe, resume: str | None, report: Report) -> Iterator[None]:
    """Lock the folder of several runs as `run_folder` does; recipe.toml is common to all.

    If no run has begun in it, what was written is removed again.
    """
    with run_folder(folder, resume, report):
        before = set(folder.iterdir())
        atomic_text(folder / RECIPE, recipe.to_toml())
        try:
            yield
        finally:
            if not any(path.is_dir() for path in folder.iterdir()):
                for path in {folder / name for name in BOOKS} - before:
                    path.unlink(missing_ok=True)


def seed_recipes(recipe: Recipe, folder: Path) -> list[Recipe]:
    """The recipe of each seed, with its own folder within `folder`."""
    return [with_seed(recipe, seed, folder / f"{MEMBER}{seed}") for seed in recipe.train.seeds]


def with_seed(recipe: Recipe, seed: int, folder: Path) -> Recipe:
    """The recipe with one seed, and the folder of that run."""
    train = recipe.train.model_copy(update={"seed": seed, "seeds": ()})
    output = recipe.output.model_copy(update={"dir": str(folder)})
    return recipe.model_copy(update={"train": train, "output": output})


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The mean of each score over runs, its sample standard deviation under `deviation`, and the scores of each run."""
    every = [result.scores for result in results]
    first = every[0]
    tests = [scores["test"] for scores in every if "test" in scores]
    return {
        **_means(every),
        **({"test": _means(tests)} if tests else {}),
        "metric": first["metric"],
        "n": len(every),
        "seeds": [scores["seed"] for scores in every],
        "members": {result.folder.name: _numbers(result.scores) for result in results},
        "method": first["method"],
        "parameters": first["parameters"],
        "train_seconds": round(sum(scores["train_seconds"] for scores in every), 3),
        "examples_per_s": statistics.fmean(scores["examples_per_s"] for scores in every),
    }


def _means(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in _numbers(every[0]) if all(name in _numbers(scores) for scores in every)]
    values = {name: [scores[name] for scores in every] for name in names if name not in COSTS}
    spread = {name: statistics.stdev(some) for name, some in values.items()} if len(every) > 1 else {}
    return {**{name: statistics.fmean(some) for name, some in values.items()}, "deviation": spread}


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float) and math.isfinite(value)}
