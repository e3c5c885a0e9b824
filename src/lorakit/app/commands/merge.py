"""`lorakit merge`: an adapter folded into its base."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import RUN, folder_to_write
from lorakit.app.printing import echo


@click.command()
@click.argument("run", type=RUN)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--dry-run", is_flag=True, help="Merge and check, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was checked as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on.")
def merge(run: Path, out: Path, dry_run: bool, as_json: bool, allow_base_mismatch: bool) -> None:
    """Fold RUN's adapter into its base model: a plain transformers folder that needs no lorakit."""
    from lorakit.app.export.command import merge as merge_run

    with folder_to_write(out, dry_run) as place:
        said = merge_run(run, place, allow_base_mismatch=allow_base_mismatch)
    if as_json:
        echo(json.dumps({"merged": None if dry_run else str(out), "said": said.lines, **said.facts}))
    else:
        echo("\n".join(said.lines if dry_run else [*said.lines, f"merged model: {out}"]))
