"""`lorakit check`: whether data are fit to train on."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import Change, Source, TaskType, recipe_of
from lorakit.app.printing import begin


@click.command()
@click.argument("what", type=Source(), metavar="DATA|RECIPE")
@click.argument("changes", type=Change(), nargs=-1, metavar="[KEY=VALUE ...]")
@click.option(
    "--model", help="Measure lengths in tokens of this base model. Default: the recipe's model, or else words."
)
@click.option("--task", type=TaskType(), help="Task for DATA. Default: guessed from the file.")
@click.option("--text", help="Column of the text.")
@click.option("--label", help="Column of the label.")
@click.option("--run", type=click.Path(path_type=Path), help="A trained run. Lists labels that it finds unlikely.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def check(what: str, changes: tuple[str, ...], run: Path | None, as_json: bool, **options: str | None) -> None:
    """Check whether DATA is fit to train on, and list likely mistakes.

    DATA may be a RECIPE, which names its data. Prints counts, label balance and lengths, and looks for duplicates,
    conflicting labels, rare labels, and texts shared by training and validation data. With --run it also lists
    likely label errors. The last line is the verdict.
    """
    from lorakit.recipe import recipe_file

    whole = recipe_file(what) is None
    if whole and run is not None:
        from lorakit.app.checking import recipe_of_run

        recipe = recipe_of_run(run, what, changes, options)
    elif whole:
        recipe = recipe_of(what, changes, {**options, "model": options["model"] or ""})
    else:
        base = options.pop("model")
        recipe = recipe_of(what, (*changes, *([f"model.base={base}"] if base else [])), options)
    begin(f"reading {recipe.data.train}")
    from lorakit.app.checking import check as check_data  # after mistakes of a recipe: needs torch

    check_data(recipe, run, whole).show(as_json)
