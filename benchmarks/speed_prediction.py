"""Answers to texts of mixed lengths: lorakit from a run folder, merged or beside its base, and a transformers pipeline over the
same weights, merged."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import speed_classification
from machine import Column, Spent, gemm_peak, measured
from speed_classification import Job, read_answers, write_answers

BATCH, MAX_LENGTH = 32, 512
JOINED = (1, 1, 1, 1, 2, 2, 4, 8, 16)  # sentences that make a text, by chance
CLOSE = 1e-3  # between two probabilities that are the same


@dataclass(frozen=True)
class Prediction:
    """One comparison."""

    title: str
    systems: tuple[str, ...]
    examples: int


SCENARIOS = {
    "predict": Prediction(
        "Prediction with MiniLM-L6, texts of 1 to 16 sentences in random order",
        ("lorakit", "lorakit-beside", "pipeline"),
        examples=320,
    )
}
COLUMNS = (
    Column("texts/CPU s", "examples_per_cpu_s", "{:.1f}", spread=True),
    Column("lorakit is", "examples_per_cpu_s", "{:.2f}x", spread=True, ratio=True),
    Column("real tokens/CPU s", "tokens_per_cpu_s"),
    Column("of the bound", "bound", "{:.0%}"),
    Column("texts/s", "examples_per_s", "{:.1f}"),
    Column("peak MB", "peak_mb"),
    Column("answering adds", "added_mb"),
    Column("same answers", "same", "{:.1%}"),
)


def make_files(spec: Prediction, folder: Path, data: Path | None) -> None:
    """Texts, a run of a few steps, and the merged model of it."""
    import lorakit

    speed_classification.make_files(speed_classification.SCENARIOS["minilm-qv"], folder, data)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = iter([json.loads(line)["text"] for line in lines] * 4)
    draw = random.Random(0)
    texts = [" ".join(next(sentences) for _ in range(draw.choice(JOINED))) for _ in range(spec.examples)]
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    small = folder / "few.jsonl"
    small.write_text("\n".join(lines[:64]) + "\n", encoding="utf-8")
    for name in ("run", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    lorakit.train(
        model={"base": "minilm", "pooling": "cls"}, data={"train": str(small), "max_length": MAX_LENGTH},
        train={"max_steps": 4, "lr": 1e-2}, output={"dir": str(folder / "run")},
    )  # fmt: skip
    lorakit.load(folder / "run").merge_to(folder / "merged")


def run(job: Job) -> dict[str, float]:
    """What answering took, and whether the answers are lorakit's."""
    texts = json.loads((job.folder / "texts.json").read_text(encoding="utf-8"))
    answer, model, tokenizer = OPEN[job.system](job)
    spent = Spent()
    with measured(spent):
        answers = answer(texts)
    whole_cpu_s = time.process_time()
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]]
    flops = speed_classification.bound_flops(model.config, lengths, trained=False)
    result = {
        "examples_per_s": len(texts) / spent.wall_s,
        "examples_per_cpu_s": len(texts) / spent.cpu_s,
        "tokens_per_cpu_s": sum(lengths) / spent.cpu_s,
        "whole_cpu_s": whole_cpu_s,
        "peak_mb": spent.peak_mb,
        "added_mb": spent.added_mb,
        "bound": flops / spent.cpu_s / gemm_peak(),
    }
    pairs = [[each["label"], each["score"]] for each in answers]
    if job.system == "lorakit":
        write_answers(job, pairs)
        return result
    same = [a == b and abs(p - q) < CLOSE for (a, p), (b, q) in zip(pairs, read_answers(job), strict=True)]
    return {**result, "same": sum(same) / len(same)}


Opened = tuple[Callable[[list[str]], list[dict[str, Any]]], Any, Any]  # answers to texts, the model, the tokenizer


def lorakit_system(job: Job, merge: bool = True) -> Opened:
    """From the run folder."""
    import lorakit

    predictor = lorakit.load(job.folder / "run", merge=merge)
    return predictor.predict, predictor.model, predictor.task.tokenizer


def pipeline_system(job: Job) -> Opened:
    """transformers' own way, which batches texts in the order they come in."""
    from transformers import pipeline

    pipe = pipeline("text-classification", model=str(job.folder / "merged"), device="cpu", batch_size=BATCH)
    return lambda texts: pipe(texts, truncation=True, max_length=MAX_LENGTH), pipe.model, pipe.tokenizer


OPEN = {"lorakit": lorakit_system, "lorakit-beside": partial(lorakit_system, merge=False), "pipeline": pipeline_system}
