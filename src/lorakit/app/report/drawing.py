"""Charts by matplotlib: as SVG inside a page, whose colours it takes on, and as files of their own; their data as CSV."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lorakit.runtime.files import atomic_file, atomic_text

# Colours on light and on dark paper; each light one stands for one purpose alone, for it is what is replaced.
COLORS: Mapping[str, tuple[str, str]] = {
    "ink": ("#1f2328", "#e6edf3"),
    "quiet": ("#57606a", "#9da7b1"),
    "grid": ("#d8dee5", "#353c45"),
    "blue": ("#0a58ca", "#6cb2ff"),
    "red": ("#b4302c", "#ff8a80"),
    "green": ("#1a7037", "#5fd07d"),
    "amber": ("#8a5a00", "#e3b341"),
}
INK, QUIET, GRID, BLUE, RED, GREEN, AMBER = (light for light, _ in COLORS.values())
SERIES = (BLUE, RED, GREEN, AMBER, QUIET)
WIDTH, HEIGHT = 4.8, 3.0  # inches; 346 points wide, so that letters stay legible on a phone
LEFT, RIGHT, TOP, BOTTOM = 0.72, 0.15, 0.12, 0.5
LETTER = 0.082  # inches
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes a spreadsheet compute a cell
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label with $ in it is a label
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
}

Cell = str | float | None


@dataclass(frozen=True)
class Chart:
    """A chart, what it shows in words, and the numbers in it."""

    name: str  # of its files
    title: str
    alt: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    draw: Callable[[Any], None]  # on matplotlib's axes
    left: float = LEFT  # inches for the names of the rows
    height: float = HEIGHT
    bottom: float = BOTTOM

    @property
    def svg(self) -> str:
        """An `svg` element to stand in a page."""
        with drawn(self) as figure:
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return for_page(file.getvalue(), self.name, f"{self.title}: {self.alt}")


@contextmanager
def drawn(chart: Chart) -> Iterator[Any]:
    """The figure of a chart."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no window system

    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = Figure(figsize=(WIDTH, chart.height))
        FigureCanvasAgg(figure)
        figure.subplots_adjust(
            left=chart.left / WIDTH,
            right=1 - RIGHT / WIDTH,
            bottom=chart.bottom / chart.height,
            top=1 - TOP / chart.height,
        )
        chart.draw(figure.subplots())
        yield figure


def printable(text: str) -> str:
    """A text without the characters that no XML or HTML may hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def short(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(printable(text[: most + 1]).split())
    return line if len(text) <= most else f"{line[: most - 1]}…"


def for_page(svg: str, name: str, label: str) -> str:
    """matplotlib's SVG as a part of a page: no ids that clash, no size, colours as the page's variables.

    The numbers are the file's own; what came from data is text in it, and is escaped again.
    """
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib = _attributes(element.attrib, used, name)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": printable(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(given: Mapping[str, str], used: set[str], name: str) -> dict[str, str]:
    found = {}
    for key, value in given.items():
        if key == "id" and value not in used:
            continue
        key = "href" if key == XLINK else key
        if key == "id":
            value = f"{name}-{value}"
        elif key in ("href", "clip-path"):
            value = value.replace("#", f"#{name}-")
        elif key == "style":
            value = _themed(value)
        found[key] = value
    return found


def _themed(style: str) -> str:
    style = re.sub(
        r"font-family:[^;]*;?|font: ?(?P<size>\d+px)[^;]*",
        lambda m: f"font-size: {m['size']}" if m["size"] else "",
        style,
    )
    for name, (light, _) in COLORS.items():
        style = style.replace(light, f"var(--{name})")
    return style


def write_chart(chart: Chart, folder: Path) -> list[Path]:
    """Write a chart as SVG and as PNG, and its numbers as CSV."""
    with drawn(chart) as figure:
        for kind in ("svg", "png"):
            with atomic_file(folder / f"{chart.name}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, dpi=200, facecolor="white")
    write_csv(folder / f"{chart.name}.csv", chart.columns, chart.rows)
    return [folder / f"{chart.name}.{kind}" for kind in ("svg", "png", "csv")]


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Write a table; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([[_guarded(cell) for cell in row] for row in (columns, *rows)])
    atomic_text(path, file.getvalue())


def _guarded(cell: Cell) -> Cell:
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text.startswith(FORMULA) else text
