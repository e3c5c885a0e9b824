"""What notebooks show: small pieces of HTML without scripts, in which every text is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

COLORS = ("#cfe3ff", "#ffe0b8", "#cdeed3", "#f5d0e6", "#e3d9ff", "#f3edb2")  # by entity type; all for dark text
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def printable(text: str) -> str:
    """A text without the characters that no XML or HTML may hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def _html(value: object) -> str:
    """A text or a number as HTML, with its own writing direction."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<bdi>{escape(printable(text))}</bdi>"


def card(title: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A title above tables side by side, each with its caption; empty ones are left out."""
    parts = "".join(_table(caption, rows) for caption, rows in tables.items() if rows)
    return (
        f"<div><strong>{_html(title)}</strong>"
        f'<div style="display:flex;flex-wrap:wrap;gap:2em;align-items:flex-start">{parts}</div></div>'
    )


def _table(caption: str, rows: Mapping[str, Any]) -> str:
    body = "".join(f'<tr><th scope="row">{_html(k)}</th><td>{_html(v)}</td></tr>' for k, v in rows.items())
    return f"<table><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class EntityView:
    """A text and its entities in order, as pipelines give them; a notebook shows them highlighted.

    >>> print(EntityView("Ingrid flew to Oslo.", [{"entity_group": "PER", "start": 0, "end": 6}]))
    [Ingrid]PER flew to Oslo.
    """

    text: str
    entities: Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        """The text with each entity in brackets, followed by its type."""
        return self._joined("[{}]{}".format, str)

    def _repr_html_(self) -> str:
        types = list(dict.fromkeys(entity["entity_group"] for entity in self.entities))
        color = {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(types)}

        def mark(text: str, kind: str) -> str:
            style = f"background:{color[kind]};color:#1f2328;border-radius:.2em;padding:.1em .3em"
            return f'<mark style="{style}">{_html(text)} <small>{_html(kind)}</small></mark>'

        inner = self._joined(mark, lambda text: escape(printable(text)))
        return f'<div style="white-space:pre-wrap;line-height:1.9"><bdi>{inner}</bdi></div>'

    def _joined(self, mark: Any, plain: Any) -> str:
        parts, end = [], 0
        for entity in self.entities:
            between, inside = self.text[end : entity["start"]], self.text[entity["start"] : entity["end"]]
            parts += [plain(between), mark(inside, entity["entity_group"])]
            end = entity["end"]
        return "".join([*parts, plain(self.text[end:])])
