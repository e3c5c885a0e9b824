"""What wrong labels cost, and whether confident learning finds them: labels of SST-2's sentences flipped by chance.

    python benchmarks/label_noise.py DATA [--half 1000] [--shares 0 0.01 0.05 0.1 0.2]

DATA is a folder with the public files of SST-2 (sentences), which are no part of this project. Of the training sentences
two parts of the same size are drawn and both get the noise; a LoRA over `minilm` is trained on the first and scored on the
872 clean development sentences after the last epoch. Precision at 100: how many of the first 100 suspects were flipped,
among the second part, which the run has not seen, and among the first, which it has. The best there can be is the number
of flipped labels, where that is below 100.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lorakit
from lorakit.app.checking import suspects
from lorakit.data.example import Example
from lorakit.data.read import read

FLIPPED = {"0": "1", "1": "0"}
FIRST = 100
NEVER = 10**9  # steps; the last one is scored whatever it is


def noisy(examples: Sequence[Example], share: float, chance: random.Random) -> tuple[list[tuple[str, str]], set[int]]:
    """Texts and labels, a share of the labels flipped, and the positions of those."""
    flipped = set(chance.sample(range(len(examples)), round(share * len(examples))))
    rows = [(e.text, FLIPPED[str(e.label)] if i in flipped else str(e.label)) for i, e in enumerate(examples)]
    return rows, flipped


def write(path: Path, rows: Sequence[tuple[str, str]]) -> str:
    """A CSV file of these rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def measure(data: Path, folder: Path, half: int, share: float) -> str:
    """A row of the table."""
    chance = random.Random(0)
    sentences = chance.sample(list(read(str(data / "sst2_sentence" / "stsa.binary.train")).examples), 2 * half)
    parts = {name: noisy(part, share, chance) for name, part in (("seen", sentences[:half]), ("new", sentences[half:]))}
    files = {name: write(folder / f"{name}.csv", rows) for name, (rows, _) in parts.items()}
    dev = read(str(data / "sst2_sentence" / "stsa.binary.dev")).examples
    began = time.perf_counter()
    result = lorakit.train(
        model={"base": "minilm"},
        data={"train": files["seen"], "validation": write(folder / "dev.csv", [(e.text, str(e.label)) for e in dev])},
        train={"epochs": 3, "lr": 1e-3, "batch_size": 32, "eval_every": NEVER},
        output={"dir": str(folder / "run")},
    )
    seconds = time.perf_counter() - began
    predictor = lorakit.load(result.folder)
    cells = [f"{share:.0%}", f"{result.scores['last']['accuracy']:.4f}"]
    for name in ("new", "seen"):
        flipped = parts[name][1]
        found = [int(s.where.rpartition(":")[2]) - 2 for s in suspects(predictor, read(files[name]).examples)]
        hits = sum(position in flipped for position in found[:FIRST])
        everywhere = sum(position in flipped for position in found)
        cells.append(f"{hits / FIRST:.2f} ({len(flipped)} flipped; {len(found)} suspects, {everywhere} rightly)")
    return f"| {' | '.join(cells)} | {seconds:.0f} s |"


def main() -> None:
    """A row for each share of wrong labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--half", type=int, default=1000, help="examples of each of the two parts")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.01, 0.05, 0.1, 0.2])
    arguments = parser.parse_args()
    print("| wrong labels | accuracy | precision at 100, unseen | precision at 100, trained on | training |")
    print("|---|---|---|---|---|")
    for share in arguments.shares:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(arguments.data, Path(folder), arguments.half, share), flush=True)


if __name__ == "__main__":
    main()
