"""Memory of training as its data grow: preparing and 20 steps, with the training part held and read again for each pass.

`python benchmarks/large_training.py --rows 100_000 1_000_000`: Parquet shards of short synthetic texts and a random model of one
layer. Each run is a process of its own, whose VmHWM is its peak of resident memory, pages of mapped files counted; the
adapter of both ways must be the same to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic import WORDS, save_base

from lorakit.recipe import make_recipe
from lorakit.training.joint import keep_prefix
from lorakit.training.prepare import prepare
from lorakit.training.run import Run

SHARD = 50_000  # rows of a file
STEPS = 20


def save_rows(folder: Path, n: int) -> None:
    """Texts of 4 to 12 words, a shard at a time, and a thousand for validation."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number, size in enumerate([1000, *[SHARD] * (n // SHARD), *([n % SHARD] if n % SHARD else [])]):
        lengths = chance.integers(4, 13, size)
        words = np.array(WORDS)[chance.integers(len(WORDS), size=lengths.sum())]
        texts = [" ".join(own) for own in np.split(words, lengths.cumsum()[:-1])]
        labels = np.array(["bad", "good"])[chance.integers(2, size=size)]
        name = f"part-{number:05}.parquet" if number else "validation.parquet"
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / name)


def memory() -> dict[str, int]:
    """Megabytes of this process by what /proc calls them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return {name: int(kilobytes) // 1024 for name, kilobytes in found.items()}


def train(place: Path, cache: str) -> None:
    """What a process does, and its figures as a line of JSON."""
    data = {"train": str(place / "rows/part-*.parquet"), "validation": str(place / "rows/validation.parquet")}
    if cache:
        data["cache"] = cache
    raw = {
        "model": {"base": str(place / "base"), "dtype": "fp32"},
        "data": data,
        "lora": {"target_modules": ["query", "value"]},
        "train": {"max_steps": STEPS, "batch_size": 32},
    }
    figures: dict[str, Any] = {"before": memory()}
    began = time.perf_counter()
    prepared = prepare(make_recipe(raw))
    keep_prefix([prepared])
    figures |= {
        "prepare_cpu_s": round(time.process_time()),
        "prepare_s": round(time.perf_counter() - began),
        "prepared": memory(),
    }
    with tempfile.TemporaryDirectory() as folder:
        Run(prepared, Path(folder)).fit()
        weights = (Path(folder) / "adapter/adapter_model.safetensors").read_bytes()
    figures |= {"wall_s": round(time.perf_counter() - began), "end": memory()}
    print(json.dumps(figures | {"adapter": hashlib.sha256(weights).hexdigest()[:12]}))


def main() -> None:
    """Print a line of figures for each number of rows and each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=lambda text: int(text.replace("_", "")), nargs="+", default=[100_000])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("memory", "first", "again"), nargs="+", default=("memory", "first", "again"))
    asked = parser.parse_args()
    if asked.child:
        train(Path(asked.child[0]), asked.child[1])
        return
    for rows in asked.rows:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            place = Path(name)
            save_base(place / "base")
            save_rows(place / "rows", rows)
            adapters = set()
            for way in asked.only:
                cache = "" if way == "memory" else str(place / "cache")
                command = [sys.executable, __file__, "--child", name, cache]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                figures = json.loads(out.splitlines()[-1])
                adapters.add(figures["adapter"])
                print(json.dumps({"rows": rows, "way": way, **figures}), flush=True)
            if len(adapters) > 1:
                raise SystemExit(f"{rows} rows: the adapters differ: {adapters}")


if __name__ == "__main__":
    main()
