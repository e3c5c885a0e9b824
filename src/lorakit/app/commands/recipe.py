"""`lorakit recipe`: the recipes that ship with the package."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import check_free
from lorakit.app.printing import Output, echo
from lorakit.errors import ConfigError, did_you_mean
from lorakit.runtime.files import atomic_text


@click.group()
def recipe() -> None:
    """List, show or copy the built-in recipes.

    Each is used by its name: `lorakit train sst2-bert`. To change more than a few keys copy it.
    """


@recipe.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the names and what each recipe is for as JSON.")
def list_(as_json: bool) -> None:
    """List the recipes, each with the first line of its comment."""
    from lorakit.recipe import recipe_names

    about = {name: _text(name).partition("\n")[0].removeprefix("# ") for name in recipe_names()}
    width = max(map(len, about))
    Output([f"{name:<{width}}  {line}" for name, line in about.items()], about).show(as_json)


@recipe.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the recipe NAME."""
    echo(_text(name).rstrip("\n"))


@recipe.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write. Default: NAME.toml in this folder.")
def copy(name: str, out: Path | None) -> None:
    """Copy the recipe NAME to a file of your own."""
    text, path = _text(name), out or Path(f"{name}.toml")
    check_free(path)
    atomic_text(path, text)
    echo(f"{path}: lorakit train {path}")


def _text(name: str) -> str:
    from lorakit.recipe import RECIPES, recipe_names

    if name not in recipe_names():
        raise ConfigError(f"{name!r} is not a built-in recipe; {did_you_mean(name, recipe_names())}")
    return (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
