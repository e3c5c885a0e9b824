"""`lorakit combine` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lorakit.app.arguments import RUN
from lorakit.app.printing import echo


def _weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(","))
    except ValueError as err:
        raise click.BadParameter(f"{text!r}: numbers with commas, for example 0.7,0.3") from err


@click.command()
@click.argument("runs", type=RUN, nargs=-1, metavar="RUN RUN [RUN ...]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write the adapter to; unset: only tell.")
@click.option("--on", metavar="DATA", help="Labelled examples: one half to search on, the other to score.")
@click.option("--search", type=click.IntRange(min=1), default=32, show_default=True, help="Weights to try at most.")
@click.option("--weights", callback=_weights, metavar="W,W,...", help="These weights; nothing is searched.")
@click.option("--method", default="linear", show_default=True, help="linear, ties, dare, dare_ties, magnitude_prune.")
@click.option("--density", type=float, help="Share of entries that the other methods keep.")
@click.option("--rank", type=click.IntRange(min=1), help="Cut the result to this rank; unset: exact.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the halves, and what dare drops.")
@click.option("--text", help="Column of the text; unset: as in training.")
@click.option("--pair", help="Column of the second text of pairs; unset: as in training.")
@click.option("--label", help="Column of the label; unset: as in training.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load adapters onto a base model they were not trained on.")
def combine(
    runs: tuple[Path, ...], out: Path | None, on: str | None, weights: tuple[float, ...] | None, **options: Any
) -> None:
    """Make one adapter of several RUNs of one task and base, with given weights or with the best of a search.

    \b
    lorakit combine runs/a runs/b --on validation.csv --out runs/ab
    lorakit combine runs/a runs/b --weights 0.5,0.5 --out runs/ab
    """
    from lorakit.app.combining import Judge, Way, combine_runs, facts, lines
    from lorakit.app.console import Screen
    from lorakit.data.example import Columns

    label = options["label"]
    columns = Columns(options["text"], options["pair"], tuple(label.split(",")) if label and "," in label else label)
    judge = None if on is None else Judge(on, columns, options["search"])
    way = Way(options["method"], options["density"], options["rank"], options["seed"])
    mismatch = options["allow_base_mismatch"]
    outcome = combine_runs(runs, weights, judge, way, out, allow_base_mismatch=mismatch, report=Screen())
    echo(json.dumps(facts(outcome)) if options["as_json"] else "\n".join(lines(outcome)))
