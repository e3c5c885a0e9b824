"""Columnar files: Parquet, and Arrow's own two forms. Class numbers get the names that `datasets` left in the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.data.tables import Row
from lorakit.data.text import read_bytes
from lorakit.errors import DataError


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; `where` counts rows from 1."""
    import pyarrow.parquet as pq  # late: 0.1 s that other formats do not need
    from pyarrow import ArrowException

    read_bytes(path)
    try:
        table = pq.read_table(path)
    except (ArrowException, OSError) as err:
        raise DataError(f"{path}: no Parquet file: {str(err).splitlines()[0]}") from err
    return _rows(table, path)


def read_arrow(path: Path) -> Iterator[Row]:
    """Rows of an Arrow file (also called Feather) or stream; `where` counts rows from 1."""
    import pyarrow as pa

    data = read_bytes(path)
    try:
        try:
            reader = pa.ipc.open_file(data)
        except pa.ArrowInvalid:  # `datasets` writes streams
            reader = pa.ipc.open_stream(data)
        table = reader.read_all()
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"{path}: no Arrow file: {str(err).splitlines()[0]}") from err
    return _rows(table, path)


def _rows(table: Any, path: Path) -> Iterator[Row]:
    features = _features(table.schema.metadata or {})
    for number, values in enumerate(table.to_pylist(), start=1):
        named = {column: named_classes(value, features.get(column)) for column, value in values.items()}
        yield Row(named, f"{path}:{number}")


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
