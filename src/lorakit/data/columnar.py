"""Columnar data: Parquet, Arrow's two forms, and data sets of the library `datasets`, which this file alone imports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.data.delimited import Row
from lorakit.data.text import read_bytes
from lorakit.errors import DataError, did_you_mean, first_line

READ_AHEAD = 2**20  # bytes of each column of a Parquet file; without it a whole row group is read at once


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; `where` counts rows from 1."""
    import pyarrow.parquet as pq  # late: 0.1 s that other formats do not need

    read_bytes(path)
    with _damage_told(path, "Parquet"):
        table = pq.read_table(path)
    return rows_of_batch(table, path)


def read_arrow(path: Path) -> Iterator[Row]:
    """Rows of an Arrow file (also called Feather) or stream; `where` counts rows from 1."""
    data = read_bytes(path)
    with _damage_told(path, "Arrow"):
        table = _reader(data).read_all()
    return rows_of_batch(table, path)


def parquet_batches(path: Path, start: int, columns: Sequence[str] | None, size: int) -> Iterator[tuple[int, Any]]:
    """Record batches of at most `size` rows from the row group on that holds row `start`, each with its first row's number."""
    import pyarrow.parquet as pq

    with _damage_told(path, "Parquet"), pq.ParquetFile(path, buffer_size=READ_AHEAD) as file:
        first = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if first + n_rows > start:
                position = first
                for batch in file.iter_batches(size, row_groups=[group], columns=_there(columns, file.schema_arrow)):
                    yield position, batch
                    position += batch.num_rows
            first += n_rows


def arrow_batches(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Any]]:
    """The record batches of an Arrow file or stream, mapped into memory, each with its first row's number."""
    import pyarrow as pa

    with _damage_told(path, "Arrow"), pa.memory_map(str(path)) as data:
        reader = _reader(data)
        files = hasattr(reader, "num_record_batches")
        first = 0
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if files else reader:
            yield first, batch if columns is None else batch.select(_there(columns, reader.schema))
            first += batch.num_rows


def schema_of(path: Path) -> Any:
    """The Arrow schema of a columnar file, where columns of class numbers are those of their names; None of other files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        with _damage_told(path, "Parquet"):
            schema = pq.read_schema(path)
    elif path.suffix.lower() in (".arrow", ".feather"):
        with _damage_told(path, "Arrow"), pa.memory_map(str(path)) as data:
            schema = _reader(data).schema
    else:
        return None
    named = [name for name, feature in _features(schema.metadata or {}).items() if "ClassLabel" in json.dumps(feature)]
    return pa.schema([field.with_type(pa.string()) if field.name in named else field for field in schema])


def _there(columns: Sequence[str] | None, schema: Any) -> list[str] | None:
    """Those of the columns that the file has; who reads a row says which one it lacks."""
    return None if columns is None else [name for name in columns if name in schema.names]


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
def _damage_told(path: Path, format: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as err:
        raise DataError(f"{path}: no {format} file: {first_line(err)}") from err


def rows_of_batch(table: Any, path: Path, first: int = 0) -> Iterator[Row]:
    """The rows of a table or a batch of it, of which the first one is number `first` of its file, counted from 0."""
    features = _features(table.schema.metadata or {})
    for number, values in enumerate(table.to_pylist(), start=first + 1):
        if features:
            values = {column: named_classes(value, features.get(column)) for column, value in values.items()}
        yield Row(values, f"{path}:{number}")


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


def read_hub(source: str, split: str) -> Iterator[Row]:
    """Rows of ID[:CONFIG][@REVISION][#SPLIT]; class numbers are given back as their names."""
    name, _, wanted = source.partition("#")
    name, _, revision = name.partition("@")
    name, _, config = name.partition(":")
    datasets = _library(source)
    try:
        found = datasets.load_dataset(name, config or None, revision=revision or None)
    except Exception as err:  # the library raises many kinds for an unknown id, a script, no network
        raise DataError(
            f"{source}: no such file, and the data set cannot be loaded from the hub: {first_line(err)}"
        ) from err
    yield from _rows(found, wanted or split, source)


def read_saved(folder: Path, split: str) -> Iterator[Row]:
    """Rows of a folder written by `save_to_disk`; a folder with several splits needs the right one to be there."""
    datasets = _library(str(folder))
    name, _, wanted = str(folder).partition("#")
    try:
        found = datasets.load_from_disk(name)
    except Exception as err:  # any damage inside the folder
        raise DataError(f"{folder}: no data set saved by `datasets`: {first_line(err)}") from err
    yield from _rows(found, wanted or split, str(folder))


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as err:
        raise DataError(f"{source}: reading data sets needs the extra: pip install 'lorakit[hub]'") from err
    datasets.disable_progress_bars()
    return datasets


def _rows(found: Any, split: str, source: str) -> Iterator[Row]:
    if isinstance(found, dict):
        if split not in found:
            raise DataError(f"{source}: no split {split!r}; {did_you_mean(split, found)}")
        found = found[split]
    features = found.features.to_dict()
    for number, values in enumerate(found, start=1):
        named = {column: named_classes(value, features[column]) for column, value in values.items()}
        yield Row(named, f"{source}:{number}")
