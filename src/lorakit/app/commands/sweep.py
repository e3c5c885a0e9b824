"""`lorakit sweep` on the command line."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from lorakit.app.arguments import Change
from lorakit.app.printing import begin

SAMPLERS = ("tpe", "random", "qmc", "gp", "cmaes")
PRUNERS = ("none", "median", "halving", "hyperband")


class WithHalving(click.Command):
    """A command that takes `--halving` alone, before a change such as lora.r=4,8 or at the end, as `--halving 3`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give --halving its value where what follows is none."""
        pairs = zip(args, [*args[1:], "-"], strict=True)
        is_alone = re.compile(r"-|\w+\.\w+=").match
        whole = [f"{arg}=3" if arg == "--halving" and is_alone(after) else arg for arg, after in pairs]
        return super().parse_args(ctx, whole)


def _seeds(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError as err:
        raise click.BadParameter(f"{text!r}: whole numbers with commas, for example 0,1,2") from err


@click.command(cls=WithHalving)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("words", type=Change(), nargs=-1, metavar="[KEY=VALUE,VALUE ...]")
@click.option("--draw-seed", type=int, default=0, show_default=True, help="Seed for --optuna.")
@click.option("--seeds", callback=_seeds, metavar="0,1,2", help="Train each point with each of these seeds.")
@click.option(
    "--halving",
    type=click.IntRange(min=2),
    metavar="[ETA]",
    help="Stop early all but the best 1/ETA of the runs. Default: 3.",
)
@click.option("--optuna", is_flag=True, help="Search with Optuna. Write ranges as LOW..HIGH.")
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="With --optuna: the total number of points.")
@click.option(
    "--at-once", type=click.IntRange(min=1), default=4, show_default=True, help="How many trials to train together."
)
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default="tpe",
    show_default=True,
    help="With --optuna: how to sample points.",
)
@click.option(
    "--pruner",
    type=click.Choice(PRUNERS),
    default="none",
    show_default=True,
    help="With --optuna: how to stop trials that fall behind.",
)
@click.option("--resume", is_flag=True, help="Continue the sweep in its folder. Finished runs are not repeated.")
@click.option("--dry-run", is_flag=True, help="Print the points, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the sweep as JSON.")
def sweep(recipe: Path, words: tuple[str, ...], as_json: bool, dry_run: bool, **values: Any) -> None:
    """Train RECIPE with many settings, and show which work best.

    Values with commas form a grid. Write a list in brackets. Each run has its own folder, next to sweep.json and sweep.csv.

    \b
    lorakit sweep sst2-bert train.lr=3e-4,1e-3 lora.r=4,8 --seeds 0,1,2
    lorakit sweep sst2-bert train.lr=1e-5..1e-2 lora.r=4..32 --optuna --trials 20
    lorakit sweep sst2-bert train.lr=1e-5..1e-2 lora.r=4,8 --optuna --trials 12 --sampler random
    """
    from lorakit.app.sweep.plan import Options, make_plan, show_plan
    from lorakit.recipe import recipe_file

    options = Options(recipe_file(str(recipe)) or recipe, words, **values)
    plan = make_plan(options)
    if dry_run:
        return show_plan(plan).show(as_json)
    begin(f"training in {plan.folder}")
    from lorakit.app.console import Screen  # after mistakes of recipes: needs torch
    from lorakit.app.sweep.study import run_sweep, show_sweep

    with closing(Screen()) as screen:
        output = show_sweep(run_sweep(plan, screen))
    output.show(as_json)
