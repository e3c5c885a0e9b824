"""Score millions of rows with `lorakit predict --out FOLDER`, kill it at random moments, and check every row afterwards.

`python benchmarks/batch_scoring.py --rows 10_000_000 --kills 10`: Parquet files of synthetic short texts, a random model of one
layer, SIGKILL at random moments, the same command again until it ends. Then: each id once, the answers to a sample those of a
plain `Predictor`, the peak memory of the processes (VmHWM), rows a second of those that were not killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic import WORDS, save_base

from lorakit.data.example import Columns
from lorakit.inference.adapter_folder import Side, write_side
from lorakit.inference.predictor import load
from lorakit.inference.side import Base
from lorakit.lora import BaseInfo, LoraConfig, add_adapter, save_adapter
from lorakit.models import load_base
from lorakit.recipe import TaskSection

GROUP = 250_000  # rows of a row group, more than are ever held
SAMPLE = 1000
LABELS = ("bad", "good")


def save_run(folder: Path) -> Path:
    """A random adapter over a random BERT of one layer."""
    save_base(folder / "base", initializer_range=0.5)
    task = TaskSection(name="sequence_classification")
    base = load_base(str(folder / "base"), "sequence_classification", labels=LABELS)
    adapter = LoraConfig(target_modules=("query", "value"), modules_to_save=base.saved_modules)
    add_adapter(base.model, adapter, seed=0)
    save_adapter(base.model, folder / "run", adapter, BaseInfo(base.name, None, base.kind.peft_task_type))
    base_facts = Base.of(base.name, None, base.fingerprint)
    side = {"task": task.model_dump(), "labels": list(LABELS), "max_length": 32, "base": base_facts, "dtype": "fp32"}
    write_side(folder / "run", Side.model_validate({**side, "method": "lora", "columns": Columns()}))
    return folder / "run"


def texts(start: int, n: int) -> list[str]:
    """Row i's text, which says i."""
    generator = np.random.default_rng(start)
    words = np.array(WORDS)[generator.integers(len(WORDS), size=(n, 12))]
    sizes = generator.integers(2, 13, size=n)
    return [" ".join(row[:size]) for row, size in zip(words.tolist(), sizes.tolist(), strict=True)]


def write_input(folder: Path, rows: int, files: int) -> None:
    """Parquet files of about as many rows each."""
    borders = [rows * i // files for i in range(files + 1)]
    for number, (begin, end) in enumerate(pairwise(borders)):
        schema = pa.schema({"id": pa.int64(), "text": pa.string()})
        with pq.ParquetWriter(folder / f"part-{number:03}.parquet", schema) as writer:
            for start in range(begin, end, GROUP):
                n = min(GROUP, end - start)
                writer.write_table(pa.table([pa.array(range(start, start + n)), texts(start, n)], schema=schema))


def peak_mb(process: int) -> float:
    """VmHWM of a process in MB, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def watch(command: list[str], out: Path, seconds: float) -> tuple[int | None, float]:
    """Run a command and kill it so many seconds after it has the folder; its exit code, None if killed, and its peak memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak, end, lock = 0.0, float("inf"), out / ".lock"
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
        if end == float("inf") and lock.exists() and f"process {process.pid} " in lock.read_text():
            end = time.monotonic() + seconds
        peak = max(peak, peak_mb(process.pid))
    if process.poll() is None:
        process.kill()
        process.wait()
        return None, peak
    return process.returncode, peak


def shards_of(out: Path) -> list[Path]:
    """The published shards, in the order of the input."""
    return sorted(out.glob("part-*.parquet"))


def check(run: Path, folder: Path, out: Path, rows: int) -> str:
    """Every id once, and a sample's answers as a plain predictor gives them; what was seen, in words."""
    seen = np.zeros(rows, np.int32)
    scores = np.zeros(rows)
    for shard in shards_of(out):
        table = pq.read_table(shard)
        ids = table["id"].to_numpy()
        np.add.at(seen, ids, 1)
        scores[ids] = [dict(p)["good"] for p in table["probabilities"].to_pylist()]
    chosen = sorted(random.Random(1).sample(range(rows), min(SAMPLE, rows)))
    wanted = set(chosen)
    found: dict[int, str] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(65536):
            found |= {i: t for i, t in zip(*(batch[c].to_pylist() for c in ("id", "text")), strict=True) if i in wanted}
    answers = load(run).predict([found[i] for i in chosen])
    off = max(abs(a["probabilities"]["good"] - scores[i]) for i, a in zip(chosen, answers, strict=True))
    once, never, twice = int((seen == 1).sum()), int((seen == 0).sum()), int((seen > 1).sum())
    return (
        f"{once:,} of {rows:,} rows once, {never:,} never, {twice:,} more than once; "
        f"a sample of {len(chosen)} differs from a plain predictor's by {off:.1e} at most"
    )


def main() -> None:
    """Write, score, kill, check, and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--rate", type=float, default=2000, help="rows a second to be expected, which spreads the kills"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance, peak, kills, begun = random.Random(given.seed), 0.0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = save_run(folder)
        write_input(folder, given.rows, given.files)
        print(f"input written after {time.monotonic() - begun:.0f} s", flush=True)
        out = folder / "out"
        pattern = str(folder / "part-*.parquet")
        options = ["--out", str(out), "--keep", "id", "--json"]
        command = [sys.executable, "-m", "lorakit", "predict", str(run), "--file", pattern, *options]
        begun = time.monotonic()
        code: int | None = None
        while code is None:
            before = len(shards_of(out)) if out.exists() else 0
            mean = given.rows / given.rate / (given.kills + 1)
            code, here = watch(command, out, chance.uniform(0, 2) * mean if kills < given.kills else 1e9)
            peak = max(peak, here)
            kills += code is None
            left = [path.name for path in out.glob(".tmp-*")] if out.exists() else []
            what = "killed" if code is None else f"ended with {code}"
            found = len(shards_of(out)) if out.exists() else 0
            print(
                f"{what} after {time.monotonic() - begun:.0f} s: {found - before} shards, half written: {left}",
                flush=True,
            )
        seconds = time.monotonic() - begun
        totals = json.loads((out / "_SUCCESS.json").read_text())
        print({key: totals[key] for key in ("rows", "answered", "rejected")})
        print(check(run, folder, out, given.rows))
        print(f"{kills} kills, {seconds:.0f} s, {given.rows / seconds:.0f} rows/s, peak {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
