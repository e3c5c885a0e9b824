"""`lorakit export` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lorakit.app.arguments import RUN, folder_to_write
from lorakit.app.printing import echo

WHOLE = ("merged", "sentence-transformers", "onnx")  # what gets a whole model; the others are export_profiles.PROFILES
CONSUMERS = ("peft", *WHOLE, "vllm", "lorax", "llamacpp")


@click.command()
@click.argument("run", type=RUN)
@click.option("--to", type=click.Choice(CONSUMERS), required=True, help="What is going to read it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--int8", is_flag=True, help="With onnx: write it in int8 too, and say what that changes.")
@click.option("--rank", type=click.IntRange(min=1), help="Cut updates of higher rank (DoRA's) to this one, by SVD.")
@click.option("--base-name", metavar="ID", help="What the reader calls the base model; unset: as in training.")
@click.option("--dry-run", is_flag=True, help="Export and check, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was checked as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on.")
def export(run: Path, to: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write RUN's model or adapter in the form that another program reads, say what was changed, and check it.

    \b
    peft      the adapter as it is: peft and what is built on it read all of it
    merged    a plain transformers model, the adapter folded in
    sentence-transformers
              the same of a classifier that reads the mean over tokens
    onnx      the same for onnxruntime, which needs no torch
    vllm, lorax, llamacpp
              factors A and B with one global alpha / r; the head split off
    """
    from lorakit.app.export.command import Options
    from lorakit.app.export.command import export as export_run

    with folder_to_write(out, dry_run) as place:
        told = export_run(run, to, place, Options(**options))
    if as_json:
        echo(json.dumps({"to": to, "out": None if dry_run else str(out), "said": told.lines, **told.facts}))
        return
    echo("\n".join(told.lines if dry_run else [*told.lines, f"exported for {to}: {out}"]))
