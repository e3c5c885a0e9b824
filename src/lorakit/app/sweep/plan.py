"""What a sweep trains, as the command line says it: recipes alone, so that a mistake is refused before torch is imported.

In `key=value` words commas part the values of a grid, and brackets make a list: `lora.target_modules=[query,value],[query]`
are two points. `train.lr=1e-5..1e-2` is a range to draw from.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin

from lorakit.app.printing import Output
from lorakit.errors import ConfigError
from lorakit.recipe import Recipe, read_recipe, toml_value
from lorakit.training.budget import EVALUATIONS

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Point = Mapping[str, Any]  # section.key -> value
WORD = re.compile(r"(?P<key>\w+\.\w+)=(?P<text>.*)", re.DOTALL)
# a comma within any of these parts nothing
ITEM = re.compile(r"""(?:^|,)((?:\[[^]]*]|{[^}]*}|\([^)]*\)|"[^"]*"|'[^']*'|[^,])*)""")
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})", re.IGNORECASE)
SEED = "train.seed"
PRUNED_AT = 9  # points that would be halved by thirds as often as a pruner looks
NAME_LENGTH, WORD_LENGTH = 60, 20  # letters of a run's name, and of a value in it


@dataclass(frozen=True)
class Options:
    """The command line of a sweep."""

    recipe: Path
    words: Sequence[str] = ()
    draw_seed: int = 0
    seeds: Sequence[int] = ()
    halving: int | None = None
    optuna: bool = False
    trials: int | None = None
    at_once: int = 4
    sampler: str = "tpe"
    pruner: str = "none"
    resume: bool = False


class Axis(NamedTuple):
    """A key and its values; of a range its two ends."""

    key: str
    values: Sequence[Any]
    is_range: bool = False

    @property
    def distribution(self) -> BaseDistribution:
        """What Optuna draws from: of values each as TOML, since it takes no lists; a range is on a log scale unless its ends
        are whole numbers or the lower one is 0."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if not self.is_range:
            return CategoricalDistribution([toml(value) for value in self.values])
        low, high = self.values
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high)
        return FloatDistribution(low, high, log=low > 0)


class Setting(NamedTuple):
    """What one trial trains: a point with each of its seeds."""

    point: Point  # the seed left out
    seeds: list[int]


@dataclass(frozen=True)
class Plan:
    """What is trained, into which folder. With `options.optuna` there are no settings: Optuna draws them from the axes."""

    options: Options
    base: Recipe
    fixed: Sequence[str]  # words that change the recipe for all points
    axes: Sequence[Axis]
    seeds: Sequence[int]
    settings: Sequence[Setting]
    shares: Sequence[float]  # of a run's steps, after each of which the worse points are stopped
    folder: Path

    def recipe_of(self, point: Point, seed: int) -> Recipe:
        """The recipe of one run."""
        words = [word(key, value) for key, value in {**point, SEED: seed}.items()]
        return read_recipe(self.options.recipe, [*self.fixed, "train.seeds=[]", *words])


def make_plan(options: Options) -> Plan:
    """The plan of a command line; every recipe in it has been made once.

    Raises:
        ConfigError: the recipe or a word is wrong, or asks for what does not go together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a sweep runs in one process; only `lorakit train` can use several")
    if options.optuna and options.halving:
        raise ConfigError("--halving does not work with --optuna; use --pruner")
    if options.optuna != (options.trials is not None):
        raise ConfigError("--optuna and --trials N only work together")
    axes = parse_axes(options.words)
    fixed = [word(axis.key, axis.values[0]) for axis in axes if len(axis.values) == 1 and axis.key != SEED]
    base = read_recipe(options.recipe, fixed)
    seeds: Sequence[int] = options.seeds or base.train.seeds or (base.train.seed,)
    for axis in axes:
        if axis.key == SEED and options.seeds:
            raise ConfigError("use either --seeds or train.seed")
        if axis.key == SEED and axis.is_range:
            raise ConfigError("train.seed: seeds are not sampled; use --seeds 0,1,2")
        if axis.key == "output.dir" and len(axis.values) > 1:
            raise ConfigError("output.dir: each run of a sweep needs a folder within the sweep's folder")
        seeds = axis.values if axis.key == SEED else seeds
    seeds = list(dict.fromkeys(seeds))
    axes = [axis for axis in axes if axis.key != SEED and len(axis.values) > 1]
    if not (axes or len(seeds) > 1):
        raise ConfigError("nothing to sweep over; give several values, for example train.lr=3e-4,1e-3")
    settings = [] if options.optuna else [Setting(point, seeds) for point in grid(axes)]
    eta = options.halving or (3 if options.pruner != "none" else None)
    shares = halving_shares(PRUNED_AT if options.optuna else len(settings), eta, base) if eta else []
    if shares and base.train.max_steps is not None and base.train.eval_every is None:
        fixed.append(word("train.eval_every", math.ceil(base.train.max_steps * shares[0])))
    folder = Path(base.output.dir or Path("runs") / f"{options.recipe.stem}-sweep")
    plan = Plan(options, base, fixed, axes, seeds, settings, shares, folder)
    first = {axis.key: axis.values[0] for axis in axes}
    drawn = [Setting({**first, axis.key: value}, seeds) for axis in axes for value in axis.values]
    for point, own in drawn if options.optuna else settings:
        for seed in own:
            plan.recipe_of(point, seed)
    return plan


def halving_shares(n: int, eta: int, recipe: Recipe) -> list[float]:
    """The shares of a run's steps after which n points are thinned out; each of them is an evaluation of the recipe.

    Raises:
        ConfigError: there is no evaluation before a run's end.
    """
    depth = math.floor(math.log(n, eta) + 1e-9)
    train = recipe.train
    if train.eval_every is None and train.max_steps is None:
        depth = min(depth, math.floor(math.log(train.epochs or EVALUATIONS, eta) + 1e-9))
        if n >= eta and not depth:
            raise ConfigError(
                f"--halving {eta}: train.epochs = {train.epochs} has no evaluation after 1/{eta} of the steps; "
                f"set train.epochs={eta} or more, train.max_steps or train.eval_every"
            )
    return [eta**-level for level in range(depth, 0, -1)]


def run_name(number: int, point: Point, seed: int) -> str:
    """003-lr0.001-r8-seed0: the number of its trial, and what tells it from the others."""
    words = []
    for key, value in point.items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words.append(key.rpartition(".")[2] + re.sub(r"[^\w.,+-]", "_", text)[:WORD_LENGTH])
    return "-".join(filter(None, [f"{number:03d}", "-".join(words)[:NAME_LENGTH].rstrip("-"), f"seed{seed}"]))


def show_plan(plan: Plan) -> Output:
    """The points, checked but not trained."""
    runs: list[dict[str, Any]] = [
        {"name": run_name(number, point, seed), "point": dict(point), "seed": seed}
        for number, (point, seeds) in enumerate(plan.settings)
        for seed in seeds
    ]
    shown = [(run["name"], {**run["point"], SEED: run["seed"]}) for run in runs]
    lines = [f"{name}: {' '.join(word(key, value) for key, value in point.items())}" for name, point in shown]
    lines.append(f"{len(plan.settings)} points, {len(runs)} runs in {plan.folder}")
    return Output(lines, {"folder": str(plan.folder), "runs": runs})


# Words


def parse_axes(words: Sequence[str]) -> list[Axis]:
    """What each word asks for, in order.

    Raises:
        ConfigError: a word is no key=value, a key comes twice, a value or a range is empty, or a key that takes lists
            has commas without brackets.
    """
    axes: list[Axis] = []
    for word in words:
        if not (match := WORD.fullmatch(word)):
            raise ConfigError(f"{word!r}: a sweep takes section.key=value,value, for example train.lr=3e-4,1e-3")
        key, text = match["key"], match["text"]
        if key == "train.seeds":
            raise ConfigError(f"{word!r}: in a sweep use --seeds 0,1,2")
        if key in (axis.key for axis in axes):
            raise ConfigError(f"{word!r}: {key} is given twice; give all of its values in one argument")
        items = [item.strip() for item in ITEM.findall(text)]
        if empty := [i for i, item in enumerate(items, start=1) if not item]:
            raise ConfigError(f"{word!r}: value {empty[0]} of {len(items)} is empty")
        if ends := RANGE.fullmatch(text):
            low, high = map(toml_value, ends.groups())
            if not low < high:
                raise ConfigError(f"{word!r}: the range is empty; write the lower end first")
            axes.append(Axis(key, (low, high), is_range=True))
            continue
        if len(items) > 1 and _takes_lists(key) and not any(item[0] in "['\"" for item in items):
            raise ConfigError(
                f"{word!r}: {key} takes lists, so write [{text}] for one point, or [a],[b] or 'a','b' for several"
            )
        values = list(map(toml_value, items))
        if twice := [item for item, value in zip(items, values, strict=True) if values.count(value) > 1]:
            raise ConfigError(f"{word!r}: {twice[0]} is given twice")
        axes.append(Axis(key, values))
    return axes


def _takes_lists(key: str) -> bool:
    def has_tuple(annotation: Any) -> bool:
        return get_origin(annotation) is tuple or any(map(has_tuple, get_args(annotation)))

    section, _, name = key.partition(".")
    table = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
    fields = getattr(table, "model_fields", {})
    return name in fields and has_tuple(fields[name].annotation)


def word(key: str, value: Any) -> str:
    """The `key=value` word of a recipe that says this."""
    return f"{key}={toml(value)}"


def toml(value: Any) -> str:
    """The value as TOML writes it, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml(key)} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one character that JSON leaves raw


# Points


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the values, the last key changing fastest.

    Raises:
        ConfigError: there is a range.
    """
    if ranges := [axis for axis in axes if axis.is_range]:
        key, (low, high), _ = ranges[0]
        raise ConfigError(f"{key}={low}..{high}: values are sampled from a range; pass --optuna --trials N")
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in product(*(axis.values for axis in axes))]


def point_of(axes: Sequence[Axis], trial: Trial) -> Point:
    """The point that Optuna has drawn."""
    values = {axis.key: {} if axis.is_range else {toml(value): value for value in axis.values} for axis in axes}
    return {key: values[key].get(value, value) for key, value in trial.params.items()}
