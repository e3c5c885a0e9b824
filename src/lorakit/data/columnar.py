"""Columnar data: Parquet, Arrow's two forms, and data sets of the library `datasets`, which this file alone imports."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.data.delimited import Row
from lorakit.data.example import Columns
from lorakit.data.text import opened
from lorakit.errors import DataError, did_you_mean, first_line

READ_AHEAD = 2**20  # bytes of each column of a Parquet file; without it a whole row group is read at once
BATCH = 4096  # rows that are turned into Python's objects together


def read_parquet(
    path: Path,
    options: Columns = Columns(),
    notes: list[str] | None = None,
    start: int = 0,
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Rows of a Parquet file from the row group on that holds row `start`, of these columns; `where` counts rows from 1."""
    import pyarrow.parquet as pq  # late: 0.1 s that other formats do not need

    with _checked(path, "Parquet"), pq.ParquetFile(path, buffer_size=READ_AHEAD) as file:
        present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > start:
                batches = file.iter_batches(BATCH, row_groups=[group], columns=present)
                yield from _rows_of_batches(batches, path, first, start)
            first = end


def read_arrow(
    path: Path,
    options: Columns = Columns(),
    notes: list[str] | None = None,
    start: int = 0,
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """The same of an Arrow file (also called Feather) or stream, which is mapped into memory."""
    import pyarrow as pa

    with _checked(path, "Arrow"), pa.memory_map(str(path)) as data:
        reader = _reader(data)
        is_file = hasattr(reader, "num_record_batches")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        if columns is not None:
            present = [name for name in columns if name in reader.schema.names]
            batches = (batch.select(present) for batch in batches)
        yield from _rows_of_batches(batches, path, 0, start)


def _rows_of_batches(batches: Iterable[Any], path: Path, first: int, start: int) -> Iterator[Row]:
    """The rows of record batches from row `start` on; `first` is the number of their first row. Both count from 0."""
    for batch in batches:
        features = _features(batch.schema.metadata or {})
        for begin in range(max(0, start - first), batch.num_rows, BATCH):
            yield from _rows(batch.slice(begin, BATCH).to_pylist(), features, str(path), first + begin)
        first += batch.num_rows


def schema_of(path: Path) -> Any:
    """The Arrow schema of a columnar file, where columns of class numbers are those of their names; None of other files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        with _checked(path, "Parquet"):
            schema = pq.read_schema(path)
    elif path.suffix.lower() in (".arrow", ".feather"):
        with _checked(path, "Arrow"), pa.memory_map(str(path)) as data:
            schema = _reader(data).schema
    else:
        return None
    named = [name for name, feature in _features(schema.metadata or {}).items() if "ClassLabel" in json.dumps(feature)]
    return pa.schema([field.with_type(pa.string()) if field.name in named else field for field in schema])


def _reader(data: Any) -> Any:
    """A reader of an Arrow file's bytes; `datasets` writes streams."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(data)
    except pa.ArrowInvalid:
        if hasattr(data, "seek"):
            data.seek(0)
        return pa.ipc.open_stream(data)


@contextmanager
def _checked(path: Path, format: str) -> Iterator[None]:
    """A block in which whatever reading a columnar file meets becomes a DataError."""
    from pyarrow import ArrowException

    with opened(path) as file:
        if not file.read(1):
            raise DataError(f"{path}: the file is empty")
        try:
            yield
        except (ArrowException, OSError) as err:
            raise DataError(f"{path}: not a valid {format} file: {first_line(err)}") from err


def _rows(records: Iterable[Mapping[str, Any]], features: Mapping[str, Any], source: str, first: int) -> Iterator[Row]:
    """Records as rows, class numbers as their names; `first` is the number of the first one, from 0."""
    for number, values in enumerate(records, start=first + 1):
        if features:
            values = {column: named_classes(value, features.get(column)) for column, value in values.items()}
        yield Row(values, f"{source}:{number}")


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """What the library `datasets` noted of each column when it wrote the file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def named_classes(value: Any, feature: Any) -> Any:
    """A value with class numbers, in lists and structs too, replaced by their names; a number without a name by None."""
    if isinstance(feature, list):
        feature = {"feature": feature[0]}
    if not isinstance(feature, Mapping) or value is None:
        return value
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names") or []
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
    if isinstance(value, list):
        return [named_classes(item, feature.get("feature")) for item in value]
    if isinstance(value, dict):
        return {key: named_classes(item, feature.get(key)) for key, item in value.items()}
    return value


SOURCE = "ID[:CONFIG][@REVISION][#SPLIT]"
HUB_TIMEOUT_S = 4.0


@contextmanager
def _offline_if_out_of_reach() -> Iterator[None]:
    """A block in which a hub that does not answer or fails is not asked: its library would retry for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not (before or os.environ.get("HF_HUB_OFFLINE", "0") != "0"):
            urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as err:
        constants.HF_HUB_OFFLINE = err.code >= 500  # any other error is an answer
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (ConnectionError, FileNotFoundError) as err:
        if not constants.HF_HUB_OFFLINE and isinstance(err, FileNotFoundError):
            raise
        raise ConnectionError("not in its cache, and the hub cannot be reached") from err
    finally:
        constants.HF_HUB_OFFLINE = before


def read_datasets(source: str, split: str, *, is_saved: bool = False) -> Iterator[Row]:
    """Rows that the library `datasets` reads: of `SOURCE` from the hub, or of FOLDER[#SPLIT] that `save_to_disk` wrote."""
    try:
        import datasets
    except ImportError as err:
        raise DataError(f"{source}: reading data sets needs the extra: pip install 'lorakit[hub]'") from err
    datasets.disable_progress_bars()
    name, _, named = source.partition("#")
    split = named or split
    try:
        if is_saved:
            table = datasets.load_from_disk(name)
        else:
            name, _, revision = name.partition("@")
            name, _, config = name.partition(":")
            with _offline_if_out_of_reach():
                table = datasets.load_dataset(name, config or None, revision=revision or None)
    except Exception as err:  # the library raises many kinds: for an unknown id, a script, no network, a damaged file
        what = "no such file, and the data set cannot be loaded from the hub"
        what = "no data set saved by `datasets`" if is_saved else what
        raise DataError(f"{source}: {what}: {first_line(err)}") from err
    if isinstance(table, dict):
        if split not in table:
            raise DataError(f"{source}: no split {split!r}; {did_you_mean(split, table)}")
        table = table[split]
    yield from _rows(table, table.features.to_dict(), source, 0)
