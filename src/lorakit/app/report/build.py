"""What `lorakit report` does: read runs, write the page, and the figures where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.app.report.doubts import doubts
from lorakit.app.report.drawing import Chart, write_chart, write_csv
from lorakit.app.report.page import FILE, Table, content_of, facts, html
from lorakit.app.report.reading import read_run
from lorakit.engine.atomic import atomic_text, make_folder
from lorakit.errors import ConfigError, OutputError


class Built(NamedTuple):
    """The same for a reader and for a program."""

    lines: list[str]
    facts: dict[str, Any]


def build(
    paths: Sequence[Path], beside: Sequence[Path] = (), out: Path | None = None, figures: Path | None = None
) -> Built:
    """Write a page about a run, or about several.

    Raises:
        OutputError: a folder holds no finished run, a file is damaged, or a place cannot be written to.
    """
    if len(paths) > 1 or beside:
        raise ConfigError("report takes one RUN; `lorakit compare` compares several")
    run = read_run(paths[0])
    content = content_of(run, suspects=doubts(run))
    page = _place(out) if out is not None else paths[0] / FILE
    atomic_text(page, html(content))
    lines = [
        *content.verdict.sentences,
        *_write_figures(figures, content.charts, content.all_tables),
        f"report: {page}",
    ]
    return Built(lines, {**facts(content), "report": str(page)})


def _place(out: Path) -> Path:
    if not out.absolute().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist")
    if out.is_dir():
        raise OutputError(f"--out {out}: is a folder; name a file in it, {FILE} say")
    return out


def _write_figures(folder: Path | None, charts: Sequence[Chart], tables: Sequence[Table]) -> list[str]:
    if folder is None:
        return []
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--figures {folder}: exists already, and is no folder")
    make_folder(folder)
    for chart in charts:
        write_chart(chart, folder)
    for table in tables:
        write_csv(folder / f"{table.name}.csv", table.columns, table.rows)
    return [f"figures: {folder} ({len(charts)} charts as SVG, PNG and CSV, {len(tables)} tables as CSV)"]
