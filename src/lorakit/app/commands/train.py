"""`lorakit train`: train as a recipe says."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import click

from lorakit.app.arguments import Change, Source, TaskType, recipe_of, with_folder
from lorakit.app.printing import begin, echo, tell
from lorakit.errors import Interrupted, RankError

SIGNALS = (
    "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # passed on; a signal that torchrun does not handle would end it alone
)
SHUTDOWN_S = 60  # from a signal until the processes are killed; they need a step, or a batch of answers, and a save


@click.command()
@click.argument("what", type=Source(), metavar="DATA|RECIPE")
@click.argument("changes", type=Change(), nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--model", help="Base model for DATA: a hub id, a folder, minilm, or t5-demo.")
@click.option(
    "--task", type=TaskType(), help="Task for DATA, by this word or its full name. Default: guessed from the file."
)
@click.option("--text", help="Column of the text.")
@click.option("--label", help="Column of the label, or several with commas.")
@click.option(
    "--resume",
    metavar="auto|PATH",
    help="Continue from this checkpoint. auto continues from the newest one, or starts if there is none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON on stdout.")
@click.option("--dry-run", is_flag=True, help="Check everything, show what would be trained, write nothing.")
@click.option(
    "--nproc", type=click.IntRange(min=1), default=1, help="Number of processes on this machine, as with torchrun."
)
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
    """Train with the settings in RECIPE, or on DATA with --model.

    RECIPE is a TOML file, or the name of a built-in recipe (see `lorakit recipe list`).

    \b
    lorakit train reviews.csv --model minilm
    lorakit train sst2-bert train.lr=1e-3
    """
    from lorakit.recipe import recipe_file

    recipe = recipe_of(what, changes, options)
    is_named = recipe.output.dir is not None
    path = recipe_file(what)
    recipe = with_folder(recipe, resume, Path("runs") / path.stem if path else None)
    if nproc > 1 and "LOCAL_RANK" not in os.environ:  # set by torchrun for the processes it starts
        recipe.check_processes(nproc)
        return launch(words if is_named else [*words, f"output.dir={json.dumps(recipe.output.dir)}"], nproc)
    begin(f"{'checking' if dry_run else 'training'} {recipe.model.base} on {recipe.data.train}, in {recipe.output.dir}")
    from lorakit.app.api import train_recipe
    from lorakit.app.console import Screen, score_lines
    from lorakit.app.report.page import verdict_in

    screen = Screen()
    try:
        if dry_run:
            from lorakit.app.commands.inspect import inspect_recipe

            return inspect_recipe(recipe, screen, is_brief=True).show(as_json)
        result = train_recipe(recipe, report=screen, resume=resume)
    finally:
        screen.close()
    if os.environ.get("RANK", "0") != "0":  # only the first of several processes prints
        return
    verdict = verdict_in(result.folder).lines
    if as_json:
        echo(json.dumps({**result.scores, "verdict": verdict, "run": str(result.folder)}))
        return
    counts = result.scores["parameters"]
    tell("\n".join(score_lines(result.scores)))
    tell(
        f"trained {counts['trainable']:,} of {counts['total']:,} parameters ({counts['trainable'] / counts['total']:.2%})"
    )
    tell(f"{result.scores['train_seconds']:.0f} s of training, {result.scores['examples_per_s']:.0f} examples/s")
    tell(f"run folder: {result.folder}")
    if (page := result.folder / "report.html").is_file():  # with several seeds, each has its own
        tell(f"report: {page}")
    tell(verdict[0], color="cyan")
    tell("\n".join(verdict[1:]))


# Several processes


def launch(words: Sequence[str], nproc: int) -> None:
    """Run `lorakit WORDS` in `nproc` processes of this machine and wait for them.

    Raises:
        RankError: a process failed and reported why; with its exit code, or 128 and the signal that killed it. After a
            signal to this process, with the exit code of a run that can be resumed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the processes print their own errors
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    options = {"nproc-per-node": nproc, "signals-to-handle": SIGNALS, "shutdown-timeout": SHUTDOWN_S}
    arguments = parse_args(["--standalone", *(f"--{name}={value}" for name, value in options.items()), "-m", "lorakit"])
    arguments.training_script_args = list(words)  # which argparse would look through for options of its own
    try:
        run(arguments)
    except ChildFailedError as err:
        rank, failure = err.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        raise RankError(f"process {rank} failed", code) from err
    except SignalException as err:
        raise RankError(f"ended by {err.sigval.name}", Interrupted.exit_code) from err
