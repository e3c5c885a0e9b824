"""`lorakit report`: the page of a run, or of several beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import RUN


@click.command()
@click.argument("runs", type=RUN, nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The HTML file; unset: report.html in RUN, or comparison.html here for several.",
)
@click.option(
    "--figures", type=click.Path(path_type=Path), help="Also write each figure here: SVG, PNG, and its numbers as CSV."
)
@click.option("--dry-run", is_flag=True, help="Print the result, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report(runs: tuple[Path, ...], out: Path | None, figures: Path | None, dry_run: bool, as_json: bool) -> None:
    """Write the report of RUN from its folder alone, one HTML file; for several RUNs, a page that compares them."""
    from lorakit.app.report.build import build

    build(runs, out, figures, dry_run=dry_run).show(as_json)
