"""Data sets of the library `datasets`: an id on the hub, or a folder that it saved. The only file that imports it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.data.arrow import named_classes
from lorakit.data.tables import Row
from lorakit.errors import DataError, did_you_mean, first_line

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
