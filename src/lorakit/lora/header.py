"""What a safetensors file says it holds, checked before anything is allocated.

The layout is the library's to check; what it lets pass, and a foreign file should not have, is refused here: keys that stand
twice (the last wins), headers of 100 MB, millions of empty tensors, dtypes that are not weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lorakit.digest import open_regular
from lorakit.errors import AdapterError

MAX_HEADER = 1_000_000  # bytes; an adapter over every layer of BERT-large has 40,000
MAX_TENSORS = 10_000
MAX_VALUES = 10 * MAX_TENSORS
DTYPES = ("F64", "F32", "F16", "BF16")


class TensorInfo(NamedTuple):
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a file declares.

    Raises:
        AdapterError: the file is missing, is cut off or padded, or its header is not one of weights.
    """
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
                raise AdapterError(f"{path}: damaged: a header of {length:,} bytes")
            _check(file.read(length))
        with safe_open(path, "pt") as tensors:
            slices = ((key, tensors.get_slice(key)) for key in tensors.keys())  # noqa: SIM118 (it is not a mapping)
            header = {key: TensorInfo(entry.get_dtype(), tuple(entry.get_shape())) for key, entry in slices}
        if other := [f"{key} has dtype {info.dtype}" for key, info in header.items() if info.dtype not in DTYPES]:
            raise ValueError(f"{other[0]}; only {', '.join(DTYPES)} are weights")
    except FileNotFoundError as err:
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise AdapterError(
                f"{pickled}: pickled weights can run code and are never read; save them as {path.name} where you trust them"
            ) from err
        raise AdapterError(f"{path.parent} is not an adapter folder: it has no {path.name}") from err
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read: {err.strerror}") from err
    except (SafetensorError, ValueError, RecursionError) as err:
        told = str(err)[:300].encode("unicode_escape").decode()  # it may quote the file, whatever that holds
        raise AdapterError(f"{path}: damaged: {told}") from err
    return header


def _check(raw: bytes) -> None:
    # counted before they are parsed, which takes a hundred times as long
    if (tensors := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise ValueError(f"{tensors:,} tensors; an adapter has {MAX_TENSORS:,} at most")
    if raw.count(b",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values in the header")

    def each_once(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice in the header")

    json.loads(raw, object_pairs_hook=each_once)
