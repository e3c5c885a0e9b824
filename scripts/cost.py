"""What a run of several processes costs: measured here, and by a model beyond. docs/cost.md is made of what it prints.

python scripts/cost.py measure --base minilm     tokens/s of 1 and 2 processes, and what goes over the wire in a step
python scripts/cost.py model                     seconds of a step by processes, and what 1,000 adapters on 8 GPUs take
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import lorakit

ROUNDS, SHORT, LONG = 3, 4, 24  # steps; what a start costs is in both, and so not in their difference
DEMO = Path(lorakit.__file__).parent / "demo"
BATCH, ROWS = 64, {"train": 1024, "validation": 32}
FP32 = 4  # bytes of a gradient


# The model


@dataclass(frozen=True)
class Job:
    """A run of one adapter."""

    parameters: int  # trained
    batch_tokens: int  # of a step, over all processes, real ones
    steps: int
    evaluation_tokens: int = 0  # of one evaluation
    evaluations: int = 1


@dataclass(frozen=True)
class Machine:
    """A process with its device, and what joins it to the others."""

    tokens_per_s: float  # of training, one process alone at a large batch
    floor_s: float  # what a step takes however few its tokens: kernels' starts, the optimizer, Python
    bytes_per_s: float  # that one process sends, and at the same time receives
    latency_s: float  # of one message
    small_collectives: int = 4  # of a step, besides the gradients': counts, the wish to stop
    evaluation_speed: float = 3.0  # tokens/s of evaluation over those of training: there is no backward


class Seconds(NamedTuple):
    """Where the time of a step goes."""

    compute: float
    gradients: float  # their all-reduce
    latency: float

    @property
    def total(self) -> float:
        """All of it; nothing overlaps, since an adapter's gradients are complete only after the last backward."""
        return sum(self)


def wire_bytes(parameters: int, processes: int) -> float:
    """What each process sends in a step: a ring all-reduce of the gradients, 2 (p - 1) / p of their bytes."""
    return 2 * (processes - 1) / processes * parameters * FP32


def step_seconds(job: Job, machine: Machine, processes: int) -> Seconds:
    """A step of several processes: compute / p, with a floor; a ring's bytes; a ring's 2 (p - 1) messages, and small ones."""
    compute = max(machine.floor_s, job.batch_tokens / processes / machine.tokens_per_s)
    messages = 2 * (processes - 1) * (1 + machine.small_collectives)
    return Seconds(compute, wire_bytes(job.parameters, processes) / machine.bytes_per_s, messages * machine.latency_s)


def run_seconds(job: Job, machine: Machine, processes: int) -> float:
    """A whole run, its start left out; evaluation is shared too."""
    speed = machine.tokens_per_s * machine.evaluation_speed * processes
    return job.steps * step_seconds(job, machine, processes).total + job.evaluations * job.evaluation_tokens / speed


def efficiency(job: Job, machine: Machine, processes: int) -> float:
    """Speed over that of one process times their number."""
    return step_seconds(job, machine, 1).total / (processes * step_seconds(job, machine, processes).total)


def most_processes(job: Job, machine: Machine, least: float = 0.5) -> int:
    """Where it stops: the most processes, in powers of two, of which at least half the work is not lost."""
    processes = 1
    while processes < 2**12 and efficiency(job, machine, 2 * processes) >= least:
        processes *= 2
    return processes


def many_adapters_seconds(job: Job, machine: Machine, adapters: int, devices: int, packed: int) -> float:
    """Many adapters on several devices, `packed` of them in one joint run a device: no wire at all, and one floor for all."""
    joint = replace(job, batch_tokens=job.batch_tokens * packed, evaluation_tokens=job.evaluation_tokens * packed)
    rounds = -(-adapters // (devices * packed))
    return rounds * run_seconds(joint, machine, 1)


# Figures that nobody has measured here: assumptions, to be replaced by one's own
BERT_BASE = Job(parameters=296_450, batch_tokens=32 * 128, steps=3 * 313, evaluation_tokens=1_000 * 128, evaluations=3)
A100 = Machine(tokens_per_s=150_000, floor_s=0.03, bytes_per_s=100e9, latency_s=15e-6)
ETHERNET = replace(A100, bytes_per_s=1.1e9, latency_s=60e-6)
PRICE = 2.0  # dollars a GPU and hour
PACKED, START_S = 32, 30.0


def show_model() -> None:
    """Print the tables of docs/cost.md that no machine was needed for."""
    large = replace(BERT_BASE, batch_tokens=8 * BERT_BASE.batch_tokens)  # 256 examples
    print("| processes | compute ms | all-reduce ms | latency ms | tokens/s | efficiency | MB sent in a step |")
    print("|---|---|---|---|---|---|---|")
    for name, machine in (("one machine (NVLink)", A100), ("10 Gbit/s Ethernet", ETHERNET)):
        print(f"| {name} | | | | | | |")
        for processes in (1, 2, 4, 8, 16, 32):
            took = step_seconds(large, machine, processes)
            row = [*(f"{1e3 * part:.2f}" for part in took), f"{large.batch_tokens / took.total:,.0f}"]
            row += [f"{efficiency(large, machine, processes):.0%}"]
            row += [f"{wire_bytes(large.parameters, processes) / 1e6:.2f}"]
            print(f"| {processes} | {' | '.join(row)} |")
        for batch in (1, 8, 64):
            larger = replace(BERT_BASE, batch_tokens=BERT_BASE.batch_tokens * batch)
            print(f"batches of {32 * batch}: half of it is lost beyond {most_processes(larger, machine)} processes")
    for packed in (1, PACKED):
        seconds = many_adapters_seconds(BERT_BASE, A100, 1000, 8, packed) + START_S * -(-1000 // (8 * packed))
        hours = 8 * seconds / 3600
        print(
            f"1,000 adapters on 8 GPUs, {packed} at once on each: {seconds / 3600:.2f} h, {hours * PRICE:,.0f} dollars"
        )


# Measuring


class Measured(NamedTuple):
    """What a run took."""

    seconds: float  # of training
    cpu: float  # seconds, of all processes together
    wire: int  # bytes through the loopback device, of all processes together
    trained: int  # parameters


def measure_one(base: str, processes: int, steps: int, folder: Path) -> Measured:
    """A run in a network of its own, whose loopback device carries nothing else."""
    words = {
        "model.base": base,
        "model.dtype": "fp32",
        "data.train": folder.parent / "train.csv",
        "data.validation": folder.parent / "validation.csv",
        "train.batch_size": BATCH,
        "train.max_steps": steps,
        "train.eval_every": steps,
        "output.dir": folder,
    }
    recipe = folder.parent / "recipe.toml"
    recipe.touch()
    said = " ".join(f"'{key}={value}'" for key, value in words.items())
    train = f"'{sys.executable}' -m lorakit train '{recipe}' {said} --nproc {processes} >/dev/null"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = f"ip link set lo up && {train} && cat /proc/net/dev"
    told = subprocess.run(
        ["unshare", "--net", "sh", "-c", command],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    (sent,) = (int(line.split()[9]) for line in told.splitlines() if line.strip().startswith("lo:"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    scores = json.loads((folder / "scores.json").read_text())
    return Measured(scores["train_seconds"], cpu, sent, scores["parameters"]["trainable"])


def mean_tokens(base: str, place: Path) -> float:
    """Of an example, as the model reads it."""
    from lorakit.recipe import make_recipe
    from lorakit.training.prepare import prepare

    data = {name: str(place / f"{name}.csv") for name in ROWS}
    return statistics.fmean(prepare(make_recipe({"model": {"base": base}, "data": data})).plan.lengths)


def measure(base: str) -> None:
    """Print tokens/s, efficiency and bytes of a step: medians of interleaved rounds, each the difference of two runs."""
    found: dict[int, list[Measured]] = {1: [], 2: []}
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for part, rows in ROWS.items():
            lines = (DEMO / f"reviews-{part}.csv").read_text(encoding="utf-8").splitlines()[: 1 + rows]
            (place / f"{part}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokens = mean_tokens(base, place) * BATCH
        for number in range(ROUNDS):
            for processes in found:
                runs = []
                for steps in (SHORT, LONG):
                    runs.append(measure_one(base, processes, steps, place / "run"))
                    shutil.rmtree(place / "run")
                short, long = runs
                each = Measured(*(a - b for a, b in zip(long[:3], short[:3], strict=True)), long.trained)
                found[processes].append(each)
                print(f"round {number}, {processes} processes: {each}", file=sys.stderr, flush=True)
            one, two = found[1][-1], found[2][-1]
            ratios.append((one.seconds / two.seconds, one.cpu / two.cpu))
    count = LONG - SHORT
    for processes, rows in found.items():
        seconds = statistics.median(row.seconds for row in rows) / count
        sent = statistics.median(row.wire for row in rows) / count / processes
        print(
            f"{processes} processes: {tokens / seconds:,.0f} tokens/s, {seconds:.3f} s a step, {sent:,.0f} bytes sent by each"
        )
    size = found[2][0].trained * FP32
    sent = statistics.median(row.wire for row in found[2]) / count / 2
    print(f"adapter: {found[2][0].trained:,} parameters, {size:,} bytes; sent over that: {sent / size:.4f}")
    for what, values in zip(("speed", "work done in a second of CPU"), zip(*ratios, strict=True), strict=True):
        said = ", ".join(f"{value:.2f}" for value in values)
        print(f"{what}, 2 processes over 1: {statistics.median(values):.2f} ({said})")


def main() -> None:
    """Measure, or show the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "model"))
    parser.add_argument("--base", default="minilm")
    given = parser.parse_args()
    measure(given.base) if given.what == "measure" else show_model()


if __name__ == "__main__":
    main()
