"""`lorakit card`: the model card of a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import RUN
from lorakit.app.printing import echo


@click.command()
@click.argument("run", type=RUN)
@click.option("--dry-run", is_flag=True, help="Print the card, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print its path and header as JSON.")
def card(run: Path, dry_run: bool, as_json: bool) -> None:
    """Write RUN's model card (README.md next to its adapter) again, from the run folder alone."""
    from lorakit.app.card import card_of, read_shipped, write_card

    text = card_of(read_shipped(run))
    place = None if dry_run else write_card(run)
    if as_json:
        echo(json.dumps({"card": place and str(place), "data": text.data.to_dict()}))
    else:
        echo(str(text) if place is None else f"card: {place}")
