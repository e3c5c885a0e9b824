"""Speed and memory of lorakit beside what people use otherwise, on the same texts, models and adapters.

    python benchmarks/speed.py                               # bundled data; prints tables
    python benchmarks/speed.py --data DATA --write           # SST-2's sentences and T5's tokenizer; rewrites docs/benchmarks.md
    python benchmarks/speed.py --quick                       # a small version, in under 3 minutes
    python benchmarks/speed.py --profile minilm-qv b1        # which operators the time goes to
    python benchmarks/speed.py --out OUT --report --write    # what a stopped benchmark has so far

Every run is a process of its own; runs are interleaved (A B C A B C ...), since machines drift. Rates are those of CPU
time, which neighbours on the machine touch less, and each ratio is the median of those pair by pair. OUT keeps a file for
each run; one that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import speed_classification
import speed_embedding
import speed_prediction
import speed_text2text
from machine import about

FAMILIES: tuple[ModuleType, ...] = (speed_classification, speed_prediction, speed_text2text, speed_embedding)
FAMILY = {name: family for family in FAMILIES for name in family.SCENARIOS}
QUICK = {"minilm-qv": ("lorakit", "b0", "b1"), "predict": ("lorakit", "pipeline")}
QUICK_EXAMPLES, QUICK_ROUNDS = 64, 2
NAMES = {
    "lorakit": "lorakit",
    "lorakit-dropout": "lorakit, with the base's dropout",
    "lorakit-plain": "lorakit, plain PyTorch modules",
    "lorakit-beside": "lorakit, the adapter beside its base",
    "b0": "B0: Trainer + peft, padded to 128",
    "b1": "B1: Trainer + peft",
    "b1-bf16": "B1 in bf16",
    "b2": "B2: bf16, group_by_length",
    "b2-fp32": "B2 in fp32",
    "peft-loop": "peft in a plain PyTorch loop",
    "pipeline": "transformers pipeline, batches of 32",
    "notebook": "peft in a plain loop, padded to 256 and 64",
    "peft-sorted": "the same, by length",
    "lorakit-tuned": "lorakit, no dropout in the base",
    "lorakit-fp32": "lorakit in fp32",
    "st": "sentence-transformers + peft",
    "st-bf16": "the same in bf16",
    "st-tuned": "the same in bf16, by length, no dropout in the base",
    "st-weights": "the same with a base of bf16 weights",
    "st-tuned-fp32": "the same in fp32, by length, no dropout in the base",
    "st-cached": "its cached loss",
    "generate-8": "`model.generate`, batches of 8 by length",
    "generate-64": "`model.generate`, batches of 64 by length",
    "generate-256": "`model.generate`, batches of 256 by length",
    "generate-notebook": "`model.generate`, batches of 8 padded to 256",
}
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
Result = dict[str, Any]


def spec_of(name: str, quick: bool) -> Any:
    """A scenario, or its small version."""
    spec = FAMILY[name].SCENARIOS[name]
    return replace(spec, examples=QUICK_EXAMPLES, systems=QUICK[name]) if quick else spec


def run_one(name: str, system: str, arguments: argparse.Namespace) -> None:
    """One run in this process; its result is the last line."""
    import torch

    torch.set_num_threads(arguments.threads)
    family = FAMILY[name]
    job = speed_classification.Job(spec_of(name, arguments.quick), system, arguments.out, arguments.seed)
    if arguments.profile:
        with torch.profiler.profile() as profile:
            family.run(job)
        print(operators(profile))
    else:
        print(json.dumps({**family.run(job), "about": about()}))


def operators(profile: Any, most: int = 14) -> str:
    """The operators that take the most CPU time by themselves, with their shares."""
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return "\n".join(f"{row.self_cpu_time_total / total:6.1%} {row.count:7} {row.key}" for row in rows[:most])


def in_process(name: str, system: str, seed: int, arguments: argparse.Namespace) -> list[Result]:
    """One run in a process of its own, unless OUT has it already; nothing where it is only to be reported."""
    path = arguments.out / f"{name}--{system}--{seed}.json"
    if path.exists() or arguments.report:
        return [json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    command = [sys.executable, __file__, "--one", name, system, "--seed", str(seed), "--out", str(arguments.out)]
    command += ["--threads", str(arguments.threads), *(["--quick"] if arguments.quick else [])]
    start = time.perf_counter()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} {system} failed:\n{done.stderr[-3000:]}")
    result: Result = {**json.loads(done.stdout.splitlines()[-1]), "whole_s": time.perf_counter() - start}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    shown = {key: round(value, 3) for key, value in result.items() if isinstance(value, float)}
    print(f"{name} {system} {seed}: {shown}", file=sys.stderr, flush=True)
    return [result]


# The report


def table(name: str, spec: Any, runs: dict[str, list[Result]]) -> str:
    """A scenario's results as Markdown."""
    columns = FAMILY[name].COLUMNS
    lines = [f"### {spec.title} (`{name}`)", ""]
    lines += [f"| system | {' | '.join(column.title for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for system, found in ((system, found) for system, found in runs.items() if found):
        cells = [column.cell(found, runs["lorakit"]) for column in columns]
        lines.append(f"| {NAMES[system]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_section(text: str) -> None:
    """Put the report between the markers in docs/benchmarks.md."""
    page = DOCS.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    DOCS.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with sst2_sentence/, wnut17/ and t5_tokenizer/")
    parser.add_argument("--only", nargs="+", choices=[*FAMILY], help="scenarios; all of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a folder for the runs; a new one")
    parser.add_argument("--quick", action="store_true", help="few examples, few systems")
    parser.add_argument("--plain", action="store_true", help="lorakit without its own kernels too")
    parser.add_argument("--report", action="store_true", help="run nothing, and report what OUT has")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--profile", nargs=2, metavar=("SCENARIO", "SYSTEM"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def specs_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scenarios that are asked for."""
    if arguments.profile:
        return {arguments.profile[0]: spec_of(arguments.profile[0], arguments.quick)}
    names = arguments.only or [*(QUICK if arguments.quick else FAMILY)]
    specs = {name: spec_of(name, arguments.quick) for name in names}
    if arguments.plain:
        plain = {name: replace(spec, systems=(*spec.systems, "lorakit-plain")) for name, spec in specs.items()}
        specs |= {name: spec for name, spec in plain.items() if FAMILY[name] is speed_classification}
    return specs


def run_all(specs: dict[str, Any], rounds: int, arguments: argparse.Namespace) -> dict[str, dict[str, list[Result]]]:
    """The results of each system in each scenario, a round at a time."""
    runs: dict[str, dict[str, list[Result]]] = {n: {system: [] for system in s.systems} for n, s in specs.items()}
    for seed in range(rounds):
        for name, spec in specs.items():
            for system in spec.systems:
                runs[name][system] += in_process(name, system, seed, arguments)
    return runs


def report(specs: dict[str, Any], runs: dict[str, dict[str, list[Result]]]) -> str:
    """All tables, and what their runs were measured with, which need not be what is here now."""
    found = [own for systems in runs.values() for own in systems.values()]
    machines = "; ".join(sorted({run["about"] for own in found for run in own}))
    rounds = max(map(len, found))
    tables = [table(name, spec, runs[name]) for name, spec in specs.items() if runs[name]["lorakit"]]
    rivals = "adapters 1.3.0 wants transformers 4.57 and does not install beside this one."
    return "\n\n".join([f"{machines}; medians of {rounds} rounds at most. {rivals}", *tables])


def main() -> None:
    """Run in turn, and report."""
    arguments = parse()
    if arguments.one:
        run_one(*arguments.one, arguments)
        return
    arguments.out = arguments.out or Path(tempfile.mkdtemp(prefix="lorakit-speed-"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    specs = specs_of(arguments)
    if not arguments.report:
        for name, spec in specs.items():
            FAMILY[name].make_files(spec, arguments.out, arguments.data)
    if arguments.profile:
        run_one(*arguments.profile, arguments)
        return
    rounds = QUICK_ROUNDS if arguments.quick else arguments.rounds
    text = report(specs, run_all(specs, rounds, arguments))
    print(text)
    if arguments.write:
        write_section(text)


if __name__ == "__main__":
    main()
