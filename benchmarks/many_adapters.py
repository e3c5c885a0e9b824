"""256 adapters over one MiniLM: mixed batches against one adapter's, and what loading one more costs those who are served.

    python benchmarks/many_adapters.py [--adapters 256] [--rows 2048] [--rounds 5] [--dora] [--out FILE]

Rounds of the two are interleaved, and a figure is the median over rounds with the extremes beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1]))

from tests.shipped import ship

from lorakit.data.example import Example
from lorakit.inference import answer
from lorakit.inference.adapter_folder import Side, write_side
from lorakit.inference.adapter_pool import AdapterPool, Query
from lorakit.inference.side import read_facts
from lorakit.lora.peft_files import WEIGHTS_FILE

LENGTHS = (4, 8, 12, 16, 24, 32)  # words of a text, by chance
WORDS = ("the", "film", "was", "a", "rather", "moving", "story", "of", "two", "people", "who", "never", "meet", "and")
LABELS = ("bad", "good")


def texts(n: int) -> list[str]:
    """n texts of random words and lengths."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.choice(LENGTHS))) for _ in range(n)]


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def throughput(pool: AdapterPool, names: Sequence[str], some: Sequence[str], rounds: int) -> dict[str, Any]:
    """Texts a second by one adapter and by all, each adapter with as many texts, and the ratio of a round's two."""
    alone = [Query(names[0], Example(text)) for text in some]
    mixed = [Query(names[i % len(names)], Example(text)) for i, text in enumerate(some)]
    for queries in (alone, mixed):
        pool.answer(queries[:256])  # warm up
    times: dict[str, list[float]] = {"alone": [], "mixed": []}
    for _ in range(rounds):
        times["alone"].append(seconds(lambda: pool.answer(alone)))
        times["mixed"].append(seconds(lambda: pool.answer(mixed)))
    ratios = [a / m for a, m in zip(times["alone"], times["mixed"], strict=True)]
    rates = {f"{name}_texts_per_s": spread([len(some) / t for t in found]) for name, found in times.items()}
    return {**rates, "ratio": spread(ratios)}


def stalls(pool: AdapterPool, names: Sequence[str], folders: Sequence[Path], some: Sequence[str]) -> dict[str, Any]:
    """Milliseconds that loading takes beside nothing and beside answers, and gaps between forwards with and without it."""
    mixed = [Query(names[i % len(names)], Example(text)) for i, text in enumerate(some)]
    idle: list[float] = []
    cpu: list[float] = []
    for folder in folders[: len(folders) // 2]:  # in this thread, whose CPU time can be told
        before = time.thread_time()
        idle.append(1000 * seconds(lambda name=folder.name: pool._load(name)))
        cpu.append(1000 * (time.thread_time() - before))
    ends: list[float] = []
    forward = answer._forward

    def timed(*args: Any) -> list[Any]:
        raws = forward(*args)
        ends.append(time.perf_counter())
        return raws

    answer._forward = timed
    gaps: dict[str, list[float]] = {}
    busy: list[float] = []
    for state in ("quiet", "loading"):
        ends.clear()
        asking = threading.Thread(target=lambda: [pool.answer(mixed) for _ in range(2)])
        asking.start()
        for folder in folders[len(folders) // 2 :] if state == "loading" else ():
            time.sleep(0.1)
            busy.append(1000 * seconds(lambda name=folder.name: pool.load(name).result()))
        asking.join()
        gaps[state] = [1000 * (b - a) for a, b in pairwise(ends)]
    answer._forward = forward
    return {
        "load_ms_idle": spread(idle),
        "load_cpu_ms_idle": spread(cpu),
        "load_ms_beside_answers": spread(busy),
        **{f"gap_ms_{state}": spread(found) for state, found in gaps.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    extra = 16
    with tempfile.TemporaryDirectory() as place:
        folders = ship_many(Path(place), options.base, options.adapters + extra, options.dora)
        with AdapterPool({folder.name: folder for folder in folders}) as pool:
            names = [folder.name for folder in folders[: options.adapters]]
            for name in names:
                pool.load(name).result()
            gc.freeze()  # as the server does
            some = texts(options.rows)
            found = {
                "adapters": options.adapters,
                "threads": torch.get_num_threads(),
                "megabytes": pool.size / 1e6,
                **throughput(pool, names, some, options.rounds),
                **stalls(pool, names, folders[options.adapters :], some),
            }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def ship_many(place: Path, base: str, n: int, dora: bool) -> list[Path]:
    """Adapters of three ranks that differ in values; the first three are made, the others drawn in their form."""
    task, ranks = "sequence_classification", (4, 8, 16)
    made = [ship(place / f"a{i:03}", Path(base), task, LABELS, seed=i, r=r, use_dora=dora) for i, r in enumerate(ranks)]
    return made + [varied(made[i % 3], place / f"a{i:03}", i) for i in range(3, n)]


def varied(folder: Path, other: Path, seed: int) -> Path:
    """A copy of an adapter with noise in its values."""
    shutil.copytree(folder, other)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(other / WEIGHTS_FILE)
    noisy = {key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    save_file(noisy, other / WEIGHTS_FILE, metadata={"format": "pt"})
    write_side(other, read_facts(other, Side))
    return other


if __name__ == "__main__":
    main()
