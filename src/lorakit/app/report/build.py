"""What `lorakit report` does: read runs, write the page, and the figures where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.app.printing import Output
from lorakit.app.report.comparison import Comparison, comparison_of
from lorakit.app.report.drawing import write_chart, write_csv
from lorakit.app.report.page import FILE, Content, content_of, html
from lorakit.errors import OutputError
from lorakit.runtime.files import atomic_text, make_folder
from lorakit.training.run_files import read_run, runs_of

COMPARISON = "comparison.html"


def build(
    paths: Sequence[Path],
    out: Path | None = None,
    figures: Path | None = None,
    *,
    dry_run: bool = False,
) -> Output:
    """Write a page about a run, or about several; a folder of several seeds stands for the runs in it.

    Raises:
        OutputError: a folder holds no finished run, a file is damaged, or a place cannot be written to.
    """
    runs = [run for path in paths for run in runs_of(path)]
    page = paths[0] / FILE if len(paths) == 1 else Path(COMPARISON)
    page = page if out is None else _place(out)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise OutputError(f"--figures {figures}: exists already, and is not a folder")
    read = [read_run(run) for run in runs]
    content = comparison_of(read) if len(read) > 1 else content_of(read[0])
    text = html(content)
    if dry_run:
        return Output(content.sentences, content.json)
    atomic_text(page, text)
    lines = [*content.sentences, *_write_figures(figures, content), f"report: {page}"]
    return Output(lines, {**content.json, "report": str(page)})


def _place(out: Path) -> Path:
    if not out.absolute().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist")
    if out.is_dir():
        raise OutputError(f"--out {out}: is a folder; name a file in it, for example {FILE}")
    return out


def _write_figures(folder: Path | None, content: Content | Comparison) -> list[str]:
    if folder is None:
        return []
    make_folder(folder)
    for chart in content.charts:
        write_chart(chart, folder)
    for table in content.all_tables:
        write_csv(folder / f"{table.name}.csv", table.columns, table.rows)
    n = f"{len(content.charts)} charts as SVG, PNG and CSV, {len(content.all_tables)} tables as CSV"
    return [f"figures: {folder} ({n})"]
