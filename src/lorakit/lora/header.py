"""What a safetensors file says it holds, checked before anything is allocated.

The safetensors library accepts duplicate keys (the last wins), headers of 100 MB and millions of empty tensors; a file from a
stranger should not. The format: 8 bytes of header length (little endian), a JSON header, the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.digest import open_regular
from lorakit.errors import AdapterError

MAX_HEADER = 1_000_000  # bytes; an adapter over every layer of BERT-large has 40,000
MAX_TENSORS = 10_000
MAX_VALUES = 10 * MAX_TENSORS
MAX_DIMENSIONS = 8  # the product of a hundred thousand sizes takes seconds
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes a value of the dtypes that are weights


class TensorInfo(NamedTuple):
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a file declares, its layout checked to the byte.

    Raises:
        AdapterError: the file is missing, is cut off or padded, or its header is no header of weights.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise AdapterError(f"{path}: damaged: a header of {length:,} bytes in a file of {size:,}")
            raw = file.read(length)
    except FileNotFoundError as err:
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise AdapterError(
                f"{pickled}: pickled weights can run code and are never read; save them as {path.name} where you trust them"
            ) from err
        raise AdapterError(f"{path.parent} is no adapter folder: it has no {path.name}") from err
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read: {err.strerror}") from err
    try:
        return _checked(_parsed(raw), size - 8 - length)
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as err:
        raise AdapterError(f"{path}: damaged: {err}") from err


def _parsed(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    # counted before they are parsed, which takes a hundred times as long
    if (tensors := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise ValueError(f"{tensors:,} tensors; an adapter has {MAX_TENSORS:,} at most")
    if raw.count(b",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values in the header")
    header = json.loads(raw, object_pairs_hook=_without_duplicates)
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ holds more than text")
    return dict(header)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in the header")
    return found


def _checked(header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    """The entries in the order of their data, which must fill the file without gap or overlap."""
    infos: dict[str, TensorInfo] = {}
    position = 0
    for key, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = _offsets(entry)
        if dtype not in WIDTHS:
            raise ValueError(f"{key} has dtype {dtype}; only {', '.join(WIDTHS)} are weights")
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"{key} has the shape {str(list(shape[:MAX_DIMENSIONS]))[:80]}")
        if begin != position or end - begin != math.prod(shape) * WIDTHS[dtype]:
            raise ValueError(f"{key}: its bytes {begin:,} to {end:,} do not fit its shape and its place")
        infos[key] = TensorInfo(dtype, shape)
        position = end
    if position != data_bytes:
        raise ValueError(f"{data_bytes:,} bytes of tensors where the header says {position:,}")
    return infos


def _offsets(entry: Mapping[str, Any]) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int:
        raise TypeError("data_offsets are no whole numbers")
    return begin, end
