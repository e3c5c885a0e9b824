"""`lorakit evaluate`: the scores of a run on labelled data."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import DEVICE, RUN, named_columns
from lorakit.app.printing import begin, echo, tell


@click.command()
@click.argument("run", type=RUN)
@click.argument("data")
@click.option("--text", help="Column of the text.")
@click.option("--pair", help="Column of the second text in pairs. Default: as in training.")
@click.option("--label", help="Column of the label, or several with commas. Default: as in training.")
@click.option("--format", "format_", default="auto", help="Format of DATA. Default: guessed from its name and content.")
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on.")
def evaluate(
    run: Path, data: str, format_: str, as_json: bool, allow_base_mismatch: bool, device: str, **columns: str | None
) -> None:
    """Score RUN (a run folder or an adapter) on labelled DATA."""
    begin(f"loading {run}")
    from lorakit.app.console import Screen, score_lines
    from lorakit.inference.predictor import load

    predictor = load(run, allow_base_mismatch=allow_base_mismatch, device=device, report=Screen())
    dataset = predictor.read_labelled(data, named_columns(**columns), format_)
    for note in dataset.notes:
        echo(note, err=True)
    scores = predictor.evaluate(dataset.examples)
    if as_json:
        echo(json.dumps(scores))
    else:
        tell("\n".join(score_lines(scores)))
