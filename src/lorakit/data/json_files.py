"""JSON: a record a line, or an array of records; and Prodigy's. Label Studio's records: label_studio.py."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.data.delimited import Row
from lorakit.data.example import Columns
from lorakit.data.text import counted, read_text, stream_lines
from lorakit.errors import DataError

SPACE = re.compile(r"[ \t\r\n]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once each; json would take the last one and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"key {twice!r} stands twice in an object")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json(path: Path, asked: Columns = Columns(), notes: list[str] | None = None) -> Generator[Row | DataError]:
    """The records of a file, of an array where it begins with `[`, else one JSON object a line; or what is wrong with one.

    Raises:
        DataError: what comes after cannot be read: an array is damaged, or the text cannot be decoded.
    """
    if is_array(path, asked.encoding):
        yield from _array(path, read_text(path, asked.encoding))
        return
    for number, line in enumerate(stream_lines(path, asked.encoding), start=1):
        if line.strip():
            try:
                yield _line(line.rstrip("\r\n"), number, f"{path}:{number}")
            except DataError as err:
                yield err


def is_array(path: Path, encoding: str | None = None) -> bool:
    """Whether a file begins with `[`."""
    first = next((line for line in stream_lines(path, encoding, longest=-1) if line.strip()), "")
    return first.lstrip().startswith("[")


def _line(line: str, number: int, where: str) -> Row:
    try:
        values = DECODER.decode(line)
    except json.JSONDecodeError as err:
        whole = "; an array of records begins with [" if number == 1 and line.strip() == "{" else ""
        raise DataError(f"{where}: no JSON: {err.msg} at column {err.colno}{whole}") from err
    except (ValueError, RecursionError) as err:  # a number of thousands of digits, or as many open brackets
        raise DataError(f"{where}: no JSON: {err}") from err
    return _record(values, where)


def _array(path: Path, text: str) -> Iterator[Row]:
    """Record by record, so that each knows the line it begins on, and its number: tools write all of it in one line."""
    position, line, counted = text.index("["), 1, 0
    for number in count(start=1):
        position = _past_space(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        if number == 1 and text[position : position + 1] == "]":
            break
        try:
            values, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as err:
            raise DataError(f"{path}:{err.lineno}: no JSON: {err.msg} at column {err.colno}") from err
        except (ValueError, RecursionError) as err:
            raise DataError(f"{path}:{line}: no JSON: {err}") from err
        yield _record(values, f"{path}:{line}, record {number}")
        position = _past_space(text, position)
        if text[position : position + 1] != ",":
            break
    if text[position : position + 1] != "]" or _past_space(text, position + 1) < len(text):
        line += text.count("\n", counted, position)
        raise DataError(f"{path}:{line}: no JSON: after a record of the array comes a comma or the closing ]")


def _past_space(text: str, position: int) -> int:
    found = SPACE.match(text, position)
    return found.end() if found else position


def _record(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{where}: a {type(values).__name__}, not a JSON object")
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as err:
        raise DataError(f"{where}: a lone surrogate escape such as \\ud800 is no text") from err
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where}: no JSON: {err}") from err
    return Row(values, where)


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
