"""`lorakit quickstart`: the reference systems in small, on data that ship with the package, without a hub."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lorakit
from lorakit.app.arguments import free_folder
from lorakit.app.printing import Output, begin, echo, tell
from lorakit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from lorakit.inference.predictor import Predictor
    from lorakit.training.results import Result

DEMO = Path(lorakit.__file__).parent / "demo"

COPIES = {  # of the bundled data, by what --copy-data calls them
    "reviews.csv": "reviews-train.csv",
    "reviews-test.csv": "reviews-validation.csv",
    "notes.conll": "entities-train.conll",
    "notes-test.conll": "entities-validation.conll",
    "questions.csv": "questions-train.csv",
    "questions-test.csv": "questions-validation.csv",
}
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
UNSEEN_QUESTIONS = (
    "Why is the evening sky orange?",
    "How can a ship made of metal swim?",
    "What keeps a loaf light and fluffy?",
    "Who proved that our planet goes round the Sun?",
)

SENTIMENT: dict[str, dict[str, Any]] = {
    "model": {"base": "minilm", "dropout": 0.0},
    "data": {"train": str(DEMO / "reviews-train.csv"), "validation": str(DEMO / "reviews-validation.csv")},
    "task": {"name": "sequence_classification"},
    "lora": {"r": 8, "alpha": 16.0},
    "train": {"epochs": 2, "batch_size": 32, "lr": 1e-3},
}
FEW: dict[str, dict[str, Any]] = {  # no option set, like somebody who has just begun to label
    "model": {"base": "minilm"},
    "data": {"train": str(DEMO / "reviews-few.csv"), "validation": str(DEMO / "reviews-validation.csv")},
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
SEARCH: dict[str, dict[str, Any]] = {
    "model": {"base": "minilm", "dropout": 0.0},
    "data": {
        "train": str(DEMO / "questions-train.csv"),
        "validation": str(DEMO / "questions-validation.csv"),
        "pair": "answer",
    },
    "task": {"name": "embedding"},
    "lora": {"r": 8, "alpha": 16.0},
    "train": {"epochs": 4, "batch_size": 32, "lr": 1e-3},
}
SAMPLES = 5  # of validation sentences, shown of what a T5 writes
FILES = {
    "report.html": "a readable report of the run",
    "loss.png": "the training loss and validation score",
    "architecture.svg": "a picture of the model and its adapted layers",
    "scores.json": "all scores, also for each class",
    "samples.jsonl": "validation sentences with expected and predicted answers",
    "adapter/": "what you deploy; peft can load it too",
}


@click.command()
@click.argument("which", type=click.Choice(["sentiment", "ner", "search"]), required=False)
@click.option(
    "--t5", is_flag=True, help="With ner: use T5, either t5-small from the hub or its cache, or the bundled t5-demo."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder for the run folders.",
)
@click.option("--copy-data", is_flag=True, help=f"Only copy the bundled data to this folder: {', '.join(COPIES)}.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON on stdout, everything else on stderr.")
def quickstart(which: str | None, t5: bool, out: Path, copy_data: bool, dry_run: bool, as_json: bool) -> None:
    """Train on the bundled data, and try the model on new sentences.

    Runs sentiment and ner unless you name one.
    """
    if t5 and which in ("sentiment", "search"):
        raise ConfigError("--t5 only works with ner")
    if copy_data:
        if taken := [name for name in COPIES if Path(name).exists()]:
            raise ConfigError(f"--copy-data: {taken[0]} exists already; run it in another folder")
        for name, source in COPIES.items() if not dry_run else ():
            shutil.copyfile(DEMO / source, name)
        return Output([f"{name}: {DEMO / source}" for name, source in COPIES.items()], COPIES).show(as_json)
    systems: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {}  # by folder: what it is, and its recipe
    if which in ("sentiment", None) and not t5:
        systems["quickstart-sentiment-few"] = ("Sentiment of reviews, from 16 of each label, with no option set", FEW)
        systems["quickstart-sentiment"] = ("Sentiment of reviews: positive or negative", SENTIMENT)
    if which in ("ner", None) and t5:
        base = _t5_base()
        recipe = {**ENTITIES_T5, "model": {"base": base}}
        systems["quickstart-ner-t5"] = (f"Named entities, written by {base}", recipe)
    elif which in ("ner", None):
        systems["quickstart-ner"] = ("Named entities, with a tag for each word", ENTITIES)
    if which == "search":
        systems["quickstart-search"] = ("Search: which text answers a question", SEARCH)
    if dry_run:
        _plan(out, systems).show(as_json)
        return
    begin(f"loading the base {'models' if len(systems) > 1 else 'model'}")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        results = [_run(title, sections, free_folder(out / name)) for name, (title, sections) in systems.items()]
        if "quickstart-sentiment-few" in systems:
            tell("\nSentiment, by the number of reviews it was trained on:")
            for scores in (result.scores for result in results[:2]):
                low, high = scores["intervals"]["accuracy"]
                n = scores["examples"]["train"]
                tell(f"  {n:>5,}: accuracy {scores['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f})")
    if as_json:
        echo(json.dumps([{**result.scores, "run": str(result.folder)} for result in results]))


def _plan(out: Path, systems: dict[str, tuple[str, dict[str, dict[str, Any]]]]) -> Output:
    """What the quickstart would train, checked as `train --dry-run` does."""
    from lorakit.app.commands.inspect import inspect_recipe
    from lorakit.recipe import make_recipe

    output = Output([], {})
    for name, (_, sections) in systems.items():
        recipe = make_recipe({**sections, "output": {"dir": str(free_folder(out / name))}}, where="quickstart")
        lines, facts = inspect_recipe(recipe, is_brief=True)
        output = output.plus(Output(lines, {name: facts}))
    return output


def _t5_base() -> str:
    """t5-small from the hub or its cache, else the bundled demonstration model."""
    from lorakit.model_files import find

    try:
        find("t5-small")
    except ModelError:
        return "t5-demo"
    return "t5-small"


def _run(title: str, sections: dict[str, dict[str, Any]], folder: Path) -> Result:
    """Train one system, show its scores, and let it answer sentences that it has not seen."""
    from lorakit.app.api import train_recipe
    from lorakit.app.console import Screen, score_lines
    from lorakit.inference.predictor import load
    from lorakit.recipe import make_recipe

    tell(f"\n{title}")
    recipe = make_recipe({**sections, "output": {"dir": str(folder)}}, where="quickstart")
    screen = Screen()
    try:
        result = train_recipe(recipe, report=screen)
    finally:
        screen.close()
    counts = result.scores["parameters"]
    tell("\n".join(score_lines(result.scores)))
    tell(
        f"trained {counts['trainable']:,} of {counts['total']:,} parameters "
        f"({counts['trainable'] / counts['total']:.2%}) in {result.scores['train_seconds']:.0f} s"
    )
    tell("\nOn sentences it has not seen before:")
    if recipe.task.name == "text2text_ner":
        for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()[:SAMPLES]:
            sample = json.loads(line)
            tell(f"  input       {sample['text']}")
            tell(f"  target      {sample['expected']}")
            tell(f"  prediction  {sample['generated']}\n")
    _show_answers(load(folder))
    tell("\nOpen next:")
    for name, what in FILES.items():
        if (folder / name).exists():
            tell(f"  {folder / name}{'/' * name.endswith('/')}  {what}")
    if recipe.task.name == "embedding":
        tell(f"\nUse it:  lorakit serve {folder}  and ask on http://127.0.0.1:8080")
        tell(f"         lorakit embed {folder} --file texts.txt --out vectors.npy")
    else:
        tell(f'\nTry it:  lorakit predict {folder} "your own sentence"')
    return result


def _show_answers(predictor: Predictor) -> None:
    """Answer texts that are not in the training data."""
    if predictor.task.info.name == "sequence_classification":
        for answer in predictor.predict(UNSEEN_REVIEWS):
            tell(f"  {answer['label']:<9} {answer['score']:.2f}  {answer['text']}")
    elif predictor.task.info.name == "embedding":
        parts = (predictor.read_labelled(SEARCH["data"][part]).examples for part in ("train", "validation"))
        texts = [str(example.pair) for example in chain.from_iterable(parts)]
        for question, cosines in zip(UNSEEN_QUESTIONS, predictor.similarity(UNSEEN_QUESTIONS, texts), strict=True):
            tell(f"  {question}")
            for place in (-cosines).argsort()[:2]:
                tell(f"    {cosines[place]:.2f}  {texts[place]}")
    else:
        for answer in predictor.predict(UNSEEN_SENTENCES):
            entities = ", ".join(f"{e['word']} ({e['entity_group']})" for e in answer["entities"])
            tell(f"  {answer['text']}\n    -> {entities or 'no entity'}")
