"""Tiny data of texts that belong together, and a tiny base in the layout of sentence-transformers."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.runs import Sections, changed

THINGS, FEELINGS = (
    ("film", "plot", "cast", "scene"),
    ("superb", "lovely", "stale", "boring", "fresh", "moving", "clumsy"),
)


def save_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def save_related(folder: Path) -> Path:
    """Data of each form: pairs (with a negative), pairs with scores, texts with classes."""
    every = [(thing, feeling) for thing in THINGS for feeling in FEELINGS]
    pairs = [(f"the {t} was {f}", f"a {f} {t}", f"a rather {g} {t}") for (t, f), (_, g) in pairwise(every)]
    save_table(folder / "pairs.csv", ["anchor", "positive", "negative"], pairs)
    scores = [(a, b if i % 2 else c, 4.5 if i % 2 else i % 3) for i, (a, b, c) in enumerate(pairs)]
    save_table(folder / "scores.csv", ["sentence1", "sentence2", "score"], scores)
    save_table(folder / "classes.csv", ["text", "label"], [(f"the {t} was {f}", f) for t, f in every])
    return folder


def laid_out(folder: Path, base: Path, normalize: bool = True, prompts: dict[str, str] | None = None) -> Path:
    shutil.copytree(base, folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if normalize else {})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": prompts or {}, "default_prompt_name": None},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def recipe(base: Path, data: Path, *words: str) -> Any:
    raw: Sections = {
        "model": {"base": str(base), "dtype": "fp32"},
        "data": {"train": str(data), "validation": str(data)},
        "task": {"name": "embedding"},
        "lora": {"r": 4},
        "train": {"epochs": 2, "batch_size": 8, "lr": 1e-2},
    }
    if data.stem == "pairs":
        raw["data"]["pair"] = "positive"
    if data.stem == "scores":
        raw["data"]["pair"] = "sentence2"
    return changed(raw, *words)
