"""`lorakit merge`: an adapter merged into its base."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import RUN, folder_to_write
from lorakit.app.printing import Output, begin


@click.command()
@click.argument("run", type=RUN)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--dry-run", is_flag=True, help="Merge and check, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was checked as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load the adapter onto a base model it was not trained on.")
def merge(run: Path, out: Path, dry_run: bool, as_json: bool, allow_base_mismatch: bool) -> None:
    """Merge RUN's adapter into its base model, and write a transformers folder that does not need lorakit."""
    begin(f"merging {run}")
    with folder_to_write(out, dry_run) as place:
        from lorakit.app.export.adapters import merge as merge_run

        lines, facts = merge_run(run, place, allow_base_mismatch=allow_base_mismatch)
    end = [] if dry_run else [f"merged model: {out}"]
    Output([*lines, *end], {"merged": None if dry_run else str(out), "said": lines, **facts}).show(as_json)
