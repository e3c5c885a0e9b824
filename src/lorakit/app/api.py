"""Training, from Python and from the command line: one call that writes a complete run folder."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from lorakit.app.arguments import default_folder, with_folder, with_task
from lorakit.app.card import write_card
from lorakit.app.console import Screen, digits
from lorakit.app.recipe_types import DataKeys, LoraKeys, ModelKeys, OutputKeys, Shortcuts, TaskKeys, TrainKeys
from lorakit.app.report.architecture import write_figures
from lorakit.app.report.page import write_report
from lorakit.app.trackers import Trackers, check_trackers
from lorakit.errors import ConfigError, LorakitError, NumericsError, did_you_mean
from lorakit.recipe import Recipe, full_key, known_keys
from lorakit.runtime.device import deterministic
from lorakit.runtime.distributed import Ranks, joined
from lorakit.runtime.events import Evaluated, Event, Note, Report, Started, Step, ignore
from lorakit.runtime.files import atomic_json, atomic_text
from lorakit.runtime.signals import Stop, stop_on_signals
from lorakit.training.checkpoint import Checkpoint, find_checkpoint, same_recipe
from lorakit.training.joint import attempt, groups_of, prepare_all
from lorakit.training.prepare import Prepared
from lorakit.training.results import Result
from lorakit.training.run import Run, fit_all
from lorakit.training.run_files import COSTS, MEMBER, RECIPE, run_folder

BOOKS = (RECIPE, "sweep.json", "optuna.log")  # files that may be written before the first run begins
SHORTCUTS = {  # of `train`, and of the estimators: the recipe's key that each argument sets
    "r": "lora.r",
    "alpha": "lora.alpha",
    "target_modules": "lora.target_modules",
    "epochs": "train.epochs",
    "lr": "train.lr",
    "batch_size": "train.batch_size",
    "seed": "train.seed",
    "validation_share": "data.validation_share",
    "folder": "output.dir",
}


def train(
    *,
    model: str | Path | ModelKeys,
    data: str | Path | DataKeys,
    task: str | TaskKeys | None = None,
    lora: LoraKeys | None = None,
    train: TrainKeys | None = None,
    output: OutputKeys | None = None,
    resume: str | None = None,
    verbose: bool | None = None,
    report: Report | None = None,
    **shortcuts: Unpack[Shortcuts],
) -> Result:
    """Train on a file of examples, and write a run folder.

    `model`, `data` and `task` are a base model, a training file and a task's name (unset: detected from the file), or those
    sections of a recipe; `lora`, `train` and `output` are sections. `lr` and the other shortcuts stand for the keys of the
    same name in a section, `folder` for `output.dir` (unset: a new one in runs/).
    Progress and notes go to stderr if it is a terminal or a notebook:
    `verbose` turns them on or off, `report` takes the same events.

    >>> result = lorakit.train(model="minilm", data="reviews.csv", epochs=1, folder="runs/first")
    >>> result = lorakit.train(
    ...     model={"base": "minilm", "dropout": 0.0},
    ...     data={"train": "reviews.csv", "label": "label"},
    ...     lora={"use_dora": True},
    ...     train={"epochs": 1, "schedule": "cosine"},
    ...     lr=1e-3,
    ...     folder="runs/second",
    ... )
    >>> result.predict("What a film!")["label"] in ("negative", "positive")
    True

    Raises:
        LorakitError: the run is not possible or failed; nothing is left half written. Interrupted after a signal:
            the run can be resumed.
    """
    given = {"model": model, "data": data, "task": task, "lora": lora, "train": train, "output": output}
    recipe = with_folder(with_task(_sections(given, shortcuts), where="train()"), resume)
    with closing(Screen()) as screen:
        shows = report is None and screen.console.is_terminal if verbose is None else verbose

        def each(event: Event) -> None:
            if shows:
                screen(event)
            if report is not None:
                report(event)

        return train_recipe(recipe, report=each, resume=resume)


def _sections(given: Mapping[str, Any], shortcuts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a recipe that the arguments of `train` stand for.

    Raises:
        ConfigError: there is no argument of a name, or a key is set twice.
    """
    words = {"model": "base", "data": "train", "task": "name"}  # the key that a string stands for
    sections = dict[str, Any]()
    for name, value in given.items():
        if isinstance(value, (str, Path)) and name in words:
            sections[name] = {words[name]: str(value)}
        elif name == "data" and value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"train(): data is a {type(value).__name__}, not the name of a file; save it as one, or train with "
                "lorakit.TextClassifier(...).fit(texts, labels)"
            )
        elif value is not None:
            sections[name] = dict(value) if isinstance(value, Mapping) else value
    for name, value in shortcuts.items():
        if name not in SHORTCUTS:
            own = full_key(name)
            keys = [key for key in known_keys() if key == own or key.partition(".")[2] == name]
            usual = [shortcut for shortcut, key in SHORTCUTS.items() if key in keys]
            ways = [f"{section}={{{key!r}: {value!r}}}" for section, _, key in (key.partition(".") for key in keys)]
            hint = f"write {' or '.join(ways)}" if ways else did_you_mean(name, [*given, *SHORTCUTS])
            hint = f"did you mean {usual[0]!r}?" if usual else hint
            raise ConfigError(f"train() has no argument {name!r}; {hint}")
        section, key = SHORTCUTS[name].split(".")
        table = sections.setdefault(section, {})
        if isinstance(table, dict):
            if key in table:
                raise ConfigError(
                    f"train(): {name}={value!r} and {section}={{{key!r}: {table[key]!r}}}: set one of them"
                )
            table[key] = str(value) if isinstance(value, Path) else value
    return sections


def train_recipe(recipe: Recipe, *, report: Report = ignore, resume: str | None = None) -> Result:
    """Train a recipe into its run folder, including pictures and report. `resume` is `auto` or a checkpoint's path.

    With train.seeds there is a run for each seed, and the scores are their means. Under torchrun all processes call
    this; the first one writes and reports.
    """
    if recipe.train.seeds:
        return _train_seeds(recipe, folder_of(recipe), report, resume)
    (result,) = train_recipes([recipe], report=report, resume=resume)
    if isinstance(result, LorakitError):
        raise result
    return result


def train_recipes(
    recipes: Sequence[Recipe], *, report: Report = ignore, resume: str | None = None, until: float | None = None
) -> list[Result | LorakitError]:
    """Train each recipe into its own `output.dir`; returns a Result for each, or the error that ended only that one.

    Recipes that can share a base model are trained together, with the same result as alone. With `until` each run pauses
    at its first evaluation after that share of its steps. The learning rate is that of the whole schedule, and
    resume = "auto" continues the run. The Result of a paused run has the scores of that evaluation and its `step`; there
    is no scores.json yet.

    Raises:
        LorakitError: all runs failed alike, the disk is full, a signal, or two recipes have the same folder.
    """
    folders = Counter(str(folder_of(recipe)) for recipe in recipes)
    if twice := [folder for folder, n in folders.items() if n > 1]:
        raise ConfigError(
            f"output.dir = {twice[0]!r}: two recipes have the same output folder; give each a different one"
        )
    for recipe in recipes:
        check_trackers(recipe)
    is_deterministic = any(recipe.train.deterministic for recipe in recipes)
    with deterministic(is_deterministic), joined() as ranks, stop_on_signals() as stop, ExitStack() as stack:
        report = report if ranks.is_first else ignore
        places = [attempt(_enter, recipe, resume, report, ranks, stack) for recipe in recipes]
        entered = [place for place in places if isinstance(place, _Place)]
        prepared = prepare_all([place.recipe for place in entered], report, ranks)
        progress = report if len(entered) == 1 else JointProgress(report)
        by_place = dict[_Place, Result | LorakitError]()
        for group in groups_of(prepared):
            members = {
                entered[i]: attempt(_run, entered[i], ready, progress, stop, until) for i, ready in group.items()
            }
            by_place |= {place: run for place, run in members.items() if isinstance(run, LorakitError)}
            runs = {place: run for place, run in members.items() if isinstance(run, Run)}
            try:
                by_place |= dict(zip(runs, fit_all(list(runs.values())), strict=True)) if runs else {}
                for place, run in runs.items():
                    if isinstance(result := by_place[place], Result) and not result.is_paused:
                        ranks.first(write_figures, result, run.history.lines, run.prepared)
                        ranks.first(write_report, place.folder)
                        ranks.first(write_card, place.folder)
            finally:
                for place, run in runs.items():
                    if isinstance(run.report, Trackers):
                        run.report.close(by_place.get(place))
        by_place |= {
            place: member for place, member in zip(entered, prepared, strict=True) if isinstance(member, LorakitError)
        }
    results = [by_place[place] if isinstance(place, _Place) else place for place in places]
    first = results[0]
    if isinstance(first, LorakitError) and not isinstance(first, NumericsError) and len(set(map(str, results))) == 1:
        raise first
    return results


@dataclass(frozen=True, eq=False)
class _Place:
    """The locked folder of a run, with its recipe and checkpoint."""

    folder: Path
    recipe: Recipe
    checkpoint: Checkpoint | None


def _enter(recipe: Recipe, resume: str | None, report: Report, ranks: Ranks, stack: ExitStack) -> _Place:
    """Lock a run's folder, before any work, and find the checkpoint to continue from."""
    folder = folder_of(recipe)
    ranks.first(stack.enter_context, run_folder(folder, resume, report))
    checkpoint = None if resume is None else ranks.first(find_checkpoint, folder, resume, report)
    if checkpoint is not None:
        with ranks.together():
            recipe = same_recipe(checkpoint, recipe, report)
    return _Place(folder, recipe, checkpoint)


def _run(place: _Place, prepared: Prepared, report: Report | JointProgress, stop: Stop, until: float | None) -> Run:
    if isinstance(report, JointProgress):
        report = report.of(place.folder.name)
    if place.recipe.output.trackers and prepared.ranks.is_first:
        report = Trackers(place.recipe, place.folder, report)
    run = Run(prepared, place.folder, report, stop, until)
    if place.checkpoint is not None:
        run.restore(place.checkpoint)
    return run


class JointProgress:
    """Reports the events of runs that are trained together as if they were one run."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.steps = self.done = 0  # of all runs

    def of(self, name: str) -> Report:
        """The reporter for one of the runs: its steps are added to the others', its notes begin with its name."""
        metric, steps = "", 0

        def report(event: Event) -> None:
            nonlocal metric, steps
            match event:
                case Note(text):
                    self.report(Note(f"{name}: {text}"))
                case Started(own, start, metric):
                    steps = own
                    self.steps, self.done = self.steps + own, self.done + start
                    self.report(Started(self.steps, self.done, metric))
                case Step():
                    self.done += 1
                    self.report(replace(event, number=self.done))
                case Evaluated(step, scores, is_best):
                    best = "  (best so far)" if is_best else ""
                    value = digits(scores[metric])
                    self.report(Note(f"{name}: step {step}/{steps}  validation {metric} {value}{best}"))

        return report


def _train_seeds(recipe: Recipe, folder: Path, report: Report, resume: str | None) -> Result:
    if resume not in (None, "auto"):
        raise ConfigError(f"--resume {resume}: train.seeds has a checkpoint for each seed; use --resume auto")
    is_first = os.environ.get("RANK", "0") == "0"
    with group_folder(folder, recipe, resume, report) if is_first else nullcontext():
        recipes = [with_seed(recipe, seed, folder / f"{MEMBER}{seed}") for seed in recipe.train.seeds]
        results = train_recipes(recipes, report=report, resume=resume)
        for seed, result in zip(recipe.train.seeds, results, strict=True):
            if isinstance(result, LorakitError):
                report(Note(f"train.seed = {seed} failed:"))
                raise result
        scores = summary([result for result in results if isinstance(result, Result)])
        if is_first:
            atomic_json(folder / "scores.json", scores)
    return Result(folder, scores)


def folder_of(recipe: Recipe) -> Path:
    """The folder of a recipe's run."""
    return Path(recipe.output.dir or default_folder(recipe))


# Several seeds


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


def with_seed(recipe: Recipe, seed: int, folder: Path) -> Recipe:
    """The recipe with one seed, and the folder of that run."""
    return recipe.with_keys(train={"seed": seed, "seeds": ()}, output={"dir": str(folder)})


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
