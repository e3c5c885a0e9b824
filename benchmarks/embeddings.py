"""Embeddings of MiniLM: the base, LoRA and full fine-tuning, beside sentence-transformers with peft at equal steps.

    python benchmarks/embeddings.py DATA --set sick [--steps 141] [--systems base lora full rival] [--lr 5e-4]
    python benchmarks/embeddings.py DATA --set banking77 --steps 80

DATA is a folder with the public files of SICK and banking77, which are not part of this project. On SICK all train by CoSENT on
pairs with their relatedness, and are scored by Spearman's correlation on the 4,927 test pairs; on banking77 by the contrastive
loss on pairs of questions of one intent, and are scored by NDCG at 10 of a search for questions of the same intent, each of the
3,080 test questions among all others. All have the same pairs, batches of 32 or 64, schedule and rate, and of LoRA the same rank
and targets; lorakit computes in what it chooses on a machine, the rival in fp32. Speed: benchmarks/speed.py --only
embedding-scores embedding-pairs.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import about

import lorakit
from lorakit.inference.predictor import load_embedder
from lorakit.models import find
from lorakit.tasks.embedding import unit
from lorakit.tasks.metrics.bootstrap import Evaluation, Ranking, Statistic
from lorakit.tasks.metrics.labels import values
from lorakit.tasks.metrics.numbers import number_statistics
from lorakit.tasks.metrics.retrieval import ranks_of, retrieval_statistics

LR = {"lora": 5e-4, "rival": 5e-4, "full": 5e-5}
SYSTEMS = ("base", "lora", "full", "rival")
Embed = Callable[[list[str]], Any]


class Data(NamedTuple):
    """What is trained on, and how vectors are scored."""

    loss: str
    batch: int
    metric: str
    train: list[dict[str, Any]]
    few: list[dict[str, Any]]  # by which lorakit chooses between its last step and the untouched base
    statistics: Callable[[Embed], Mapping[str, Statistic | Ranking]]


def sick(folder: Path) -> Data:
    """Pairs with their relatedness, 1 to 5."""

    def read(part: str) -> list[dict[str, Any]]:
        with (folder / "sick" / f"SICK_{part}.txt").open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            names = {"sentence1": "sentence_A", "sentence2": "sentence_B"}
            return [
                {**{name: row[theirs] for name, theirs in names.items()}, "score": float(row["relatedness_score"])}
                for row in rows
            ]

    test = read("test_annotated")

    def statistics(embed: Embed) -> Mapping[str, Statistic | Ranking]:
        first, second = (unit(np.asarray(embed([row[name] for row in test]))) for name in ("sentence1", "sentence2"))
        every = number_statistics([row["score"] for row in test], (first * second).sum(1))
        return {"spearman": every["spearman"]}

    return Data("cosent", 32, "spearman", read("train"), read("trial"), statistics)


def banking77(folder: Path) -> Data:
    """Pairs of questions of one intent, in random order; every eleventh is held out."""
    rows: dict[str, list[dict[str, str]]] = {}
    for part in ("train", "test"):
        with (folder / "banking77" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            rows[part] = list(csv.DictReader(file))
    of_intent: dict[str, list[str]] = defaultdict(list)
    for row in rows["train"]:
        of_intent[row["category"]].append(row["text"])
    pairs = [
        {"anchor": anchor, "positive": positive}
        for own in of_intent.values()
        for anchor, positive in zip(own[::2], own[1::2], strict=False)
    ]
    random.Random(0).shuffle(pairs)
    texts, intents = [row["text"] for row in rows["test"]], [row["category"] for row in rows["test"]]
    alike: dict[str, list[int]] = defaultdict(list)
    for i, intent in enumerate(intents):
        alike[intent].append(i)
    numbers = list(range(len(texts)))

    def statistics(embed: Embed) -> Mapping[str, Statistic | Ranking]:
        vectors = unit(np.asarray(embed(texts)))
        targets = [[other for other in alike[intents[i]] if other != i] for i in numbers]
        return retrieval_statistics(ranks_of(vectors, vectors, targets, numbers), numbers, len(numbers))

    train = [pair for i, pair in enumerate(pairs) if i % 11]
    return Data("contrastive", 64, "ndcg_at_10", train, pairs[::11], statistics)


def with_lorakit(method: str, data: Data, steps: int, lr: float, folder: Path) -> Embed:
    """LoRA on all linear layers, or full fine-tuning."""
    files = {"train": data.train, "few": data.few}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = lorakit.train(
        model={"base": "minilm"},
        data={"train": str(folder / "train.jsonl"), "validation": str(folder / "few.jsonl")},
        task={"name": "embedding", "loss": data.loss},
        train={"method": method, "max_steps": steps, "batch_size": data.batch, "lr": lr, "eval_every": 10**6},  # type: ignore[arg-type]
        output={"dir": str(folder / "run")},
    )
    return lorakit.load(result.folder).embed


def with_rival(data: Data, steps: int, lr: float, folder: Path) -> Embed:
    """sentence-transformers' trainer over peft's adapter."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    torch.manual_seed(0)
    model = SentenceTransformer(str(find("minilm")), device="cpu")
    targets = ["query", "key", "value", "dense"]
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="FEATURE_EXTRACTION"))
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=data.batch,
        learning_rate=lr,
        warmup_steps=round(0.06 * steps),
        weight_decay=0.01,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    by_name = {"cosent": losses.CoSENTLoss, "contrastive": losses.MultipleNegativesRankingLoss}
    rows = Dataset.from_list(data.train)
    SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=by_name[data.loss](model)).train()
    return lambda texts: model.encode(texts)


def main() -> None:
    """A row of a table for each system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--set", choices=("sick", "banking77"), default="sick")
    parser.add_argument("--steps", type=int, default=141)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--lr", type=float, help="instead of that of each system")
    options = parser.parse_args()
    data = sick(options.data) if options.set == "sick" else banking77(options.data)
    print(about())
    print(f"| system | steps | rate | {data.metric} x 100 | 95 % |\n|---|---|---|---|---|")
    for system in options.systems:
        lr = options.lr or LR.get(system, 0)
        with tempfile.TemporaryDirectory() as name:
            if system == "base":
                embed: Embed = load_embedder("minilm").embed
            elif system == "rival":
                embed = with_rival(data, options.steps, lr, Path(name))
            else:
                embed = with_lorakit(system, data, options.steps, lr, Path(name))
            statistics = data.statistics(embed)
        scores = Evaluation(values(statistics), statistics).with_intervals()
        low, high = scores["intervals"][data.metric]
        print(
            f"| {system} | {options.steps} | {lr:g} | {100 * scores[data.metric]:.2f} | {100 * low:.1f} to {100 * high:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
