"""`lorakit report`, `card` and `compare`: what can be written from run folders alone."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lorakit.app.arguments import RUN, check_sources, named_columns
from lorakit.app.printing import Output, begin, echo
from lorakit.errors import OutputError


@click.command()
@click.argument("runs", type=RUN, nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The HTML file. Default: report.html in RUN, or comparison.html here for several runs.",
)
@click.option("--dry-run", is_flag=True, help="Print the result, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def report(runs: tuple[Path, ...], out: Path | None, dry_run: bool, as_json: bool) -> None:
    """Write RUN's report, a single HTML file.

    It is made of the run folder alone. For several RUNs, write a page that compares them.
    """
    from lorakit.app.report.comparison import Comparison, comparison_of
    from lorakit.app.report.page import FILE, Content, content_of, html
    from lorakit.runtime.files import atomic_text
    from lorakit.training.run_files import read_run, runs_of

    folders = [run for path in runs for run in runs_of(path)]  # a folder of several seeds stands for the runs in it
    page = out or (runs[0] / FILE if len(runs) == 1 else Path("comparison.html"))
    if out is not None and not out.absolute().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist")
    if out is not None and out.is_dir():
        raise OutputError(f"--out {out}: is a folder; name a file in it, for example {FILE}")
    read = [read_run(run) for run in folders]
    content: Content | Comparison = comparison_of(read) if len(read) > 1 else content_of(read[0])
    text = html(content)
    if dry_run:
        return Output(content.sentences, content.json).show(as_json)
    atomic_text(page, text)
    Output([*content.sentences, f"report: {page}"], {**content.json, "report": str(page)}).show(as_json)


@click.command()
@click.argument("run", type=RUN)
@click.option("--dry-run", is_flag=True, help="Print the card, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print its path and header as JSON.")
def card(run: Path, dry_run: bool, as_json: bool) -> None:
    """Write RUN's model card again, README.md next to its adapter."""
    from lorakit.app.card import FILE, card_of, read_shipped
    from lorakit.runtime.files import atomic_text

    files = read_shipped(run)
    text, place = card_of(files), files.shipped / FILE
    if not dry_run:
        atomic_text(place, str(text))
    if as_json:
        echo(json.dumps({"card": None if dry_run else str(place), "data": text.data.to_dict()}))
    else:
        echo(str(text) if dry_run else f"card: {place}")


@click.command()
@click.argument("runs", type=RUN, nargs=-1, metavar="RUN RUN [RUN ...]")
@click.option("--on", metavar="DATA", help="Predict and compare on this data. Default: the runs' validation examples.")
@click.option("--text", help="With --on: column of the text.")
@click.option("--pair", help="With --on: column of the second text in pairs.")
@click.option("--label", help="With --on: column of the label, or several with commas.")
@click.option("--choices", help="With --on: column of the choices, or several with commas.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(runs: tuple[Path, ...], on: str | None, as_json: bool, **columns: str | None) -> None:
    """Test whether RUNs differ by more than chance.

    The tests are paired, on the same examples. Runs that differ only in their seed form one group. The first
    group is compared with each of the others.
    """
    check_sources([on])
    begin("loading the runs' answers" if on is None else "loading the runs")
    from lorakit.app.report.comparison import compare_runs

    output = compare_runs(runs, on, named_columns(**columns))
    output.show(as_json, [comparison["verdict"] for comparison in output.facts["comparisons"]])
