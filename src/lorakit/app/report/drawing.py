"""Charts by matplotlib, as SVG inside a page, in whose colour they draw."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

INK = "#000001"  # on a page it is currentColor: dark letters on light paper, light ones on dark
BLUE, RED, GREEN, AMBER = "#2f80d0", "#d9534f", "#2b9a58", "#b7791f"  # legible on both
SERIES = (BLUE, RED, GREEN, AMBER, INK)
WIDTH, HEIGHT = 4.8, 3.0  # inches; 346 points wide, so that letters stay legible on a phone
LEFT, RIGHT, TOP, BOTTOM = 0.72, 0.15, 0.12, 0.5
LETTER = 0.082  # inches
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label with $ in it is a label
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Chart:
    """A chart, and what it shows in words."""

    name: str
    title: str
    alt: str
    draw: Callable[[Any], None]  # on matplotlib's axes
    left: float = LEFT  # inches for the names of the rows
    height: float = HEIGHT
    bottom: float = BOTTOM

    @property
    def svg(self) -> str:
        """An `svg` element to stand in a page."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # without pyplot: no global state, no window system

        # the salt makes ids that no other chart of a page has
        with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
            figure = Figure(figsize=(WIDTH, self.height))
            FigureCanvasAgg(figure)
            figure.subplots_adjust(
                left=self.left / WIDTH,
                right=1 - RIGHT / WIDTH,
                bottom=self.bottom / self.height,
                top=1 - TOP / self.height,
            )
            self.draw(figure.subplots())
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return for_page(file.getvalue(), f"{self.title}: {self.alt}")


def printable(text: str) -> str:
    """A text without the characters that no XML or HTML may hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def short(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(printable(text[: most + 1]).split())
    return line if len(text) <= most else f"{line[: most - 1]}…"


def for_page(svg: str, label: str) -> str:
    """matplotlib's SVG as a part of a page: its ink the page's, no size, no fonts, no ids but those it needs.

    What came from data is text in it, and is escaped again.
    """
    root = ElementTree.fromstring(svg)
    elements = list(root.iter())
    used = set(re.findall(r"#([\w-]+)", " ".join(value for e in elements for value in e.attrib.values())))
    for element in elements:
        for child in list(element):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                element.remove(child)
        element.tag = element.tag.removeprefix(SVG)
        if XLINK in element.attrib:
            element.set("href", element.attrib.pop(XLINK))
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if style := element.get("style"):
            style = re.sub(r"font-family:[^;]*;?", "", re.sub(r"font: ?(\d+px)[^;]*", r"font-size: \1", style))
            element.set("style", style.replace(INK, "currentColor"))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(label)}
    return ElementTree.tostring(root, encoding="unicode")
