"""`lorakit push`: an adapter to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import RUN


@click.command()
@click.argument("run", type=RUN)
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private; one that is there must be so already.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, made where it is not there; unset: main.")
@click.option("--dry-run", is_flag=True, help="List the files and their sizes, send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the files and the address as JSON.")
def push(run: Path, repo_id: str, private: bool, revision: str | None, dry_run: bool, as_json: bool) -> None:
    """Upload RUN's adapter (after full fine-tuning: its model) with its card to REPO_ID on the Hugging Face hub.

    Checkpoints, predictions and training texts stay here.
    """
    from lorakit.app.pushing import push as push_run

    done = push_run(run, repo_id, private=private, revision=revision, dry_run=dry_run)
    done.show(as_json)
