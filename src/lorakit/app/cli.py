"""The command line. torch and everything that needs it are imported inside the commands, so that --help is quick."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lorakit
from lorakit.app.commands.card import card
from lorakit.app.commands.combine import combine
from lorakit.app.commands.completion import TaskType, complete, completion
from lorakit.app.commands.doctor import doctor
from lorakit.app.commands.export import export
from lorakit.app.commands.import_ import import_
from lorakit.app.commands.predict import predict
from lorakit.app.commands.push import push
from lorakit.app.commands.quickstart import quickstart
from lorakit.app.commands.report import report
from lorakit.app.commands.serve import serve
from lorakit.app.commands.sweep import sweep
from lorakit.app.failures import CODES, fail, how_to_go_on
from lorakit.app.printing import echo
from lorakit.errors import ConfigError, Interrupted, LorakitError, RankError, first_line

if TYPE_CHECKING:
    from lorakit.recipe import DataSection, Recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A failure ends in one line on stderr and a code of `lorakit.errors.EXIT_CODES`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"]
    try:
        commands.main(words, prog_name="lorakit", standalone_mode=False, obj=given)
    except Interrupted as err:
        if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks
            echo(f"{err}{how_to_go_on(words)}", err=True)
        sys.exit(err.exit_code)
    except RankError as err:  # another process has said why
        sys.exit(err.exit_code)
    except LorakitError as err:
        fail(str(err), err.exit_code, debug)
    except click.exceptions.NoArgsIsHelpError as err:
        echo(err.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as err:
        fail(err.format_message(), err.exit_code, debug)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", 130, debug)
    except BrokenPipeError:  # `lorakit predict ... | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception as err:
        text = first_line(err, "no message")
        fail(f"{type(err).__name__}: {text} (a fault of lorakit's; --debug shows where)", 1, debug)


def program() -> None:
    """`main` as a process. One that a signal has stopped ends at once: taking torch apart took 1.6 s of a grace period."""
    try:
        main()
    except SystemExit as end:
        if end.code == Interrupted.exit_code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(Interrupted.exit_code)
        raise


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=CODES)
@click.version_option(lorakit.__version__, prog_name="lorakit")
def commands() -> None:
    """LoRA fine-tuning from a file of labelled text to an honest score and an adapter that ships.

    Every command takes --debug, which shows the traceback of a failure.
    """


@commands.command()
@click.argument("what")
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--model", help="Base model for DATA: a hub id, a folder, minilm or t5-demo.")
@click.option(
    "--task", type=TaskType(), help="Task for DATA, by this word or its full name; told from the file where it can be."
)
@click.option("--text", help="Column of the text.")
@click.option("--label", help="Column of the label, or several with commas.")
@click.option(
    "--resume",
    metavar="auto|PATH",
    help="Go on from the newest whole checkpoint of the run (auto; none yet: begin), or from this one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON on stdout.")
@click.option("--dry-run", is_flag=True, help="Check everything, show what would be trained, write nothing.")
@click.option("--nproc", type=click.IntRange(min=1), default=1, help="Processes of this machine, as torchrun's.")
@click.pass_obj
def train(
    words: list[str],
    /,
    *,
    what: str,
    changes: tuple[str, ...],
    resume: str | None,
    as_json: bool,
    dry_run: bool,
    nproc: int,
    **options: str | None,
) -> None:
    """Train as RECIPE.toml says, or on DATA with --model.

    \b
    lorakit train recipes/sst2-bert.toml train.lr=1e-3
    lorakit train reviews.csv --model minilm
    """
    recipe = _recipe(what, changes, options)
    if nproc > 1 and "LOCAL_RANK" not in os.environ:  # which torchrun sets for those that it starts
        from lorakit.app.launch import launch

        return launch(words, nproc)
    from lorakit.app.api import train_recipe
    from lorakit.app.console import Screen, score_lines

    screen = Screen()
    try:
        if dry_run:
            from lorakit.app.inspecting import inspect_recipe

            found = inspect_recipe(recipe, screen)
            echo(json.dumps(found.facts) if as_json else "\n".join(found.lines))
            return
        result = train_recipe(recipe, report=screen, resume=resume)
    finally:
        screen.close()
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one speaks
        return
    if as_json:
        echo(json.dumps({**result.scores, "run": str(result.folder)}))
        return
    counts = result.scores["parameters"]
    echo("\n".join(score_lines(result.scores)))
    echo(
        f"trained {counts['trainable']:,} of {counts['total']:,} parameters ({counts['trainable'] / counts['total']:.2%})"
    )
    echo(f"{result.scores['train_seconds']:.0f} s of training, {result.scores['examples_per_s']:.0f} examples/s")
    echo(f"run folder: {result.folder}")
    if (page := result.folder / "report.html").is_file():  # several seeds have one each
        echo(f"report: {page}")


def _recipe(what: str, changes: Sequence[str], options: dict[str, str | None]) -> Recipe:
    """The recipe in a file, or the one that DATA and the options make."""
    from lorakit.recipe import make_recipe, read_recipe

    if what.endswith(".toml"):
        given = [f"--{name}" for name, value in options.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]} goes with DATA; with a recipe say section.key=value")
        recipe = read_recipe(Path(what), changes)
        return recipe if recipe.output.dir else _named(recipe, Path(what).stem)
    if options["model"] is None:
        raise ConfigError(f"{what!r}: training on data needs --model, for example --model minilm; recipes end in .toml")
    raw: dict[str, dict[str, Any]] = {"model": {"base": options["model"]}, "data": {"train": what}}
    raw["data"].update({"text": options["text"], "label": _columns(options["label"])})
    if options["task"]:
        raw["task"] = {"name": options["task"]}
    elif not any(word.startswith("task.name=") for word in changes):
        others = [
            word for word in changes if not word.startswith("task.")
        ]  # which may belong to the task that is guessed
        data = make_recipe(raw, others, where="command line").data
        raw["task"] = {"name": _guess_task(data, options["model"])}
    return make_recipe(raw, changes, where="command line")


def _columns(words: str | None) -> str | tuple[str, ...] | None:
    return tuple(words.split(",")) if words is not None and "," in words else words


def _named(recipe: Recipe, name: str) -> Recipe:
    output = recipe.output.model_copy(update={"dir": str(Path("runs") / name)})
    return recipe.model_copy(update={"output": output})


def _guess_task(data: DataSection, model: str) -> str:
    """CoNLL columns are entities to be recognised, by a T5 as text; everything else is classified."""
    from lorakit.data.example import columns_of
    from lorakit.data.read import holds_words

    if data.train is None or not holds_words(data.train, columns_of(data), data.format):
        return "sequence_classification"
    return "text2text_ner" if "t5" in model.lower() else "token_classification"


@commands.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@click.option("--text", help="Column of the text.")
@click.option("--pair", help="Column of the second text of pairs; unset: as in training.")
@click.option("--label", help="Column of the label, or several with commas; unset: as in training.")
@click.option("--format", "format_", default="auto", help="Format of DATA, where its name does not tell it.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on.")
def evaluate(
    run: Path, data: str, format_: str, as_json: bool, allow_base_mismatch: bool, **columns: str | None
) -> None:
    """Score RUN (a run folder or an adapter) on labelled DATA."""
    from lorakit.app.console import Screen, score_lines
    from lorakit.data.example import Columns
    from lorakit.inference.predictor import load

    predictor = load(run, allow_base_mismatch=allow_base_mismatch, report=Screen())
    asked = Columns(columns["text"], columns["pair"], _columns(columns["label"]))
    dataset = predictor.read_labelled(data, asked, format_)
    for note in dataset.notes:
        echo(note, err=True)
    scores = predictor.evaluate(dataset.examples)
    echo(json.dumps(scores) if as_json else "\n".join(score_lines(scores)))


@commands.command()
@click.argument("what", metavar="DATA|RECIPE")
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--model", help="Count lengths in this base model's tokens; unset: the recipe's, or words.")
@click.option("--task", type=TaskType(), help="Task for DATA; told from the file where it can be.")
@click.option("--text", help="Column of the text.")
@click.option("--label", help="Column of the label.")
@click.option("--run", type=click.Path(path_type=Path), help="A trained run: suspect labels that it does not believe.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def check(what: str, changes: tuple[str, ...], run: Path | None, as_json: bool, **options: str | None) -> None:
    """Say whether DATA, or the data of a RECIPE, are fit to train on, and what in them is likely to be wrong.

    Counts, balance, lengths, duplicates, conflicting labels, overlap of the parts, rare labels; with --run suspected
    label errors too. The last line is the verdict.
    """
    whole = not what.endswith(".toml")
    if whole and run is not None:
        from lorakit.app.checking import recipe_of_run

        recipe = recipe_of_run(run, what, changes, options)
    elif whole:
        recipe = _recipe(what, changes, {**options, "model": options["model"] or ""})
    else:
        base = options.pop("model")
        recipe = _recipe(what, (*changes, *([f"model.base={base}"] if base else [])), options)
    from lorakit.app.checking import check as check_data  # after mistakes of a recipe: needs torch

    found = check_data(recipe, run, whole)
    echo(json.dumps(found.facts) if as_json else "\n".join(found.lines))


@commands.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, metavar="RUN RUN [RUN ...]")
@click.option(
    "--on", metavar="DATA", help="Compare on this data by predicting; unset: on the runs' validation examples."
)
@click.option("--text", help="With --on: column of the text.")
@click.option("--pair", help="With --on: column of the second text of pairs.")
@click.option("--label", help="With --on: column of the label, or several with commas.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(runs: tuple[Path, ...], on: str | None, as_json: bool, **columns: str | None) -> None:
    """Say whether RUNs differ by more than chance, by paired tests over the same examples.

    Runs that differ in the seed alone are taken together; the first recipe is compared with each of the others.
    """
    from lorakit.app.comparing import compare_runs
    from lorakit.data.example import Columns

    asked = Columns(columns["text"], columns["pair"], _columns(columns["label"]))
    found = compare_runs(runs, on, asked)
    echo(json.dumps(found.facts) if as_json else "\n".join(found.lines))


@commands.command()
@click.argument("what", required=False)
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--kernels", is_flag=True, help="Measure what this machine makes of the fast parts.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def inspect(what: str | None, changes: tuple[str, ...], kernels: bool, as_json: bool) -> None:
    """Show what is in a MODEL, a RUN or an adapter, or what a RECIPE would train.

    Each adapted layer gets a line: module, pattern that matched it, rank, alpha, parameters.
    """
    if kernels == (what is not None):
        raise click.UsageError("name a model, a run, an adapter or a recipe, or say --kernels")
    recipe = None
    if what is not None and what.endswith(".toml"):
        from lorakit.recipe import read_recipe

        recipe = read_recipe(Path(what), changes)
    from lorakit.app.inspecting import inspect_path, inspect_recipe  # after mistakes of a recipe: needs torch
    from lorakit.app.machine import inspect_kernels

    if recipe is not None:
        found = inspect_recipe(recipe)
    else:
        found = inspect_path(what) if what is not None else inspect_kernels()
    echo(json.dumps(found.facts) if as_json else "\n".join(found.lines))


@commands.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--dry-run", is_flag=True, help="Merge and check, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was checked as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on.")
def merge(run: Path, out: Path, dry_run: bool, as_json: bool, allow_base_mismatch: bool) -> None:
    """Fold RUN's adapter into its base model: a plain transformers folder that needs no lorakit."""
    from lorakit.app.export.command import merge as merge_run
    from lorakit.app.rehearsal import place_to_write

    with place_to_write(out, dry_run) as place:
        said = merge_run(run, place, allow_base_mismatch=allow_base_mismatch)
    if as_json:
        echo(json.dumps({"merged": None if dry_run else str(out), "said": said.lines, **said.facts}))
    else:
        echo("\n".join(said.lines if dry_run else [*said.lines, f"merged model: {out}"]))


for verb in (card, combine, completion, doctor, export, import_, predict, push, quickstart, report, serve, sweep):
    commands.add_command(verb)


complete(commands)


if __name__ == "__main__":
    main()
