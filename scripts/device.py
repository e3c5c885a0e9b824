"""Try an accelerator against this machine's CPU and print a table to send back: python scripts/device.py --device mps

For people with hardware that the tests have not: an Apple GPU, a T4 (which emulates bf16), an Intel GPU. Offline, a few
minutes, over the models and sentences that come with the package; needs the extra minilm. A run is trained, stopped at half
and resumed, answers, and is merged. Ends with code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import operator
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lorakit
from lorakit.app.api import train_recipe, train_recipes
from lorakit.app.commands.doctor import examine
from lorakit.recipe import make_recipe

DEMO = Path(lorakit.__file__).parent / "demo"
RUNS: dict[str, dict[str, dict[str, Any]]] = {
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
TEXTS = ["a superb film", "Ada left Oslo for a stale plot that went on and on", "no", "the cast saw Ines in Lima ."]
NEAR = {  # by so much of it the loss of the first step may differ from the CPU's in fp32
    "float32": 1e-3,
    "bfloat16": 0.05,
    "float16": 0.05,
}


def train(folder: Path, sections: dict[str, Any], steps: int, *words: str) -> dict[str, Any]:
    """Train some steps; gives losses, examples a second and what was chosen."""
    recipe = make_recipe(sections, (f"train.max_steps={steps}", f"output.dir={folder}", *words))
    train_recipe(recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "scores.json").read_text())
    return {**scores, "losses": [line["loss"] for line in lines if "loss" in line]}


def check_losses(folder: Path, own: dict[str, Any], cpu: dict[str, Any]) -> str:
    """The first loss and the last one beside the CPU's."""
    pairs = [(own["losses"][i], cpu["losses"][i]) for i in (0, -1)]
    (first, expected), (last, expected_last) = pairs
    is_near = abs(first - expected) <= NEAR[own["dtype"]] * abs(expected)
    return f"{first:.5f} {expected:.5f} ... {last:.4f} {expected_last:.4f}{'' if is_near else ' WRONG'}"


def check_resumed(folder: Path, sections: dict[str, Any], steps: int, *words: str) -> str:
    """The weights of a run that is stopped at half and resumed, beside those of the whole one."""
    again = folder.with_name(f"{folder.name}-again")
    recipe = make_recipe(sections, (f"train.max_steps={steps}", f"output.dir={again}", *words))
    train_recipes([recipe], until=0.5)
    train_recipe(recipe, resume="auto")
    whole, resumed = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, again))
    worst = max(float((whole[key] - resumed[key]).abs().max()) for key in whole)
    return "same bits" if worst == 0 else f"differs by {worst:.1e}{'' if worst < 1e-2 else ' WRONG'}"


def check_answers(folder: Path, device: str, *, merge: bool) -> str:
    """How many answers are those of the same adapter on the CPU, and the largest difference of a score."""
    sides = []
    for loaded in (lorakit.load(folder, device=device, merge=merge), lorakit.load(folder, device="cpu")):
        lines = loaded.predict(TEXTS)
        found = [line.get("entities", [line]) for line in lines]  # a label is one answer, a sentence may have several
        names = [
            [(each.get("label"), each.get("entity_group"), each.get("start")) for each in of_text] for of_text in found
        ]
        sides.append((names, [each["score"] for of_text in found for each in of_text]))
    (own, scores), (cpu, cpu_scores) = sides
    same = sum(map(operator.eq, own, cpu))
    worst = max((abs(a - b) for a, b in zip(scores, cpu_scores, strict=False)), default=0.0)
    return f"{same}/{len(TEXTS)} {worst:.0e}{'' if same == len(TEXTS) and worst < 0.05 else ' WRONG'}"


def outcome(check: Callable[..., str], *what: Any, **how: Any) -> str:
    """What a check gives, or its error: the rest of the table is made all the same."""
    try:
        return check(*what, **how)
    except Exception as err:
        return f"{type(err).__name__}: {str(err).splitlines()[0][:160] if str(err) else ''} WRONG"


def main() -> int:
    """Run all of it; 0 if everything agrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps or xpu")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    print(
        f"lorakit {lorakit.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    print(*(f"{finding.name}: {finding.text}" for finding in examine() if finding.name in ("cpu", "gpu")), sep="\n")
    print("\n| run | dtype | losses, own and the CPU's | resumed | predicted | merged | examples/s, own and CPU | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, sections in RUNS.items():
            fixed = ("model.dropout=0", "lora.dropout=0", "train.head_start=random")
            cpu = train(
                Path(scratch, name, "cpu"), sections, options.steps, *fixed, "train.device=cpu", "model.dtype=fp32"
            )
            for dtype in ("fp32", "auto") if options.device == "cpu" else ("fp32", "auto", "fp16"):
                folder, words = Path(scratch, name, dtype), (f"train.device={options.device}", f"model.dtype={dtype}")
                try:
                    own = train(folder, sections, options.steps, *fixed, *words)
                except Exception as err:  # T5 in fp16 is refused, for one
                    print(f"| {name} | {dtype} | {type(err).__name__}: {str(err).splitlines()[0]} |", flush=True)
                    wrong += not isinstance(err, lorakit.errors.ConfigError)
                    continue
                cells = [
                    name,
                    f"{dtype} ({own['dtype']})",
                    check_losses(folder, own, cpu),
                    outcome(check_resumed, folder, sections, options.steps, *fixed, *words),
                    outcome(check_answers, folder, options.device, merge=False),
                    outcome(check_answers, folder, options.device, merge=True),
                    f"{own['examples_per_s']:.1f} {cpu['examples_per_s']:.1f}",
                    f"{(own['memory_bytes'] or 0) / 1e9:.2f}",
                ]
                wrong += sum(cell.endswith("WRONG") for cell in cells)
                print(f"| {' | '.join(cells)} |", flush=True)
    print("\nPlease send this in an issue.", "Nothing is wrong." if not wrong else f"{wrong} cells are WRONG.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
