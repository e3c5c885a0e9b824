"""The pictures in a run folder: the loss curve, and the model with its adapted layers marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.app.report.architecture import architecture
from lorakit.app.report.charts import training_charts
from lorakit.app.report.drawing import STYLE
from lorakit.app.report.page import METHODS
from lorakit.runtime.files import atomic_file, atomic_text
from lorakit.training.prepare import Prepared
from lorakit.training.results import Result
from lorakit.training.run_files import Line, RunScores


def write_figures(result: Result, lines: Sequence[Mapping[str, Any]], prepared: Prepared) -> None:
    """Write loss.png and architecture.svg into the run folder."""
    write_loss(result.folder / "loss.png", lines, result.scores)
    title = f"{prepared.base.name}: {METHODS.get(method := prepared.recipe.train.method, method)}"
    picture = architecture(prepared.model, title, prepared.adapter, prepared.config)
    atomic_text(result.folder / "architecture.svg", picture)


def write_loss(path: Path, lines: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> None:
    """The first two charts of a report's training, loss and validation score, beside each other."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no window system

    charts = training_charts([Line.model_validate(line) for line in lines], RunScores.model_validate(scores))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6))
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.14, top=0.9)  # a layout engine takes half a second
        FigureCanvasAgg(figure)
        for axes, chart in zip(figure.subplots(1, 2), charts, strict=False):
            chart.draw(axes)
            axes.set_title(chart.title)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format=path.suffix.removeprefix("."))
