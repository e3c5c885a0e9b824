"""Eight members of one joint run beside the same eight runs one after the other: wall time, training alone, peak memory.

Every run is a process of its own, from its start to its last file, as a user would start it: `python benchmarks/joint.py
--data ../shared/data` trains MiniLM on SST-2's sentences (rates x ranks, LoRA on query and value), in pairs A B A B.
`--top-half` adapts the upper three blocks alone, so that what lies below is computed once for all members and epochs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

RATES, RANKS = (3e-4, 6e-4, 1e-3, 2e-3), (4, 8)
VALIDATION = 200  # sentences


def recipe(folder: Path, number: int, epochs: int, top_half: bool) -> dict[str, Any]:
    """The sections of a member."""
    lr, r = list(product(RATES, RANKS))[number]
    upper = {"layers_to_transform": [3, 4, 5]} if top_half else {}
    return {
        "model": {"base": "minilm", "dropout": 0.0},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")},
        "lora": {"r": r, "target_modules": ["query", "value"], **upper},
        "train": {"lr": lr, "epochs": epochs},
    }


def child(request: dict[str, Any]) -> None:
    """Train what is asked for, and print what it took."""
    from lorakit.app.api import train_recipes
    from lorakit.recipe import make_recipe

    recipes = [make_recipe({**raw, "output": {"dir": place}}) for place, raw in request.items()]
    results = train_recipes(recipes)
    spent = [result.scores["train_seconds"] for result in results]  # type: ignore[union-attr]
    scores = [result.scores["accuracy"] for result in results]  # type: ignore[union-attr]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"training_s": sum(spent), "peak_mib": peak, "accuracy": scores}))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The same in a process of its own, with its wall time."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--child", json.dumps(request)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {**json.loads(told.splitlines()[-1]), "wall_s": time.perf_counter() - begin}


def write_data(data: Path, folder: Path, texts: int) -> None:
    """A share of SST-2's sentences, drawn by seed."""
    lines = (data / "sst2_sentence" / "stsa.binary.train").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    rows = [json.dumps({"text": text, "label": label}) for label, _, text in (line.partition(" ") for line in lines)]
    (folder / "train.jsonl").write_text("\n".join(rows[:texts]) + "\n", encoding="utf-8")
    (folder / "validation.jsonl").write_text("\n".join(rows[-VALIDATION:]) + "\n", encoding="utf-8")


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--texts", type=int, default=1536)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--top-half", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    import machine
    import torch

    print(f"{machine.about()}; {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(options.data, folder, options.texts)
        raw = [recipe(folder, i, options.epochs, options.top_half) for i in range(options.members)]
        pairs = []
        for pair in range(options.pairs):
            alone = [run({str(folder / f"{pair}-alone-{i}"): raw[i]}) for i in range(options.members)]
            joint = run({str(folder / f"{pair}-joint-{i}"): sections for i, sections in enumerate(raw)})
            found = {key: (joint[key], sum(one[key] for one in alone)) for key in ("wall_s", "training_s")}
            found["peak_mib"] = (joint["peak_mib"], max(one["peak_mib"] for one in alone))
            gap = max(abs(a - one["accuracy"][0]) for a, one in zip(joint["accuracy"], alone, strict=True))
            told = ", ".join(f"{key} {a:.1f} / {b:.1f} = {a / b:.2f}" for key, (a, b) in found.items())
            print(f"pair {pair + 1}: {told}; accuracies differ by {gap:.4f} at most", flush=True)
            pairs.append({key: a / b for key, (a, b) in found.items()})
        for key in pairs[0]:
            print(f"{key}: median ratio {statistics.median(pair[key] for pair in pairs):.2f}")


if __name__ == "__main__":
    main()
