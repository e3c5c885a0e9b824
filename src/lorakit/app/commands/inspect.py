"""`lorakit inspect`: what is in a model, a run or an adapter."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import Change


@click.command()
@click.argument("what", required=False)
@click.argument("changes", type=Change(), nargs=-1, metavar="[KEY=VALUE ...]")
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
    found.show(as_json)
