"""A row's cells to the label that the task wants: one name, a share for each name, several names, or a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.data.example import Label, Wants
from lorakit.data.tables import Row
from lorakit.errors import ConfigError, DataError

SHARES_OFF = 1e-3  # how far from 1 the sum of the shares of a soft label may be


def label_reader(wants: Wants, columns: str | Sequence[str], separator: str = ",") -> Callable[[Row], Label]:
    """What makes of each row the label that a task wants, from one column or from several.

    Raises:
        ConfigError: the task wants what several columns cannot hold.
    """
    if isinstance(columns, str):
        column = columns  # for the closures: it stays a str
        if wants == "labels":
            return lambda row: several_labels(row, column, separator)
        return (lambda row: number(row, column)) if wants == "number" else (lambda row: one_label(row, column))
    if wants == "labels":
        return lambda row: marked_labels(row, columns)
    if wants == "label":
        return lambda row: shares(row, {name: row.values.get(name) for name in columns})
    raise ConfigError(f"data.label names {len(columns)} columns ({', '.join(columns)}); this task wants one {wants}")


def one_label(row: Row, column: str) -> str | Mapping[str, float]:
    """A text or a whole number, as text; a mapping of names to shares is a soft label."""
    value = row.values.get(column)
    if isinstance(value, dict):
        return shares(row, value)
    if isinstance(value, list) and len(value) == 1:  # annotation tools list the one choice too
        value = value[0]
    if (name := _name(value)) is None:
        raise DataError(f"{row.where}: column {column!r} holds {value!r}, not a label (a text or a whole number)")
    return name


def shares(row: Row, values: Mapping[str, Any]) -> dict[str, float]:
    """A soft label: shares of at least 0 that sum to 1 within 1e-3; what is missing to 1 is made up for."""
    found = {name: finite_number(value) for name, value in values.items()}
    for name, share in found.items():
        if share is None or share < 0:
            raise DataError(f"{row.where}: label {name!r} has {values[name]!r}, not a share from 0 to 1")
    given = {name: share for name, share in found.items() if share is not None}
    total = sum(given.values())
    if abs(total - 1) > SHARES_OFF:
        raise DataError(f"{row.where}: the shares of the labels {', '.join(given)} sum to {total:g}, not to 1")
    return {name: share / total for name, share in given.items()}


def several_labels(row: Row, column: str, separator: str) -> tuple[str, ...]:
    """The names in a list, or in a cell that is cut at the separator; an empty one holds none."""
    value = row.values.get(column)
    if isinstance(value, str):
        value = value.split(separator) if value.strip() else []
    names = [_name(item) for item in value] if isinstance(value, list) else [None]
    found = tuple(name for name in names if name is not None)
    if len(found) < len(names):
        raise DataError(
            f"{row.where}: column {column!r} holds {row.values.get(column)!r}, not labels "
            f"(a list of names, or names between which {separator!r} stands; empty for none)"
        )
    for i, name in enumerate(found):
        if name in found[:i]:
            raise DataError(f"{row.where}: label {name!r} stands twice in column {column!r}")
    return found


def marked_labels(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The names of those columns that hold a 1; the others must hold a 0."""
    marks = {column: finite_number(row.values.get(column), flags=True) for column in columns}
    for column, mark in marks.items():
        if mark not in (0, 1):
            raise DataError(f"{row.where}: column {column!r} holds {row.values.get(column)!r}, not 0 or 1")
    return tuple(column for column, mark in marks.items() if mark)


def number(row: Row, column: str) -> float:
    """A finite number."""
    value = finite_number(row.values.get(column))
    if value is None:
        raise DataError(f"{row.where}: column {column!r} holds {row.values.get(column)!r}, not a finite number")
    return value


def _name(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value).strip() or None


def finite_number(value: Any, *, flags: bool = False) -> float | None:
    """The finite number that a cell holds, or None; true and false are 1 and 0 where the cell is a flag."""
    if isinstance(value, bool):
        return float(value) if flags else None
    if isinstance(value, str) and "_" in value:  # Python's float reads 1_0 as 10
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):  # no number; an integer of hundreds of digits
        return None
    return found if math.isfinite(found) else None
