"""`lorakit quickstart` on the command line."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import click

from lorakit.app.printing import echo
from lorakit.errors import ConfigError


@click.command()
@click.argument("which", type=click.Choice(["sentiment", "ner"]), required=False)
@click.option(
    "--t5", is_flag=True, help="With ner: as text to text, over t5-small from the hub's cache or the bundled t5-demo."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where run folders go."
)
@click.option("--dry-run", is_flag=True, help="Show what would be trained, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON on stdout, all else on stderr.")
def quickstart(which: str | None, t5: bool, out: Path, dry_run: bool, as_json: bool) -> None:
    """Train on the bundled data, score, and answer sentences never seen; both systems unless one is named."""
    if t5 and which == "sentiment":
        raise ConfigError("--t5 goes with ner")
    from lorakit.app.quickstart import planned, run_ner, run_sentiment

    sentiment, ner = which != "ner" and not t5, which != "sentiment"
    if dry_run:
        found = planned(out, sentiment=sentiment, ner=ner, t5=t5)
        echo(json.dumps(found.facts) if as_json else "\n".join(found.lines))
        return
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        done = [*([run_sentiment(out)] if sentiment else []), *([run_ner(out, t5)] if ner else [])]
    if as_json:
        echo(json.dumps([{**result.scores, "run": str(result.folder)} for result in done]))
