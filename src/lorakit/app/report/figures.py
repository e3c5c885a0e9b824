"""The pictures in a run folder: the loss curve, and the model with its adapted places marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch import nn

from lorakit.app.report.charts import training_charts
from lorakit.app.report.drawing import STYLE as CHART
from lorakit.lora import Layer, SavedModule, count_parameters, hosts
from lorakit.lora.targets import linear_layers, walk
from lorakit.lora.weight_layouts import matrix_shape
from lorakit.runtime.files import atomic_file, atomic_text
from lorakit.training.prepare import Prepared
from lorakit.training.results import Result
from lorakit.training.run_files import Line, RunScores

FROZEN, ADAPTED, TRAINED = "frozen", "adapted", "trained"
STYLE = """<style>
.paper { fill: #ffffff } text { fill: #1f2328 } .frozen { fill: #e3e6ea } .adapted { fill: #f5a623 } .trained { fill: #6aa9e9 }
@media (prefers-color-scheme: dark) {
.paper { fill: #0e1217 } text { fill: #e6edf3 } .frozen { fill: #353c45 } .adapted { fill: #855600 } .trained { fill: #1f5fae }
}
</style>"""
BOX, ROW, LEFT, TOP = 144, 46, 190, 96  # pixels: width of a box, height of a row, margins


def write_figures(result: Result, lines: Sequence[Mapping[str, Any]], prepared: Prepared) -> None:
    """Write loss.png and architecture.svg into the run folder."""
    write_loss(result.folder / "loss.png", lines, result.scores)
    title = f"{prepared.base.name}: {prepared.recipe.train.method}"
    atomic_text(result.folder / "architecture.svg", architecture(prepared.model, title, prepared.adapter))


def write_loss(path: Path, lines: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> None:
    """The first two charts of a report's training, loss and validation score, beside each other."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no window system

    charts = training_charts([Line.model_validate(line) for line in lines], RunScores.model_validate(scores))
    with rc_context(CHART):
        figure = Figure(figsize=(9.6, 3.6))
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.14, top=0.9)  # a layout engine takes half a second
        FigureCanvasAgg(figure)
        for axes, chart in zip(figure.subplots(1, 2), charts, strict=False):
            chart.draw(axes)
            axes.set_title(chart.title)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format=path.suffix.removeprefix("."))


@dataclass(frozen=True)
class Box:
    """One linear layer in the picture."""

    name: str
    detail: str
    kind: str  # of training; a class of STYLE


def architecture(model: nn.Module, title: str, adapter: str = "default") -> str:
    """An SVG of the model: a row per block, a box per linear layer; frozen, adapted and fully trained ones differ."""
    rows = list(_rows(model, adapter))
    width = LEFT + BOX * max(len(boxes) for _, boxes in rows) + 20
    height = TOP + ROW * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        STYLE,
        f'<rect width="{width}" height="{height}" class="paper"/>',
        f'<text x="20" y="28" font-size="17" font-weight="600">{escape(title)}</text>',
        f'<text x="20" y="50" font-size="12">{escape(_summary(model, adapter))}</text>',
        *_legend(),
    ]
    for number, (name, boxes) in enumerate(rows):
        parts += _row(name, boxes, TOP + ROW * number)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _summary(model: nn.Module, adapter: str) -> str:
    total = sum(p.numel() for p in model.parameters())
    if not hosts(model):
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"{trainable:,} of {total:,} parameters are trained"
    count = count_parameters(model, adapter)
    share = f"{count.trainable / count.total:.2%}"
    return (
        f"{count.trainable:,} of {count.total:,} parameters are trained ({share}): "
        f"{count.lora:,} LoRA, {count.saved:,} in whole modules"
    )


def _legend() -> Iterator[str]:
    for i, (kind, text) in enumerate(((FROZEN, "frozen"), (ADAPTED, "frozen + LoRA"), (TRAINED, "trained in full"))):
        x = 20 + 150 * i
        yield f'<rect x="{x}" y="62" width="14" height="14" rx="3" class="{kind}"/>'
        yield f'<text x="{x + 20}" y="74" font-size="12">{text}</text>'


def _row(name: str, boxes: Sequence[Box], y: int) -> Iterator[str]:
    yield f'<text x="20" y="{y + 24}" font-size="12">{escape(name)}</text>'
    for i, box in enumerate(boxes):
        x = LEFT + BOX * i
        yield f'<rect x="{x}" y="{y}" width="{BOX - 8}" height="{ROW - 8}" rx="5" class="{box.kind}"/>'
        yield f'<text x="{x + 8}" y="{y + 16}" font-size="11" font-weight="600">{escape(box.name)}</text>'
        yield f'<text x="{x + 8}" y="{y + 31}" font-size="10">{escape(box.detail)}</text>'


def _rows(model: nn.Module, adapter: str) -> Iterator[tuple[str, list[Box]]]:
    """(name of the block, its boxes) in the model's order; layers outside blocks make rows by their module."""
    embeddings = [
        Box(
            path.rpartition(".")[2].removesuffix("_embeddings"),
            f"{m.num_embeddings:,} x {m.embedding_dim}",
            _plain_kind(m),
        )
        for path, m in walk(model)
        if isinstance(m, nn.Embedding) and "relative_attention" not in path
    ]
    yield "embeddings", embeddings[:6]
    rows: dict[str, list[Box]] = {}
    saved = {path: host for path, host in hosts(model, adapter) if isinstance(host, SavedModule)}
    for path, linear in linear_layers(model).items():
        rows.setdefault(_block(path), []).append(_box(model, path, linear, adapter))
    for path, host in saved.items():
        count = sum(p.numel() for p in host.base.parameters())
        rows.setdefault(_block(path), []).append(Box(path.rpartition(".")[2], f"{count:,} trained", TRAINED))
    yield from rows.items()


def _block(path: str) -> str:
    """The part of a path up to its first number, or its parent: the block that a layer belongs to."""
    parts = path.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: numbered + 1]) if numbered is not None else ".".join(parts[:-1]) or "head"


def _box(model: nn.Module, path: str, linear: nn.Module, adapter: str) -> Box:
    *_, parent, name = f".{path}".split(".")
    if name == "dense":  # says nothing by itself
        name = f"{parent}.dense"
    d_out, d_in = matrix_shape(linear)
    module = model.get_submodule(path)
    if not isinstance(module, Layer) or adapter not in module.adapters:
        return Box(name, f"{d_in} -> {d_out}", _plain_kind(linear))
    count = sum(p.numel() for p in module.adapters[adapter].parameters())
    return Box(name, f"r={module.lora(adapter).lora_A.shape[0]}  +{count:,}", ADAPTED)


def _plain_kind(module: nn.Module) -> str:
    return TRAINED if any(p.requires_grad for p in module.parameters()) else FROZEN
