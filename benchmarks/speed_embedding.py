"""Training an embedding model with LoRA: lorakit, and sentence-transformers with peft in several settings.

All see the same pairs and have the same loss, adapter, batch size, learning rate and schedule. Times are of the training loop
alone. The pairs are SICK's with their scores or banking77's questions of one intent, else the bundled questions and answers.
"""

from __future__ import annotations

import csv
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import speed_classification
from machine import Spent, gemm_peak, measured
from speed_classification import BUNDLED, PACKED, WARMUP, WEIGHT_DECAY, Job, bound_flops, timed

R, ALPHA, LR, TARGETS = 8, 16, 5e-4, ("query", "key", "value", "dense")
DROPOUT = 0.1  # the base's own, which lorakit leaves in from 500 examples on
TEXTS = ("anchor", "positive")
COLUMNS = speed_classification.COLUMNS[:-1]  # without accuracy


@dataclass(frozen=True)
class Embedding:
    """One comparison."""

    title: str
    systems: tuple[str, ...]
    source: str
    loss: str  # as lorakit calls it
    examples: int
    batch: Mapping[str, int]  # by the beginning of a system's name
    pieces: int | None = None  # pairs in memory at a time, where a system computes gradients in pieces


SPEEDS = ("lorakit", "lorakit-tuned", "lorakit-fp32", "st", "st-bf16", "st-tuned", "st-weights", "st-tuned-fp32")
SCENARIOS: dict[str, Embedding] = {
    "embedding-scores": Embedding(
        "Embeddings, MiniLM-L6, all linear layers, r 8, CoSENT on SICK's pairs, batches of 32",
        SPEEDS, "sick", "cosent", 320, {"": 32},
    ),
    "embedding-pairs": Embedding(
        "Embeddings, MiniLM-L6, all linear layers, r 8, contrastive on banking77's questions, batches of 64",
        SPEEDS, "banking77", "contrastive", 320, {"": 64},
    ),
    "embedding-memory": Embedding(
        "Memory of one contrastive step over 1,024 pairs in pieces of 32, and of the rival's over 128 and in pieces",
        ("lorakit", "st", "st-cached"), "banking77", "contrastive", 1024, {"": 1024, "st": 128, "st-cached": 1024}, pieces=32,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How sentence-transformers goes about it."""

    bf16: bool = False  # autocast
    bf16_weights: bool = False  # of the base
    tuned: bool = False  # pairs of similar length share a batch, and nothing is dropped in the base
    cached: bool = False


WAYS = {
    "st": Way(),
    "st-bf16": Way(bf16=True),
    "st-tuned": Way(bf16=True, tuned=True),
    "st-weights": Way(bf16_weights=True, tuned=True),
    "st-tuned-fp32": Way(tuned=True),
    "st-cached": Way(cached=True),
}


def make_files(spec: Embedding, folder: Path, data: Path | None) -> None:
    """The pairs."""
    pairs: list[tuple[str, str, float]] = []
    if data is None:
        with (BUNDLED / "questions-train.csv").open(encoding="utf-8", newline="") as file:
            pairs = [(row["question"], row["answer"], i % 5) for i, row in enumerate(csv.DictReader(file))]
    elif spec.source == "sick":
        with (data / "sick" / "SICK_train.txt").open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            pairs = [(row["sentence_A"], row["sentence_B"], float(row["relatedness_score"])) for row in rows]
    else:
        of_intent: dict[str, list[str]] = defaultdict(list)
        with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                of_intent[row["category"]].append(row["text"])
        pairs = [(a, b, 1.0) for own in of_intent.values() for a, b in zip(own[::2], own[1::2], strict=False)]
    random.Random(0).shuffle(pairs)
    columns = (*TEXTS, "score") if spec.loss == "cosent" else TEXTS
    lines = [json.dumps(dict(zip(columns, pair, strict=False))) + "\n" for pair in islice(cycle(pairs), spec.examples)]
    _file(spec, folder).write_text("".join(lines), encoding="utf-8")


def _file(spec: Embedding, folder: Path) -> Path:
    return folder / f"{spec.source}-{spec.examples}.jsonl"


def run(job: Job) -> dict[str, float]:
    """What the training took."""
    batch = max((len(name), size) for name, size in job.spec.batch.items() if job.system.startswith(name))[1]
    spent, model, lengths, padded = (with_lorakit if job.system.startswith("lorakit") else with_rival)(job, batch)
    whole_cpu_s = time.process_time()
    n = len(lengths) // 2
    return {
        "examples_per_s": n / spent.wall_s,
        "examples_per_cpu_s": n / spent.cpu_s,
        "tokens_per_cpu_s": sum(lengths) / spent.cpu_s,
        "padding": padded / sum(lengths),
        "cpu_s": spent.cpu_s,
        "whole_cpu_s": whole_cpu_s,
        "peak_mb": spent.peak_mb,
        "added_mb": spent.added_mb,
        "bound": bound_flops(model.config, lengths) / spent.cpu_s / gemm_peak(),
    }


Trained = tuple[Spent, Any, list[int], int]  # what it took, the model, real tokens of each text, tokens processed


def with_lorakit(job: Job, batch: int) -> Trained:
    """lorakit as a user calls it; -tuned drops nothing in the base, -fp32 computes as the rival does by default."""
    from lorakit.recipe import make_recipe
    from lorakit.training.loop import train
    from lorakit.training.prepare import prepare
    from lorakit.training.run import Run

    spec, data = job.spec, _file(job.spec, job.folder)
    few = data.with_suffix(".few.jsonl")
    few.write_text("".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    model: dict[str, Any] = {"base": "minilm", "dropout": 0.0 if job.system == "lorakit-tuned" else DROPOUT}
    if job.system == "lorakit-fp32":
        model["dtype"] = "fp32"
    recipe = make_recipe(
        {
            "model": model,
            "data": {"train": str(data), "validation": str(few)},
            "task": {"name": "embedding", "loss": spec.loss},
            "lora": {"r": R, "alpha": ALPHA},
            "train": {
                "epochs": 1, "batch_size": batch, "micro_batch_size": spec.pieces, "lr": LR, "seed": job.seed,
                "warmup": WARMUP, "weight_decay": WEIGHT_DECAY,
            },
        }
    )  # fmt: skip
    prepared = prepare(recipe)
    items = prepared.parts["train"].drawn(prepared.task.info)
    member = Run(prepared, job.folder).member
    spent = Spent()
    with measured(spent):
        for _ in train(prepared.model, [member]):
            pass
    lengths = [len(row["input_ids"]) for own in items for row in own]
    assert PACKED in prepared.kernels
    return spent, prepared.model, lengths, sum(lengths)


def with_rival(job: Job, batch: int) -> Trained:
    """SentenceTransformerTrainer over peft's adapter."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer import losses

    from lorakit.data.batches import bucketed_batches
    from lorakit.models import find

    spec, way, spent = job.spec, WAYS[job.system], Spent()
    torch.manual_seed(job.seed)
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if way.tuned else {}
    dtype = {"dtype": torch.bfloat16} if way.bf16_weights else {}
    model = SentenceTransformer(str(find("minilm")), device="cpu", config_kwargs=options, model_kwargs=dtype)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="FEATURE_EXTRACTION")
    model.add_adapter(config)
    rows = [json.loads(line) for line in _file(spec, job.folder).read_text(encoding="utf-8").splitlines()]
    if batch < len(rows) and job.spec.pieces:
        rows = rows[:batch]
    lengths = [len(model.tokenizer(row[name])["input_ids"]) for row in rows for name in TEXTS]

    class ByLength(DefaultBatchSampler):
        def __iter__(self) -> Any:
            totals = [a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
            return (list(own) for own in bucketed_batches(totals, batch, job.seed, 0))

    sampler: Any = ByLength if way.tuned else "batch_sampler"  # its default
    loss: Any = losses.CoSENTLoss(model) if spec.loss == "cosent" else losses.MultipleNegativesRankingLoss(model)
    if way.cached:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=spec.pieces)
    arguments = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=LR, seed=job.seed,
        weight_decay=WEIGHT_DECAY, warmup_steps=round(WARMUP * -(-len(rows) // batch)), bf16=way.bf16, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, batch_sampler=sampler,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), loss=loss, callbacks=[timed(spent)]
    )
    tokens: list[int] = []
    words = next(module for path, module in model.named_modules() if path.endswith("word_embeddings"))
    words.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))
    trainer.train()
    return spent, model[0].auto_model, lengths, sum(tokens)
