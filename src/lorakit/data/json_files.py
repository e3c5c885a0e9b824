"""JSON: a record a line, or an array of records; and Prodigy's. Label Studio's records: annotation_files.py."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from lorakit.data.delimited import MOST_COLUMNS, Row
from lorakit.data.example import Columns
from lorakit.data.text import counted, listed, read_text, stream_lines
from lorakit.errors import DataError
from lorakit.hashing import unique_keys

SPACE = re.compile(r"[ \t\r\n]*")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)  # json would take the last of two


def read_json(path: Path, options: Columns = Columns(), notes: list[str] | None = None) -> Generator[Row | DataError]:
    """The records of a file, or what is wrong with one: a record a line, or those of one value that takes up the whole file.

    Such a value is an array, an object that holds one (`{"data": [...]}`), or one record.

    Raises:
        DataError: what comes after cannot be read: an array is damaged, or the text cannot be decoded.
    """
    if (kind := whole_value(path, options.encoding)) is None:
        for number, line in enumerate(stream_lines(path, options.encoding), start=1):
            where = f"{path}:{number}"
            try:
                if line.strip():
                    yield _record(DECODER.decode(line.rstrip("\r\n")), where)
            except json.JSONDecodeError as err:
                yield DataError(f"{where}: not JSON: {err.msg} at column {err.colno}")
            except (ValueError, RecursionError) as err:  # a number of thousands of digits, or as many open brackets
                yield DataError(f"{where}: not JSON: {err}")
            except DataError as err:
                yield err
        return
    text = read_text(path, options.encoding)
    if kind == "array":
        yield from _array(path, text, text.index("["))
    else:
        yield from _object_records(path, text)


def whole_value(path: Path, encoding: str | None = None) -> Literal["array", "object"] | None:
    """What a file holds that is read as a whole: one array, or one object over several lines or with records in it."""
    lines = (line.strip() for line in stream_lines(path, encoding, longest=-1) if line.strip())
    first, second = next(lines, ""), next(lines, None)
    if first[:1] not in ("[", "{"):
        return None
    if first[0] == "[" and not PAIR.match(first):  # it may be a file of gigabytes in one line
        return "array"
    try:
        value = DECODER.decode(first)
    except json.JSONDecodeError as err:  # an object over several lines is whole where it ends too early
        is_cut = err.pos >= len(first) and first[-1] in "{[,:" and second is not None
        return "array" if first[0] == "[" else "object" if is_cut else None
    except (ValueError, RecursionError):
        return "array" if first[0] == "[" else None
    if isinstance(value, list):
        return None if _is_pair(value) else "array"
    return "object" if second is None and _container(value) is not None else None


def _is_pair(value: Any) -> bool:
    """Whether a value is a text and its annotations, as spaCy's examples were written before it had files of its own."""
    return isinstance(value, list) and list(map(type, value)) == [str, dict]


PAIR = re.compile(r"\[\s*\"")
# usual names of arrays
CONTAINERS = ("data", "records", "examples", "items", "rows", "documents", "instances", "entries")


def _container(value: dict[str, Any]) -> str | None:
    """The key of an object's array of records, if it is no record itself."""
    arrays = [key for key, some in value.items() if _is_records(some)]
    named = [key for key in arrays if key in CONTAINERS]
    return (named or arrays)[0] if named or (arrays and len(value) == 1) else None


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _decoded(path: Path, text: str, start: int, line: int) -> tuple[Any, int]:
    """The JSON value that begins at a place of the text, on this line, and where it ends."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as err:
        raise DataError(f"{path}:{err.lineno}: not JSON: {err.msg} at column {err.colno}") from err
    except (ValueError, RecursionError) as err:
        raise DataError(f"{path}:{line}: not JSON: {err}") from err


def _object_records(path: Path, text: str) -> Iterator[Row]:
    """The records of one object; those of an array in it know the lines they begin on."""
    start = text.index("{")
    value, end = _decoded(path, text, start, 1)
    if text[end:].strip():
        line = text.count("\n", 0, end) + 1
        raise DataError(
            f"{path}:{line}: an object over several lines, and more after it; write one record on each line, or an array"
        )
    if (key := _container(value)) is not None:
        yield from _array(path, text, _position_of(text, start, key), is_all=False)
    else:
        yield _record(value, f"{path}:1")


def _position_of(text: str, start: int, key: str) -> int:
    """Where the value of a key of an object begins, whose bracket is at `start` and which is valid JSON."""
    position = start
    while True:
        name, position = DECODER.raw_decode(text, _past_space(text, position + 1))
        position = _past_space(text, _past_space(text, position) + 1)  # past the colon
        if name == key:
            return position
        position = _past_space(text, DECODER.raw_decode(text, position)[1])


def _array(path: Path, text: str, position: int, *, is_all: bool = True) -> Iterator[Row]:
    """Record by record, so that each knows the line it begins on, and its number: tools write all of it in one line.

    Without `is_all` something may stand behind the array, whose bracket is at `position`.
    """
    line, counted = 1, 0
    for number in count(start=1):
        position = _past_space(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        if number == 1 and text[position : position + 1] == "]":
            break
        values, position = _decoded(path, text, position, line)
        yield _record(values, f"{path}:{line}, record {number}")
        position = _past_space(text, position)
        if text[position : position + 1] != ",":
            break
    if text[position : position + 1] != "]" or (is_all and _past_space(text, position + 1) < len(text)):
        line += text.count("\n", counted, position)
        raise DataError(f"{path}:{line}: not JSON: expected a comma or the closing ] after a record of the array")


def _past_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _record(values: Any, where: str) -> Row:
    if _is_pair(values):
        values = {"text": values[0], **values[1]}
    if not isinstance(values, dict):
        hint = (
            '; write {"text": ..., "label": ...}, or with pandas orient="records"' if isinstance(values, list) else ""
        )
        raise DataError(f"{where}: a {type(values).__name__}, not a JSON object{hint}")
    if len(values) > 1 and all(map(_is_records, values.values())):
        raise DataError(f"{where}: records are under {listed(values)}; write each part to its own file")
    if values and all(isinstance(column, dict) and "0" in column for column in values.values()):
        raise DataError(f'{where}: columns of records under their numbers; write them with pandas\' orient="records"')
    if len(values) > MOST_COLUMNS:
        raise DataError(f"{where}: {len(values):,} keys; a record can have at most {MOST_COLUMNS:,}")
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as err:
        raise DataError(f"{where}: a lone surrogate escape such as \\ud800 is not text") from err
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where}: not JSON: {err}") from err
    return Row(values, where)


ANSWERS = ("accept", "reject", "ignore")
HASHES = ("_task_hash", "_input_hash")


def is_prodigy(row: Row) -> bool:
    """Whether a record is one of Prodigy's."""
    return row.values.get("answer") in ANSWERS or any(key in row.values for key in HASHES)


def accepted_records(rows: Sequence[Row], source: str) -> tuple[list[Row], list[str]]:
    """The accepted records and a note of the others; no spans are an empty list, chosen options are the label.

    Where one label was accepted or rejected of each text, the rejected ones are the class `not LABEL`.

    Raises:
        DataError: a record has no answer, or none was accepted.
    """
    accepted, left_out = [], []
    label = rows[0].values.get("label")
    is_yes_or_no = isinstance(label, str) and not any(
        row.values.get("label") != label or row.values.get("spans") or "options" in row.values for row in rows
    )
    rejected = list[str]()
    for row in rows:
        answer = row.values.get("answer")
        if answer not in ANSWERS:
            raise DataError(f"{row.where}: answer {answer!r}; expected {', '.join(ANSWERS)}")
        if answer == "accept":
            accepted.append(_plain(row))
        elif answer == "reject" and is_yes_or_no:
            accepted.append(_plain(row._replace(values={**row.values, "label": f"not {label}"})))
            rejected.append(row.where)
        else:
            left_out.append(f"{row.where} ({answer})")
    if not accepted:
        raise DataError(f"{source}: no record was accepted")
    notes = counted(f"{source}: rejected records, which have the label 'not {label}'", rejected)
    return accepted, [*notes, *counted(f"{source}: records that were not accepted, left out", left_out)]


def _plain(row: Row) -> Row:
    values = {"spans": [], **row.values}
    if "accept" in values:  # of a choice among options
        values["label"] = values["accept"]
    if "tokens" in values:
        tokens = values.pop("tokens")
        if not isinstance(tokens, list) or not all(
            isinstance(token, dict) and type(token.get("start")) is type(token.get("end")) is int for token in tokens
        ):
            raise DataError(f"{row.where}: tokens have no start and end")
        values["token_offsets"] = [(token["start"], token["end"]) for token in tokens]
    return row._replace(values=values)
