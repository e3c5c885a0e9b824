"""`lorakit import` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import TaskType, folder_to_write
from lorakit.app.printing import echo


@click.command(name="import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--base", help="Its base model, where the adapter does not name it or it is elsewhere.")
@click.option("--task", type=TaskType(), help="Its task, where its task_type does not tell it.")
@click.option("--labels", metavar="A,B,...", help="The labels, in the order of its head's rows.")
@click.option("--pair", metavar="COLUMN", help="The second text's column, where it was trained on pairs.")
@click.option("--dry-run", is_flag=True, help="Check the adapter, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def import_(folder: Path, out: Path, labels: str | None, dry_run: bool, as_json: bool, **options: str | None) -> None:
    """Check an adapter that peft has written and adopt it: predict, evaluate, merge and export work on it then."""
    from lorakit.app.importing import Asked, import_adapter

    names = tuple(name.strip() for name in labels.split(",") if name.strip()) if labels else ()
    with folder_to_write(out, dry_run) as place:
        said = import_adapter(folder, place, Asked(labels=names, **options))
    if as_json:
        echo(json.dumps({"adapter": None if dry_run else str(out), "said": said}))
    else:
        echo("\n".join(said if dry_run else [*said, f"adapter: {out}"]))
