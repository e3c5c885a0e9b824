"""Files of answers: the columns that each task's answers have, as Parquet or as JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lorakit.errors import DataError, OutputError
from lorakit.runtime.files import atomic_file

Format = Literal["parquet", "jsonl"]
ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # of a file of answers
GROUP = 4096  # answers that are held before they are written to Parquet

TEXT = pa.string()
FILE, ROW = "file", "row"  # where an answer's text stands; rows are counted from 1
ENTITY = pa.struct(
    {
        "entity_group": TEXT,
        "word": TEXT,
        "start": pa.int64(),
        "end": pa.int64(),
        "score": pa.float64(),
    }
)
TYPES: Mapping[str, pa.DataType] = {
    FILE: pa.dictionary(pa.int32(), TEXT),
    ROW: pa.int64(),
    "label": TEXT,
    "score": pa.float64(),
    "labels": pa.list_(TEXT),
    "value": pa.float64(),
    "entities": pa.list_(ENTITY),
    "generated": TEXT,
    "probabilities": pa.map_(TEXT, pa.float64()),
}
# The keys of each task's answers besides the texts.
KEYS: Mapping[str, Sequence[str]] = {
    "sequence_classification": ("label", "score", "probabilities"),
    "multi_label_classification": ("labels", "probabilities"),
    "ordinal_classification": ("label", "score", "probabilities"),
    "sequence_regression": ("value",),
    "token_classification": ("entities",),
    "text2text_ner": ("entities", "generated"),
    "text2text_classification": ("label", "score", "generated", "probabilities"),
}


def answer_schema(tasks: Iterable[str], kept: Mapping[str, pa.DataType]) -> pa.Schema:
    """The columns of the answers that these tasks give: where the text stands, what is kept of its row, the answer."""
    keys = {key for task in tasks for key in KEYS[task]}
    answer = {key: type for key, type in TYPES.items() if key in keys}
    return pa.schema({FILE: TYPES[FILE], ROW: TYPES[ROW], **kept, **answer})


def write_answers(path: Path, records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write the records' columns that the schema has as one unit: Parquet, or JSON lines by the path's ending.

    Raises:
        DataError: a kept value is not of its column's type.
        OutputError: the file cannot be written.
    """
    if path.suffix == ".parquet":
        try:
            table = pa.Table.from_pylist(records, schema)
        except (pa.ArrowException, ValueError, TypeError) as err:
            raise DataError(f"{records[0][FILE]}: a column that is kept changes its type: {err}") from err
        with atomic_file(path) as unfinished:
            pq.write_table(table, unfinished)
    else:
        lines = ({name: record[name] for name in schema.names if name in record} for record in records)
        write_lines(path, lines)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines as one unit; dates and the like as text."""
    with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)


def check_ending(path: Path) -> None:
    """Raise an OutputError where a file of answers has an ending that says none of the formats it can have."""
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(
            f"--out {path}: answers are written as {', '.join(ENDINGS)}; choose one of these endings, or a folder"
        )


def stream_answers(path: Path, answers: Iterable[Mapping[str, Any]], tasks: Iterable[str], *, pairs: bool) -> None:
    """Write answers as one unit and as they come, in the format that the ending says.

    Columns are those of all the tasks. In .csv and .tsv a cell that is neither text nor number (probabilities, entities,
    several labels) is JSON.

    Raises:
        OutputError: the file cannot be written, or its ending says no format.
    """
    check_ending(path)
    ending = path.suffix.lower()
    schema = pa.schema([("text", TEXT), *[("pair", TEXT)] * pairs, *list(answer_schema(tasks, {}))[2:]])
    with atomic_file(path) as unfinished:
        if ending == ".parquet":
            rest = iter(answers)
            with pq.ParquetWriter(unfinished, schema) as writer:
                while some := list(islice(rest, GROUP)):
                    writer.write_table(pa.Table.from_pylist(some, schema))
            return
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            if ending in (".csv", ".tsv"):
                table = csv.writer(file, delimiter="," if ending == ".csv" else "\t", lineterminator="\n")
                table.writerow(schema.names)
                for answer in answers:
                    table.writerow([_cell(answer.get(name)) for name in schema.names])
            else:
                file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def as_text(value: Any) -> str | None:
    """A kept value of a file without types as a column of Parquet has it: text, or JSON of what is not text."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def count_records(path: Path) -> int:
    """The records of a file of answers, as far as its end says; 0 where there is no file."""
    if not path.exists():
        return 0
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as file:
        return sum(1 for _ in file)
