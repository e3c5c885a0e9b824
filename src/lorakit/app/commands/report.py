"""`lorakit report`: the page of a run, or of several beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.app.arguments import RUN
from lorakit.app.printing import Output
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
    """Write RUN's report, a single HTML file, from the run folder alone.

    For several RUNs, write a page that compares them.
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
