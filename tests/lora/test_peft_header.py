"""The check of a safetensors header before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import AdapterError
from lorakit.lora.peft_files import MAX_HEADER, MAX_TENSORS, read_header

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_header_equals_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(1, dtype=torch.float16)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    assert {key: info.shape for key, info in read_header(path).items()} == {k: t.shape for k, t in tensors.items()}


DAMAGED = {
    "empty file": b"",
    "seven bytes": b"\1" * 7,
    "length beyond the file": (2**63).to_bytes(8, "little") + b"{}",
    "length above the limit": (MAX_HEADER + 1).to_bytes(8, "little") + b" " * (MAX_HEADER + 1),
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_file_without_a_header_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(AdapterError, match="damaged"):
        read_header(path)


BAD_HEADERS = {
    "no JSON": b"{",
    "leading space": b' {"w": 1}',
    "invalid UTF-8": b'{"\xff": 1}',
    "nested without end": b"[" * 5000,
    "a list": [],
    "entry no object": {"w": 1},
    "key twice": b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "integers": {"w": {**ENTRY, "dtype": "I32"}},
    "complex": {"w": {**ENTRY, "dtype": "C64", "shape": [1]}},
    "dtype of control characters": {"w": {**ENTRY, "dtype": "\x1b[31m\n" * 500}},
    "name of control characters": {"\x1b[31m\n": {**ENTRY, "dtype": "I32"}},
    "negative shape": {"w": {**ENTRY, "shape": [-2]}},
    "huge shape": {"w": {**ENTRY, "shape": [0, 2**63 - 1]}},
    "shape too large": {"w": {**ENTRY, "shape": [3]}},
    "overlap": {"v": ENTRY, "w": ENTRY},
    "gap": {"w": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}},
    "trailing bytes": {"w": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}},
    "offsets no numbers": {"w": {**ENTRY, "data_offsets": [0.0, 8.0]}},
    "offsets beyond 64 bits": {"w": {**ENTRY, "data_offsets": [0, 2**64 + 8]}},
    "shape beyond 64 bits": {"w": {**ENTRY, "shape": [2**32, 2**32]}},
    "offsets turned round": {"w": {**ENTRY, "data_offsets": [8, 0]}},
    "hole between tensors": {
        "v": {**ENTRY, "dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
        "w": {**ENTRY, "shape": [1], "data_offsets": [4, 8]},
    },
    "metadata of numbers": {"__metadata__": {"format": 1}, "w": ENTRY},
    "offsets missing": {"w": {"dtype": "F32", "shape": [2]}},
    "too many tensors": {str(i): {**ENTRY, "shape": [1]} for i in range(MAX_TENSORS + 1)},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header_is_refused(header: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="damaged") as caught:
        read_header(written(tmp_path / "x.safetensors", header))
    assert str(caught.value).isprintable()
