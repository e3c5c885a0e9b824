"""`lorakit quickstart`: both reference systems in small, on data that ship with the package, without a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit.app.api import train_recipe
from lorakit.app.commands.inspect import inspect_recipe
from lorakit.app.console import Screen, score_lines
from lorakit.app.printing import Output, echo
from lorakit.errors import ModelError
from lorakit.inference.predictor import load
from lorakit.models import find
from lorakit.recipe import make_recipe
from lorakit.training.results import Result

DEMO = Path(__file__).parent.parent / "demo"

# None of these stands in the bundled data.
UNSEEN_REVIEWS = (
    "Not a single scene overstays its welcome, and the last one left me in tears.",
    "It has a fine cast and a handsome budget, yet somehow not one good idea.",
    "I expected little from the sequel and got rather a lot.",
    "The soup arrived cold, the waiter never did.",
)
UNSEEN_SENTENCES = (
    "Ingrid Solberg flew from Oslo to Nairobi to meet the directors of Kestrel Energy .",
    "Paris beat Chelsea 2 - 1 , and Omar Haddad scored twice for the French champions .",
    "In spring the rivers rise and the roads stay closed .",
)

SENTIMENT: dict[str, dict[str, Any]] = {
    "model": {"base": "minilm", "dropout": 0.0},
    "data": {"train": str(DEMO / "reviews-train.csv"), "validation": str(DEMO / "reviews-validation.csv")},
    "task": {"name": "sequence_classification"},
    "lora": {"r": 8, "alpha": 16.0},
    "train": {"epochs": 2, "batch_size": 32, "lr": 1e-3},
}
ENTITIES: dict[str, dict[str, Any]] = {
    "model": {"base": "minilm", "dropout": 0.0},
    "data": {"train": str(DEMO / "entities-train.conll"), "validation": str(DEMO / "entities-validation.conll")},
    "task": {"name": "token_classification"},
    "lora": {"r": 16, "alpha": 32.0},
    "train": {"epochs": 3, "batch_size": 16, "lr": 1e-3},
}
ENTITIES_T5: dict[str, dict[str, Any]] = {
    **ENTITIES,
    "model": {"base": "t5-demo"},
    "task": {"name": "text2text_ner", "max_target_length": 192, "constrained": True},
    "train": {"epochs": 5, "batch_size": 16, "lr": 7e-4, "eval_every": 158},
}


def run_sentiment(out: Path) -> Result:
    """Train, score and use a sentiment classifier."""
    result = _train("Sentiment of reviews: positive or negative", SENTIMENT, out / "quickstart-sentiment")
    for answer in load(result.folder).predict(UNSEEN_REVIEWS):
        echo(f"  {answer['label']:<9} {answer['score']:.2f}  {answer['text']}")
    return _files(result)


def run_ner(out: Path, t5: bool) -> Result:
    """Train, score and use an entity recogniser: tags over minilm, or text to text over a T5."""
    if not t5:
        result = _train("Named entities: a tag for each word", ENTITIES, out / "quickstart-ner")
    else:
        base = _t5_base()
        recipe = {**ENTITIES_T5, "model": {"base": base}}
        result = _train(f"Named entities, written out by {base}", recipe, out / "quickstart-ner-t5")
        _samples(result.folder / "samples.jsonl")
    for answer in load(result.folder).predict(UNSEEN_SENTENCES):
        found = ", ".join(f"{e['word']} ({e['entity_group']})" for e in answer["entities"])
        echo(f"  {answer['text']}\n    -> {found or 'no entity'}")
    return _files(result)


def planned(out: Path, *, sentiment: bool, ner: bool, t5: bool) -> Output:
    """What the quickstart would train, checked as `train --dry-run` does."""
    t5_sections = {**ENTITIES_T5, "model": {"base": _t5_base()}} if ner and t5 else {}
    systems = {
        "quickstart-sentiment": SENTIMENT if sentiment else {},
        "quickstart-ner": ENTITIES if ner and not t5 else {},
        "quickstart-ner-t5": t5_sections,
    }
    asked = {
        name: {**sections, "output": {"dir": str(_free(out / name))}} for name, sections in systems.items() if sections
    }
    found = [inspect_recipe(make_recipe(sections, where="quickstart")) for sections in asked.values()]
    return Output(
        [line for one in found for line in one.lines], dict(zip(asked, (f.facts for f in found), strict=True))
    )


def _t5_base() -> str:
    """t5-small from the hub or its cache, else the bundled demonstration model."""
    try:
        find("t5-small")
    except ModelError:
        return "t5-demo"
    return "t5-small"


def _train(title: str, sections: dict[str, dict[str, Any]], folder: Path) -> Result:
    echo(f"\n{title}")
    recipe = make_recipe({**sections, "output": {"dir": str(_free(folder))}}, where="quickstart")
    screen = Screen()
    try:
        result = train_recipe(recipe, report=screen)
    finally:
        screen.close()
    counts = result.scores["parameters"]
    echo("\n".join(score_lines(result.scores)))
    echo(
        f"trained {counts['trainable']:,} of {counts['total']:,} parameters "
        f"({counts['trainable'] / counts['total']:.2%}) in {result.scores['train_seconds']:.0f} s"
    )
    echo("\nOn sentences it has never seen:")
    return result


def _free(folder: Path) -> Path:
    """The folder, or the same name with the first number that is free, so that a second quickstart loses nothing."""
    if not folder.exists():
        return folder
    number = 2
    while (other := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return other


def _samples(path: Path, most: int = 5) -> None:
    for line in path.read_text(encoding="utf-8").splitlines()[:most]:
        sample = json.loads(line)
        echo(f"  input       {sample['text']}")
        echo(f"  target      {sample['expected']}")
        echo(f"  prediction  {sample['generated']}\n")


def _files(result: Result) -> Result:
    folder = result.folder
    echo("\nOpen next:")
    for name, what in (
        ("report.html", "the whole of it as a page to look at"),
        ("loss.png", "training loss and validation score"),
        ("architecture.svg", "the model, its adapted places marked"),
        ("scores.json", "every score, per class"),
        ("samples.jsonl", "validation sentences with target and answer"),
        ("adapter/", "what ships; peft loads it too"),
    ):
        echo(f"  {folder / name if not name.endswith('/') else str(folder / name) + '/'}  {what}")
    echo(f'\nUse it:  lorakit predict {folder} "your own sentence"')
    return result
