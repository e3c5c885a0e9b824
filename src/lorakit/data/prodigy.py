"""Prodigy's records: an answer to each, and tokens with their offsets."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.data.notes import counted
from lorakit.data.tables import Row
from lorakit.errors import DataError

ANSWERS = ("accept", "reject", "ignore")
HASHES = ("_task_hash", "_input_hash")


def is_prodigy(row: Row) -> bool:
    """Whether a record is one of Prodigy's."""
    return row.values.get("answer") in ANSWERS or any(key in row.values for key in HASHES)


def accepted(rows: Sequence[Row], source: str) -> tuple[list[Row], list[str]]:
    """The accepted records and a note of the others; no spans are an empty list, chosen options are the label.

    Raises:
        DataError: a record has no answer, or none was accepted.
    """
    kept, left_out = [], []
    for row in rows:
        answer = row.values.get("answer")
        if answer not in ANSWERS:
            raise DataError(f"{row.where}: answer {answer!r}; expected {', '.join(ANSWERS)}")
        if answer == "accept":
            kept.append(_plain(row))
        else:
            left_out.append(f"{row.where} ({answer})")
    if not kept:
        raise DataError(f"{source}: no record was accepted")
    return kept, counted(f"{source}: records that were not accepted, left out", left_out)


def _plain(row: Row) -> Row:
    values = {"spans": [], **row.values}
    if "accept" in values:  # of a choice among options
        values["label"] = values["accept"]
    if "tokens" in values:
        values["token_offsets"] = [(token["start"], token["end"]) for token in _tokens(row)]
        del values["tokens"]
    return row._replace(values=values)


def _tokens(row: Row) -> Sequence[dict[str, int]]:
    tokens = row.values["tokens"]
    whole = isinstance(tokens, list) and all(
        isinstance(token, dict) and type(token.get("start")) is type(token.get("end")) is int for token in tokens
    )
    if not whole:
        raise DataError(f"{row.where}: tokens have no start and end")
    found: Sequence[dict[str, int]] = tokens
    return found
