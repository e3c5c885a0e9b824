"""Arguments shared by several commands (a recipe or data, a task, a run), with shell completion; without torch."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from lorakit.errors import ConfigError, OutputError, did_you_mean

if TYPE_CHECKING:
    from lorakit.data.example import Columns
    from lorakit.recipe import Recipe


def recipe_of(what: str, changes: Sequence[str], options: dict[str, str | None]) -> Recipe:
    """The recipe in a file, one that ships with the package, or one made from DATA and the options; its files exist."""
    from lorakit.recipe import read_recipe, recipe_file, recipe_names

    if path := recipe_file(what):
        flags = [f"--{name}" for name, value in options.items() if value is not None]
        if flags:
            raise ConfigError(f"{flags[0]} only works with DATA; with a recipe use section.key=value")
        recipe = read_recipe(path, changes)
    elif options["model"] is None:
        if re.fullmatch(r"[\w-]+", what) and not Path(what).exists():
            raise ConfigError(f"{what!r} is neither a file nor a built-in recipe; {did_you_mean(what, recipe_names())}")
        raise ConfigError(f"{what!r}: training on data needs --model, for example --model minilm")
    else:
        raw: dict[str, dict[str, Any]] = {"model": {"base": options["model"]}, "data": {"train": what}}
        raw["data"].update({"text": options["text"], "label": _split_commas(options["label"])})
        if options["task"]:
            raw["task"] = {"name": options["task"]}
        recipe = with_task(raw, changes, where="command line")
    check_sources([recipe.data.train, recipe.data.validation, recipe.data.test])
    return recipe


def with_task(raw: dict[str, dict[str, Any]], changes: Sequence[str] = (), *, where: str) -> Recipe:
    """The recipe of these sections and changes; a task that is not named is detected from the training data."""
    from lorakit.recipe import make_recipe

    task = raw.get("task", {})
    if isinstance(task, dict):
        if "name" in task:
            raw = {**raw, "task": {**task, "name": _tasks().get(str(task["name"]), task["name"])}}
        elif not any(word.startswith("task.name=") for word in changes):
            from lorakit.data.example import columns_of
            from lorakit.data.read import holds_words

            others = [word for word in changes if not word.startswith("task.")]  # which may be keys of the guessed task
            recipe = make_recipe({name: table for name, table in raw.items() if name != "task"}, others, where=where)
            data, name = recipe.data, "sequence_classification"
            if data.train is not None and holds_words(data.train, columns_of(data), data.format):
                name = "text2text_ner" if "t5" in recipe.model.base.lower() else "token_classification"
            raw = {**raw, "task": {"name": name, **task}}
    return make_recipe(raw, changes, where=where)


def check_sources(sources: Sequence[str | None]) -> None:
    """Raise a DataError for a file that does not exist, before torch is loaded."""
    from lorakit.data.formats import check_exists

    for source in sources:
        if source is not None:
            check_exists(source)


def named_columns(text: str | None, pair: str | None, label: str | None, choices: str | None = None) -> Columns:
    """The columns named by --text, --pair, --label and --choices; several are separated by commas."""
    from lorakit.data.example import Columns

    return Columns(text, pair, _split_commas(label), choices=_split_commas(choices))


def _split_commas(words: str | None) -> str | tuple[str, ...] | None:
    return tuple(words.split(",")) if words is not None and "," in words else words


def with_folder(recipe: Recipe, resume: str | None, folder: Path | None = None) -> Recipe:
    """The recipe with `output.dir`, where it is unset: a folder that is free, or that of the run to resume.

    `folder` is its name without a number, unset that of the data. Of several processes none sees which is free.
    """
    if recipe.output.dir:
        return recipe
    folder = folder or default_folder(recipe)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        *taken, free = _series(folder)
        if resume is None:
            folder = free
        elif taken:
            of_path = [place for place in taken if Path(resume).resolve().is_relative_to(place.resolve())]
            folder = taken[-1] if resume == "auto" else of_path[0] if of_path else folder
    return recipe.with_keys(output={"dir": str(folder)})


def default_folder(recipe: Recipe) -> Path:
    """runs/<name of the training file or data set>."""
    source = (recipe.data.train or "run").partition("#")[0].rstrip("/")
    name = re.sub(r"[-_.]*[*?\[\]]+", "", Path(source).stem)  # a pattern without its wildcards
    return Path("runs") / (name or "run").replace(":", "-").replace("@", "-")


def free_folder(folder: Path) -> Path:
    """The folder, or if it exists the same name with the first number that is free."""
    return _series(folder)[-1]


def next_folder(folder: Path) -> Path:
    """The first free name after that of a run: runs/a-3 after runs/a-2, if there is a runs/a."""
    name = re.sub(r"-\d+$", "", folder.name)
    first = folder.with_name(name) if name else folder
    return free_folder(first if first.exists() else folder)


def _series(folder: Path) -> list[Path]:
    """NAME, NAME-2, NAME-3, ... up to the first that does not exist."""
    series = [folder]
    while series[-1].exists():
        series.append(folder.with_name(f"{folder.name}-{len(series) + 1}"))
    return series


class TaskType(click.ParamType[str]):
    """A task, by its name in a recipe or its short word."""

    name = "task"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        names = _tasks()
        if value not in names:
            self.fail(f"{value!r} is not a task; {did_you_mean(value, names)}", param, ctx)
        return names[value]

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        from lorakit.task_info import TASKS

        return f"[{'|'.join(info.word or name for name, info in TASKS.items())}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in _tasks() if word.startswith(incomplete)]


def _tasks() -> dict[str, str]:
    """Every short word for a task, with the task's name."""
    from lorakit.task_info import TASKS

    return {**{info.word: name for name, info in TASKS.items() if info.word}, **{name: name for name in TASKS}}


class Change(click.types.StringParamType):
    """A section.key=value argument."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from lorakit.recipe import known_keys

        return [CompletionItem(f"{key}=") for key in known_keys() if key.startswith(incomplete)]


class Source(click.types.StringParamType):
    """A recipe's name, or a file."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from lorakit.recipe import recipe_names

        names = [CompletionItem(name) for name in recipe_names() if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="file")]


def check_run(path: str) -> None:
    """Raise an OutputError if there is no such folder, before torch is loaded."""
    if not Path(path).exists():
        raise OutputError(f"{path}: no such run folder")


class Run(click.Path):
    """The folder of a run."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.type is Path:
            check_run(value)
        return super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Runs below the typed path, or below runs/ if nothing is typed; if there are none, the shell's own folders."""
        typed = Path(incomplete or "runs/")
        is_whole = not incomplete or incomplete.endswith("/")
        parent, begin = (typed, "") if is_whole else (typed.parent, typed.name)
        folders = sorted(path for path in parent.glob(f"{glob.escape(begin)}*") if (path / "recipe.toml").is_file())
        return [CompletionItem(str(path)) for path in folders] or [CompletionItem(incomplete, type="dir")]


RUN = Run(path_type=Path)
DEVICE = click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda", "mps", "xpu")),
    default="auto",
    help="Where the model runs. Default: on a GPU if there is one.",
)

ALLOW_MISMATCH = click.option(
    "--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on."
)


@contextmanager
def folder_to_write(out: Path, dry_run: bool) -> Iterator[Path]:
    """The folder for --out, or with --dry-run a temporary folder.

    Raises:
        OutputError: `out` exists or cannot be created.
    """
    check_free(out)
    if not dry_run:
        yield out
        return
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise OutputError(f"--out {out}: cannot be written: {above} is not a folder")
    with tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
        yield Path(folder) / (out.name or "out")


def check_free(out: Path) -> None:
    """Raise an OutputError if a command would overwrite something."""
    if os.path.lexists(out):
        raise OutputError(f"--out {out} exists already; choose another name")
