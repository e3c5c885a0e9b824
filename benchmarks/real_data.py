"""Scores on real data over `minilm` and a random T5, each with the command line that a user would write.

    python benchmarks/real_data.py DATA [padding sst2 sst2-quickstart wnut17 wikigold t5-shape]

DATA is a folder with the public files of SST-2 (sentences), WNUT-17, WikiGold and T5's tokenizer; none of them is part of
this project. Entity scores are checked against seqeval on the same predictions.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lorakit
from lorakit.data.batches import bucketed_batches
from lorakit.data.read import read
from lorakit.models import load_base
from lorakit.recipe import read_recipe
from lorakit.runtime.events import Event, Note, Step
from lorakit.training.results import Result

RECIPES = Path(__file__).parent.parent / "recipes"


def train(folder: Path, *changes: str, recipe: str) -> Result:
    """Train a committed recipe with changes into a fresh folder."""
    from lorakit.app.api import train_recipe

    shutil.rmtree(folder, ignore_errors=True)
    return train_recipe(read_recipe(RECIPES / recipe, [*changes, f"output.dir={folder}"]), report=show)


def show(event: Event) -> None:
    """Notes, and a line now and then."""
    if isinstance(event, Note):
        print(f"  {event.text}")
    elif isinstance(event, Step) and event.number % 100 == 0:
        print(f"  step {event.number} loss {event.loss:.4f}", flush=True)


def row(name: str, value: str, result: Result) -> None:
    """One line of the table in docs/benchmarks.md."""
    scores = result.scores
    trained = f"{scores['parameters']['trainable']:,}"
    print(
        f"| {name} | {value} | {trained} | {scores['train_seconds']:.0f} s, {scores['examples_per_s']:.0f}/s |",
        flush=True,
    )


def sst2(data: Path, out: Path, seeds: Sequence[int] = (0, 1, 2)) -> None:
    """The tuned recipe over minilm on the 6,920 sentences; accuracy on the 872, a seed at a time."""
    found = []
    for seed in seeds:
        sources = [f"data.{part}={data / 'sst2_sentence' / f'stsa.binary.{end}'}" for part, end in PARTS]
        result = train(out / "sst2", "model.base=minilm", f"train.seed={seed}", *sources, recipe="sst2-bert-tuned.toml")
        found.append(result.scores["accuracy"])
        row(
            f"SST-2 sentences, seed {seed}",
            f"{found[-1]:.4f} (last epoch {result.scores['last']['accuracy']:.4f})",
            result,
        )
    print(f"mean of {len(found)} seeds: {statistics.mean(found):.4f}, from {min(found):.4f} to {max(found):.4f}")


PARTS = (("train", "train"), ("validation", "dev"))


def sst2_quickstart(data: Path, out: Path) -> None:
    """The quickstart's sentiment adapter, trained on the bundled sentences alone, on SST-2's 872."""
    from lorakit.app.commands.quickstart import SENTIMENT

    shutil.rmtree(out / "quickstart", ignore_errors=True)
    result = lorakit.train(report=show, **SENTIMENT, output={"dir": str(out / "quickstart")})
    examples = read(str(data / "sst2_glue" / "dev.tsv")).examples
    answers = lorakit.load(result.folder).predict([example.text for example in examples])
    names = {"0": "negative", "1": "positive"}
    right = sum(
        answer["label"] == names[example.label or ""] for answer, example in zip(answers, examples, strict=True)
    )
    row("bundled reviews, scored on SST-2's 872", f"{right / len(examples):.4f}", result)


def ner(name: str, result: Result) -> None:
    """A row of entity scores, and seqeval's on the same predictions."""
    ours = result.scores["entity_f1"]
    theirs = seqeval_f1(result.folder / "predictions.jsonl")
    assert abs(ours - theirs) < 1e-12, (ours, theirs)
    row(name, f"F1 {ours:.4f} (seqeval {theirs:.4f}; strict IOB2 {result.scores['entity_f1_strict']:.4f})", result)
    if "test" in result.scores:
        print(f"  test F1 {result.scores['test']['entity_f1']:.4f}")


def seqeval_f1(path: Path) -> float:
    """seqeval's F1 of a run's predictions.jsonl."""
    from seqeval.metrics import f1_score

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    gold = [word_tags(line["text"], line["expected"]) for line in lines]
    return float(f1_score(gold, [word_tags(line["text"], line["entities"]) for line in lines]))


def word_tags(text: str, entities: Sequence[dict[str, Any]]) -> list[str]:
    """IOB2 tags of words joined by single spaces, from entities with character offsets."""
    tags, position = [], 0
    for word in text.split(" "):
        inside = next((e for e in entities if e["start"] <= position < e["end"]), None)
        kind = "" if inside is None else ("B-" if inside["start"] == position else "I-") + inside["entity_group"]
        tags.append(kind or "O")
        position += len(word) + 1
    return tags


def wnut17(data: Path, out: Path) -> None:
    """Token classification over minilm on WNUT-17, development and test."""
    folder = data / "wnut17"
    files = {"train": "wnut17train.conll", "validation": "emerging.dev.conll", "test": "emerging.test.annotated"}
    sources = [f"data.{part}={folder / name}" for part, name in files.items()]
    ner("WNUT-17", train(out / "wnut17", *MINILM_NER, *sources, recipe="conll-bert.toml"))


MINILM_NER = ("model.base=minilm", "train.lr=1e-3")


def wikigold(data: Path, out: Path) -> None:
    """Token classification over minilm on WikiGold, a tenth held out by seed."""
    source = f"data.train={data / 'wikigold' / 'wikigold.conll.txt'}"
    nothing = ["data.validation_share=0.1"]
    recipe = read_recipe(RECIPES / "conll-bert.toml", [*MINILM_NER, source, *nothing])
    sections = recipe.model_dump()
    sections["data"].update(validation=None, test=None)
    sections["output"] = {"dir": str(out / "wikigold")}
    shutil.rmtree(out / "wikigold", ignore_errors=True)
    ner("WikiGold", lorakit.train(report=show, **sections))


def t5_shape(data: Path, out: Path, steps: int = 60) -> None:
    """A random T5 of t5-small's shape with T5's own tokenizer: the text-to-text path trains and its loss falls."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    base = out / "t5-random"
    shutil.copytree(data / "t5_tokenizer", base, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(base)
    folder = data / "wnut17"
    small = out / "dev.conll"  # generating from a random model is slow and says nothing: a few sentences do
    small.write_text(
        "\n\n".join((folder / "emerging.dev.conll").read_text(encoding="utf-8").split("\n\n")[:8]) + "\n\n"
    )
    sections = read_recipe(RECIPES / "conll-t5-tuned.toml", [
        f"model.base={base}", f"data.train={folder / 'wnut17train.conll'}", f"data.validation={small}",
        f"train.max_steps={steps}", "task.max_target_length=32",
    ]).model_dump()  # fmt: skip
    sections["data"]["test"] = None
    sections["output"] = {"dir": str(out / "t5-shape")}
    shutil.rmtree(out / "t5-shape", ignore_errors=True)
    losses: list[float] = []
    result = lorakit.train(
        report=lambda event: losses.append(event.loss) if isinstance(event, Step) else None, **sections
    )
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    row("T5 of t5-small's shape, random, WNUT-17", f"loss {first:.3f} to {last:.3f} in {len(losses)} steps", result)


def padding(data: Path, out: Path, batch_size: int = 32, longest: int = 128) -> None:
    """Tokens processed over real ones on SST-2's 6,920 sentences, cut and padded in three ways."""
    tokenizer = load_base("minilm", "sequence_classification", labels=("negative", "positive")).tokenizer
    texts = [example.text for example in read(str(data / "sst2_sentence" / "stsa.binary.train")).examples]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]]
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    ways = {
        f"padded to {longest}": [[longest] * len(lengths)],
        "shuffled, padded to the longest of a batch": batched([lengths[i] for i in order], batch_size),
        "bucketed, as here": [[lengths[i] for i in batch] for batch in bucketed_batches(lengths, batch_size, 0, 0)],
    }
    for name, batches in ways.items():
        print(f"| {name} | {sum(max(batch) * len(batch) for batch in batches) / sum(lengths):.2f}x |")


def batched(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    """Neighbours together."""
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


RUNS = {
    "padding": padding,
    "sst2": sst2,
    "sst2-quickstart": sst2_quickstart,
    "wnut17": wnut17,
    "wikigold": wikigold,
    "t5-shape": t5_shape,
}


def main() -> None:
    """Run what is named, or everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []], help="default: all of them")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-real-data")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.runs or RUNS:
        print(f"{name}: {(RUNS[name].__doc__ or '').strip()}")
        RUNS[name](arguments.data, arguments.out)


if __name__ == "__main__":
    main()
