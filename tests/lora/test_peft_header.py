"""The check of a safetensors header before anything is allocated."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora import LoraConfig, add_adapter, load_adapter, save_adapter, select_targets
from lorakit.lora.peft_files import MAX_HEADER, MAX_TENSORS, read_header
from tests.tiny import tiny_bert

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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4))
def test_mutated_file_is_refused_or_read_as_the_library_reads_it(
    cut: int, flips: list[tuple[int, int]], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path, metadata={"format": "pt"})
    raw = bytearray(path.read_bytes())
    for place, value in flips:
        raw[place % len(raw)] = value
    path.write_bytes(raw[: len(raw) - cut])
    try:
        header = read_header(path)
    except AdapterError:
        return
    assert {key: info.shape for key, info in header.items()} == {k: tuple(t.shape) for k, t in load_file(path).items()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=300))
def test_random_bytes_are_refused(raw: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", b"{" + raw, raw)
    with pytest.raises(AdapterError, match="damaged"):
        read_header(path)


def test_absurd_rank_is_refused_without_allocating(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=("query",), modules_to_save=("classifier",))
    model = tiny_bert()
    add_adapter(model, config)
    save_adapter(model, tmp_path, config)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 10**9}))
    fresh = tiny_bert()
    tracemalloc.start()
    with pytest.raises(AdapterError, match="has shape"):
        load_adapter(fresh, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "pattern", ["([a-z.0-9]+)+X", "(([a-z.]+))+X", "(a|a)*b", "(.*query){9}", ".*" * 12 + "X", "x" * 1000]
)
def test_pattern_that_could_take_for_ever_is_refused_at_once(pattern: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="target_modules"):
        select_targets(tiny_bert(), LoraConfig(target_modules=pattern))
    assert time.perf_counter() - start < 1  # peft runs for over 40 s on the first


@pytest.mark.parametrize("pattern", [r".*\.(query|value)", r"bert\.encoder\.layer\.[01]\.attention\.self\.(query|key)"])
def test_usual_patterns_are_taken(pattern: str) -> None:
    assert select_targets(tiny_bert(), LoraConfig(target_modules=pattern))
