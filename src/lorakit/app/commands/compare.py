"""`lorakit compare`: whether runs differ by more than chance."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import RUN, named_columns
from lorakit.app.printing import begin


@click.command()
@click.argument("runs", type=RUN, nargs=-1, metavar="RUN RUN [RUN ...]")
@click.option("--on", metavar="DATA", help="Predict and compare on this data. Default: the runs' validation examples.")
@click.option("--text", help="With --on: column of the text.")
@click.option("--pair", help="With --on: column of the second text in pairs.")
@click.option("--label", help="With --on: column of the label, or several with commas.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(runs: tuple[Path, ...], on: str | None, as_json: bool, **columns: str | None) -> None:
    """Test whether RUNs differ by more than chance, with paired tests on the same examples.

    Runs that differ only in their seed form one group. The first group is compared with each of the others.
    """
    begin("loading the runs' answers" if on is None else "loading the runs")
    from lorakit.app.report.comparison import compare_runs

    output = compare_runs(runs, on, named_columns(**columns))
    output.show(as_json, [comparison["verdict"] for comparison in output.facts["comparisons"]])
