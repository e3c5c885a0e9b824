"""`lorakit sweep` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.app.arguments import Change
from lorakit.app.printing import echo

if TYPE_CHECKING:
    from lorakit.app.sweep.command import Asked
    from lorakit.runtime.events import Report

OPTIONAL = {"--halving": "3", "--optuna": ""}  # options whose value may be left out
CHANGE = re.compile(r"\w+\.\w+=")


class OptionalValues(click.Command):
    """A command that takes `--halving lora.r=4,8` for an option without a value and a change."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give the options in OPTIONAL their value where what follows is none."""
        whole = []
        for arg, after in zip(args, [*args[1:], ""], strict=True):
            is_alone = arg in OPTIONAL and (not after or after.startswith("-") or CHANGE.match(after) is not None)
            whole.append(f"{arg}={OPTIONAL[arg]}" if is_alone else arg)
        return super().parse_args(ctx, whole)


def _seeds(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError as err:
        raise click.BadParameter(f"{text!r}: whole numbers with commas, for example 0,1,2") from err


@click.command(cls=OptionalValues)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("words", type=Change(), nargs=-1, metavar="[KEY=VALUE,VALUE ...]")
@click.option("--list", "points", metavar="FILE", type=click.Path(path_type=Path), help="Points: JSONL, or [[point]].")
@click.option("--random", type=click.IntRange(min=1), metavar="N", help="Draw N points; ranges are LOW..HIGH.")
@click.option("--draw-seed", type=int, default=0, show_default=True, help="What --random and --optuna draw from.")
@click.option("--seeds", callback=_seeds, metavar="0,1,2", help="Train each point with each of these seeds.")
@click.option(
    "--halving", type=click.IntRange(min=2), metavar="[ETA]", help="Go on with the best 1/ETA only; unset: 3."
)
@click.option("--optuna", metavar="[STORAGE]", help="Search with Optuna; unset: its storage is a file in the folder.")
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="With --optuna: points in all.")
@click.option("--at-once", type=click.IntRange(min=1), default=4, show_default=True, help="Trials trained together.")
@click.option("--sampler", default="tpe", show_default=True, help="With --optuna: tpe, random, qmc, gp or cmaes.")
@click.option("--pruner", default="none", show_default=True, help="With --optuna: none, median, halving, hyperband.")
@click.option("--worker", is_flag=True, help="With --optuna: be one of several processes that share the storage.")
@click.option("--lr-probe", is_flag=True, help="Find a learning rate by short runs over a grid of rates.")
@click.option(
    "--probe-steps", type=click.IntRange(min=8), default=100, show_default=True, help="Steps of each of those runs."
)
@click.option("--resume", is_flag=True, help="Go on with the sweep in the folder; what is trained stays.")
@click.option("--dry-run", is_flag=True, help="Print the points, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the sweep as JSON.")
def sweep(
    recipe: Path,
    words: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    lr_probe: bool,
    probe_steps: int,
    **options: Any,
) -> None:
    """Train RECIPE at many points, and show which is best.

    Values with commas are a grid; a list is written in brackets. Each run has a folder of its own beside sweep.json,
    sweep.csv, sweep.png and sweep.svg.

    \b
    lorakit sweep recipes/sst2-bert.toml train.lr=3e-4,1e-3 lora.r=4,8 --seeds 0,1,2
    lorakit sweep recipes/sst2-bert.toml train.lr=1e-5..1e-2 lora.r=4..32 --optuna --trials 20
    lorakit sweep recipes/sst2-bert.toml train.lr=1e-5..1e-2 'lora.target_modules=[query,value],all-linear' --random 12
    lorakit sweep recipes/sst2-bert.toml --lr-probe
    """
    from lorakit.app.console import Screen
    from lorakit.app.sweep.command import Asked

    asked = Asked(recipe, words, **options)
    if lr_probe and dry_run:
        raise click.UsageError("--lr-probe and --dry-run: name one of them")
    screen = Screen()
    try:
        if dry_run:
            shown, facts = _planned(asked)
        elif lr_probe:
            shown, facts = _probed(asked, probe_steps, screen)
        else:
            shown, facts = _swept(asked, screen)
    finally:
        screen.close()
    echo(json.dumps(facts) if as_json else "\n".join(shown))


Said = tuple[list[str], dict[str, Any]]  # for a terminal, and for --json


def _planned(asked: Asked) -> Said:
    from lorakit.app.sweep.command import planned

    found = planned(asked)
    return found.lines, found.facts


def _probed(asked: Asked, steps: int, report: Report) -> Said:
    from lorakit.app.sweep.probe import facts, lines, run_probe

    probe = run_probe(asked, steps, report)
    return lines(probe, asked.recipe), facts(probe)


def _swept(asked: Asked, report: Report) -> Said:
    from lorakit.app.sweep.command import run_sweep
    from lorakit.app.sweep.table import closing_lines, facts, table

    done = run_sweep(asked, report)
    return [table(done), *closing_lines(done)], facts(done)
