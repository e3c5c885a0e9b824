"""JSON: a record a line, or an array of records. Annotation tools' own records: label_studio.py and prodigy.py."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from lorakit.data.tables import Row, sound
from lorakit.data.text import decode, read_bytes
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


def read_json(path: Path) -> Iterator[Row]:
    """The records of a file: of an array where it begins with `[`, else one JSON object a line.

    Raises:
        DataError: something is no JSON, or a record is no object or holds a lone surrogate.
    """
    text = decode(path, read_bytes(path))
    return _array(path, text) if text.lstrip().startswith("[") else sound(json_rows(path, text.split("\n")))


def json_rows(path: Path, lines: Iterable[str]) -> Generator[Row | DataError]:
    """The record of each line, or what is wrong with it. Lines end at \\n only: other separators may stand inside a text."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _line(line, number, f"{path}:{number}")
            except DataError as err:
                yield err


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
