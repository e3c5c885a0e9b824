"""The forms of entities over t5-demo and the bundled sentences: entity F1 and faults, constrained and free.

python benchmarks/text2text_formats.py [--formats list tanl] [--epochs 5] [--lr 7e-4] [--sentences 250]
`--epochs 0` scores the base as it ships.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tomllib
from dataclasses import replace
from pathlib import Path

from torch import nn

import lorakit
from lorakit.app.api import train_recipe
from lorakit.data.example import Example
from lorakit.data.read import read
from lorakit.inference.answer import answer_all
from lorakit.inference.predictor import load
from lorakit.models import load_base
from lorakit.recipe import make_recipe
from lorakit.runtime.device import pick_device
from lorakit.tasks.text2text.formats import FORMATS
from lorakit.tasks.text2text.ner import FAULTS, Text2TextNer

DEMO = Path(lorakit.__file__).parent / "demo"
TUNED = Path(__file__).parents[1] / "recipes" / "conll-t5-tuned.toml"
LIMIT = 400  # tokens; bytes, here
SHOWN = ("entity_f1", "surface_f1", *FAULTS, "truncated")


def trained(form: str, epochs: int, lr: float, folder: str) -> tuple[nn.Module, Text2TextNer]:
    """The tuned recipe over t5-demo, evaluated at its end alone."""
    raw = tomllib.loads(TUNED.read_text(encoding="utf-8"))
    raw["model"]["base"] = "t5-demo"
    raw["data"] = {part: str(DEMO / f"entities-{part}.conll") for part in ("train", "validation")}
    raw["task"] |= {"format": form, "max_target_length": LIMIT}
    raw["train"] |= {"epochs": epochs, "lr": lr, "eval_every": 10**6}
    raw["output"] = {"dir": f"{folder}/{form}"}
    found = load(train_recipe(make_recipe(raw)).folder)
    assert isinstance(found.task, Text2TextNer)
    return found.model, found.task


def shipped(form: str, examples: list[Example]) -> tuple[nn.Module, Text2TextNer]:
    """The base alone."""
    base = load_base("t5-demo", "text2text")
    types = tuple(sorted({tag[2:] for example in examples for tag in example.tags} - {""}))
    return base.model, Text2TextNer(base.tokenizer, types, base.max_length, max_target_length=LIMIT, format=form)


def main() -> None:
    """Print a line a format and a way of decoding."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--sentences", type=int, default=250)
    args = parser.parse_args()
    examples = list(read(str(DEMO / "entities-validation.conll"), "words").examples)[: args.sentences]
    for form in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            model, task = trained(form, args.epochs, args.lr, folder) if args.epochs else shipped(form, examples)
            print(f"{form}: {args.epochs} epochs, {time.process_time() - began:.0f} s CPU", flush=True)
        for constrained in (True, False):
            one = replace(task, constrained=constrained)
            began = time.process_time()
            scores = one.evaluate(
                examples, answer_all(model, one, examples, one.encode(examples), pick_device())
            ).scores
            told = ", ".join(f"{name} {scores[name]:.3f}" for name in SHOWN)
            way = "constrained" if constrained else "free"
            print(f"  {way:11s} {told}; {time.process_time() - began:.0f} s CPU", flush=True)


if __name__ == "__main__":
    main()
