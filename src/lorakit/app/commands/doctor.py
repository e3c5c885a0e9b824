"""`lorakit doctor`: whether this machine is fit to train."""

from __future__ import annotations

import json
import sys

import click

from lorakit.app.printing import echo


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Look at versions, CPU, GPU, memory, disk, hub and bundled data; exit code 1 where something prevents work."""
    from lorakit.app.doctor import examine

    found = examine()
    echo(json.dumps(found.facts) if as_json else "\n".join(found.lines))
    if not found.is_fit:
        sys.exit(1)
