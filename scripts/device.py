"""Try an accelerator against this machine's CPU and print what to report: python scripts/device.py [--device mps] [--steps 30]

For people with hardware that the tests have not: an Apple GPU, a T4 (which emulates bf16), an Intel GPU. Offline, a few
minutes, over the models and sentences that come with the package; needs the extra minilm. Ends with code 1 if a loss is not
the CPU's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lorakit
from lorakit.app.commands.doctor import examine
from lorakit.errors import LorakitError

DEMO = Path(lorakit.__file__).parent / "demo"
RUNS = {
    "MiniLM": {
        "model": {"base": "minilm"},
        "data": {
            "train": str(DEMO / "reviews-train.csv"),
            "validation": str(DEMO / "reviews-validation.csv"),
            "max_length": 64,
        },
    },
    "T5": {
        "model": {"base": "t5-demo"},
        "data": {"train": str(DEMO / "entities-train.conll"), "validation_share": 0.02},
        "task": {"name": "text2text_ner"},
    },
}
NEAR = {
    "fp32": 1e-3,
    "bf16": 0.05,
    "fp16": 0.05,
}  # by so much of it the loss of a step may differ from the CPU's in fp32


def run(folder: Path, sections: dict[str, Any], steps: int, *words: str) -> dict[str, Any]:
    """Train some steps; gives losses, examples a second and what was chosen."""
    from lorakit.app import api
    from lorakit.recipe import make_recipe

    words = (f"train.max_steps={steps}", "train.head_start=random", f"output.dir={folder}", *words)
    clock = time.perf_counter()
    api.train_recipe(make_recipe(sections, words))
    seconds = time.perf_counter() - clock
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "scores.json").read_text())
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "dtype": scores["dtype"],
        "examples_per_s": scores.get("examples_per_s"),
        "memory_bytes": scores.get("memory_bytes"),
        "seconds": round(seconds, 1),
        "weights": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
    }


def main() -> int:
    """Run all of it; 0 if everything agrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, lorakit {lorakit.__version__}")
    print(*(f"{finding.name}: {finding.text}" for finding in examine() if finding.name in ("cpu", "gpu")), sep="\n")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, sections in RUNS.items():
            fixed = ("model.dropout=0", "lora.dropout=0")
            cpu = run(
                Path(scratch, name, "cpu"), sections, options.steps, *fixed, "train.device=cpu", "model.dtype=fp32"
            )
            for dtype in ("fp32", "auto") if options.device == "cpu" else ("fp32", "auto", "fp16"):
                words = (f"train.device={options.device}", f"model.dtype={dtype}")
                folder = Path(scratch, name, dtype)
                try:
                    own = run(folder, sections, options.steps, *fixed, *words)
                    again = run(folder.with_name(f"{dtype}-again"), sections, options.steps, *fixed, *words)
                except LorakitError as err:  # T5 in fp16, for one
                    print(f"{name}, {dtype}: {err}")
                    continue
                short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[own["dtype"]]
                first, last = ((own["losses"][i], cpu["losses"][i]) for i in (0, -1))
                near = abs(first[0] - first[1]) <= NEAR[short] * abs(first[1])
                wrong += not near
                speeds = f"{own['examples_per_s']:.1f} examples/s, the CPU {cpu['examples_per_s']:.1f}"
                print(
                    f"{name}, {dtype} ({short}): first loss {first[0]:.5f}, the CPU's {first[1]:.5f}"
                    f"{'' if near else '  WRONG'}; last {last[0]:.4f}, {last[1]:.4f}; {speeds}; "
                    f"{(own['memory_bytes'] or 0) / 1e9:.2f} GB; twice the same: {own['weights'] == again['weights']}"
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
