"""What a benchmark must know of its machine: time of a process, its memory, the speed of its matrix products, its name."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
GEMMS = ((768, 384, 1536), (768, 768, 3072))  # rows, d_in, d_out: feed-forward layers of MiniLM and of BERT-base
GEMM_SECONDS = 0.4  # of trying, per shape and dtype


@dataclass
class Spent:
    """What a stretch of work took. CPU time counts all threads of the process, and hardly feels its neighbours."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0  # the most memory that the process had in it
    added_mb: float = 0.0  # how far that is above what it had when the work began


@contextmanager
def measured(spent: Spent) -> Iterator[None]:
    """Add what the work in the context takes."""
    if CLEAR.exists():
        CLEAR.write_text("5")  # Linux: the highest memory is counted from here
    before = _memory_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    spent.wall_s += time.perf_counter() - wall
    spent.cpu_s += time.process_time() - cpu
    spent.peak_mb = max(spent.peak_mb, _memory_mb("VmHWM"))
    spent.added_mb = spent.peak_mb - before


def _memory_mb(key: str) -> float:
    """A line of the process's status, in MB; 0 where the system keeps none."""
    lines = STATUS.read_text(encoding="utf-8").splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), 0.0)


def gemm_peak() -> float:
    """FLOP a CPU second of the fastest matrix product at hand, of fp32 and bf16, on as many threads as the work had."""
    import torch

    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for rows, d_in, d_out in GEMMS:
            x, w = torch.ones(rows, d_in, dtype=dtype), torch.ones(d_in, d_out, dtype=dtype)
            end = time.process_time() + GEMM_SECONDS
            while time.process_time() < end:
                start = time.process_time()
                x @ w
                best = max(best, 2 * rows * d_in * d_out / (time.process_time() - start))
    return best


def about() -> str:
    """Versions, threads, what the processor can do, and the commit."""
    import peft
    import torch
    import transformers

    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")), "")
    units = [unit for unit in UNITS if f" {unit}" in flags]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    limits = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.endswith("_MAX_CPU_ISA")]
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"{torch.get_num_threads()} threads, {model or platform.machine()} ({', '.join([*units, *limits])}), "
        f"commit {git.stdout.strip() or 'unknown'}"
    )


@dataclass(frozen=True)
class Column:
    """A column of a report: a median over runs with their range, or the ratio of lorakit's to it."""

    title: str
    key: str
    form: str = "{:.0f}"
    spread: bool = False
    ratio: bool = False  # how many times lorakit's is this one's, pair by pair

    def cell(self, runs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> str:
        """What stands there for a system; nothing where it has no such value."""
        if any(self.key not in run for run in runs):
            return ""
        values = [run[self.key] for run in runs]
        if self.ratio:
            values = [
                own[self.key] / value for own, value in zip(ours, values, strict=False)
            ]  # a stopped benchmark has fewer
        text = self.form.format(statistics.median(values))
        low, high = self.form.format(min(values)), self.form.format(max(values))
        return f"{text} ({low} to {high})" if self.spread and low != high else text
