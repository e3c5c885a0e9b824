"""Damage done at random to the header of a safetensors file, from a seed. The tests do some of it; all 100,000 by

python -m tests.lora.fuzz 100000
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, deserialize

from lorakit.errors import AdapterError
from lorakit.lora.peft_files import read_header

DATA = bytes(24 + 16 + 4)
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.lora_A.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "a.lora_B.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [24, 40]},
    "classifier.bias": {"dtype": "F16", "shape": [2], "data_offsets": [40, 44]},
}
STRANGE: tuple[Any, ...] = (
    *(None, True, False, "", "F64", "I8", "\ud800", "\0", 0, -1, 1.5, 1e308, float("nan"), float("inf")),
    *(2**31, 2**63 - 1, 2**63, 2**64, 10**400, [], {}, [[]], [0], [-1, -1], [2, 3, 0], [1] * 2000, {"a": {}}),
)
TOKENS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\u0000",
    b"\xff",
    b"\xef\xbb\xbf",
    b" ",
    b"[" * 3000,
    b"9" * 5000,
    b"e9",
    b"-",
)


class Outcome(NamedTuple):
    """What became of the damaged files: how many were taken and refused, each reason, and the longest time."""

    accepted: int
    refused: int
    reasons: Counter[str]
    longest_s: float


def damaged(chance: random.Random) -> bytes:
    """One damaged file."""
    raw = json.dumps(_other_values(chance) if chance.random() < 0.5 else HEADER).encode()
    for _ in range(chance.choice((0, 1, 1, 2, 5))):
        raw = _other_bytes(chance, raw)
    length, data = len(raw), DATA
    if chance.random() < 0.1:
        length = chance.choice((0, 1, length - 1, length + 1, length + 44, 2**20, 2**31, 2**63, 2**64 - 1))
    if chance.random() < 0.1:
        data = chance.choice((b"", DATA[:-1], DATA + b"\0", DATA * 2))
    whole = length.to_bytes(8, "little") + raw + data
    return whole[: chance.randrange(len(whole))] if chance.random() < 0.05 else whole


def _other_values(chance: random.Random) -> Any:
    """The header with values, keys or whole entries exchanged."""
    header = copy.deepcopy(HEADER)
    for _ in range(chance.choice((1, 1, 2))):
        place, key = header, chance.choice([*header, "new"])
        while isinstance(place.get(key), dict) and chance.random() < 0.8:
            place = place[key]
            key = chance.choice([*place, "new"])
        if isinstance(place.get(key), list) and place[key] and chance.random() < 0.6:
            place[key][chance.randrange(len(place[key]))] = copy.deepcopy(chance.choice((*STRANGE, 1, 2, 24, 40, 44)))
        elif chance.random() < 0.2:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(chance.choice(STRANGE))
    return header


def _other_bytes(chance: random.Random, raw: bytes) -> bytes:
    """The text with a bit turned, or a piece taken out, doubled or put in."""
    at, end = sorted((chance.randrange(len(raw) + 1), chance.randrange(len(raw) + 1)))
    way = chance.randrange(4)
    if way == 0:
        return raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]
    if way == 1:
        return raw[:at] + raw[end:]
    return raw[:at] + (raw[at:end] if way == 2 else chance.choice(TOKENS)) + raw[at:]


def fuzz(count: int, folder: Path, seed: int = 0) -> Outcome:
    """Let `count` damaged files be read. What is taken must be what the safetensors library reads too.

    Raises whatever `read_header` raises besides an AdapterError, and an AssertionError where the two disagree.
    """
    chance, path = random.Random(seed), folder / "x.safetensors"
    reasons: Counter[str] = Counter()
    accepted, longest = 0, 0.0
    for _ in range(count):
        raw = damaged(chance)
        path.write_bytes(raw)
        start = time.thread_time()  # other processes share the machine
        try:
            found = read_header(path)
        except AdapterError as err:
            reasons[str(err).removeprefix(f"{path}: damaged: ")[:12]] += 1
        else:
            accepted += 1
            _compare(raw, found)
        longest = max(longest, time.thread_time() - start)
    return Outcome(accepted, count - accepted, reasons, longest)


def _compare(raw: bytes, found: Any) -> None:
    try:
        theirs = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in deserialize(raw)}
    except SafetensorError:
        return  # refused there, so refused by load_adapter
    assert {key: (info.dtype, info.shape) for key, info in found.items()} == theirs, raw


def main() -> None:
    """Fuzz as often as the command line says, and print what came of it."""
    count = int(sys.argv[1])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(count, Path(folder))
    print(
        f"{count:,} headers in {time.perf_counter() - start:.1f} s: {outcome.accepted:,} accepted, {outcome.refused:,} refused "
        f"for {len(outcome.reasons):,} reasons, none took more than {1000 * outcome.longest_s:.1f} ms of CPU time"
    )


if __name__ == "__main__":
    main()
