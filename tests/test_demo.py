"""What ships in the package: enough data, cleanly split, and a T5 that is small and answers in the right form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import lorakit
from lorakit.data.example import Columns, of_words
from lorakit.data.read import read
from lorakit.data.tags import entities
from lorakit.inference.answer import answer_all
from lorakit.model_files import T5_DEMO
from lorakit.models import load_base
from lorakit.runtime.device import pick_device
from lorakit.tasks.text2text.ner import Text2TextNer

DEMO = Path(lorakit.__file__).parent / "demo"
PARTS = ("train", "validation")
TYPES = {"PER", "ORG", "LOC", "MISC"}


def texts(name: str, words: bool = False) -> list[str]:
    return [example.text for example in read(str(DEMO / name), "words" if words else "label").examples]


@pytest.mark.parametrize(("stem", "ending", "words"), [("reviews", "csv", False), ("entities", "conll", True)])
def test_no_sentence_stands_twice_or_on_both_sides(stem: str, ending: str, words: bool) -> None:
    both = [*texts(f"{stem}-train.{ending}", words), *texts(f"{stem}-validation.{ending}", words)]
    assert not [text for text, n in Counter(text.casefold() for text in both).items() if n > 1]


def test_reviews_are_many_and_half_positive() -> None:
    labels = Counter(example.label for example in read(str(DEMO / "reviews-train.csv")).examples)
    assert set(labels) == {"negative", "positive"}
    assert labels.total() >= 600
    assert abs(labels["positive"] - labels["negative"]) < 0.05 * labels.total()


def test_questions_are_many_and_each_has_an_answer_of_its_own() -> None:
    """None stands twice, so that a search for an answer has one right one; validation is enough to choose a step by."""
    parts = [
        read(str(DEMO / f"questions-{part}.csv"), "related", columns=Columns(pair="answer")).examples for part in PARTS
    ]
    assert len(parts[0]) >= 300 and len(parts[1]) >= 50
    for texts in zip(*((example.text, example.pair) for part in parts for example in part), strict=True):
        assert len({str(text).casefold() for text in texts}) == len(parts[0]) + len(parts[1])


def test_entity_sentences_are_many_and_of_all_types() -> None:
    examples = read(str(DEMO / "entities-train.conll"), "words").examples
    found = Counter(entity.type for example in examples for entity in entities(example.tags))
    assert len(examples) >= 400
    assert set(found) == TYPES
    assert min(found.values()) > 0.1 * found.total()


def test_t5_demo_is_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in T5_DEMO.iterdir()) <= 10e6


def test_t5_demo_copies_names_that_it_cannot_know() -> None:
    base = load_base("t5-demo", "text2text")
    task = Text2TextNer(base.tokenizer, tuple(sorted(TYPES)), base.max_length, max_target_length=48)
    names = ["Zorbel Quintane", "Mirava Tosk", "Abel Drumwick", "Lina Okparo"]
    sentences = [of_words(f"{name} visited the old bridge on Monday .".split()) for name in names]
    answers = answer_all(base.model, task, sentences, task.encode(sentences), pick_device())
    said = [{mention.surface for mention in answer.reading.mentions} for answer in answers]
    assert sum(name in found for name, found in zip(names, said, strict=True)) >= len(names) / 2
    assert not any(answer.reading.unknown_type for answer in answers)
