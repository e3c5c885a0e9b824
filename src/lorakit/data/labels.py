"""A cell of a table to the label that the task wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorakit.data.example import Label, Wants
from lorakit.data.tables import Row
from lorakit.errors import DataError


def one_label(row: Row, column: str) -> str:
    """A text or a whole number, as text."""
    value = row.values.get(column)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise DataError(f"{row.where}: column {column!r} holds {value!r}, not a label (a text or a whole number)")
    return str(value).strip()


LABELS: Mapping[Wants, Callable[[Row, str], Label]] = {"label": one_label}
