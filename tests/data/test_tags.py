"""IOB tags against seqeval, and the detection of schemes."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
from seqeval import metrics as seqeval
from seqeval.metrics import v1 as seqeval_v1
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2

from lorakit.data.tags import Entity, entities, is_tag, scheme, strict_entities, to_tags
from lorakit.tasks.entity_scores import entity_scores

TYPES = ("LOC", "ORG", "PER")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI"))
LONGEST = 12
PAIRS = 1000
Sentences = list[list[str]]


def random_tags(rng: random.Random, length: int) -> list[str]:
    return [rng.choice(TAGS) for _ in range(length)]


def valid_tags(rng: random.Random, length: int) -> list[str]:
    """Random tags whose every I- continues an entity of its type."""
    tags: list[str] = []
    for tag in random_tags(rng, length):
        continues = tag[0] != "I" or (tags and tags[-1][2:] == tag[2:])
        tags.append(tag if continues else f"B-{tag[2:]}")
    return tags


def pairs(valid: bool) -> tuple[list[list[str]], list[list[str]]]:
    """Gold and predicted tags; half of the predicted words are right, so that scores are neither 0 nor 1."""
    rng = random.Random(PAIRS)
    draw = valid_tags if valid else random_tags
    gold = [draw(rng, rng.randint(1, LONGEST)) for _ in range(PAIRS)]
    other = [draw(rng, len(tags)) for tags in gold]
    mixed = [
        [g if rng.random() < 0.5 else p for g, p in zip(*row, strict=True)] for row in zip(gold, other, strict=True)
    ]
    return gold, (other if valid else mixed)


@pytest.fixture(scope="module", params=[True, False], ids=["valid", "any"])
def corpus(request: pytest.FixtureRequest) -> tuple[list[list[str]], list[list[str]]]:
    return pairs(request.param)


def test_entities_equal_those_of_seqeval(corpus):
    gold, predicted = corpus
    sentences = gold + predicted
    # seqeval gives the last word of an entity, we the word after it
    wanted = [[Entity(kind, start, last + 1) for kind, start, last in get_entities(tags)] for tags in sentences]
    assert [entities(tags) for tags in sentences] == wanted


def seqeval_scores(gold: Sentences, predicted: Sentences, average: str | None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns about sentences without an entity
        module = seqeval_v1 if options else seqeval.sequence_labeling
        return module.precision_recall_fscore_support(gold, predicted, average=average, **options)


READINGS = {"": {}, "_strict": {"scheme": IOB2}}  # of our scores, and what seqeval is told for each


@pytest.mark.parametrize("reading", READINGS)
def test_entity_scores_equal_those_of_seqeval(corpus, reading):
    precision, recall, f1, _ = seqeval_scores(*corpus, "micro", **READINGS[reading])
    scores = entity_scores(*corpus)
    found = [scores[f"entity_{part}{reading}"] for part in ("precision", "recall", "f1")]
    assert found == pytest.approx([precision, recall, f1])


@pytest.mark.parametrize("reading", READINGS)
def test_entity_scores_of_each_type_equal_those_of_seqeval(corpus, reading):
    wanted = zip(*seqeval_scores(*corpus, None, **READINGS[reading]), strict=True)
    rows = entity_scores(*corpus)[f"per_type{reading}"]
    assert list(rows) == list(TYPES)
    keys = ("precision", "recall", "f1", "support")
    assert [[row[key] for key in keys] for row in rows.values()] == [pytest.approx(list(row)) for row in wanted]


def test_strict_entities_equal_those_of_seqeval(corpus):
    gold, predicted = corpus
    sentences = gold + predicted
    from seqeval.scheme import Entities

    wanted = [[(e.tag, e.start, e.end) for e in row] for row in Entities(sentences, IOB2).entities]
    assert [[tuple(entity) for entity in strict_entities(tags)] for tags in sentences] == wanted


def test_strict_and_default_scores_differ_where_an_entity_begins_with_inside():
    gold, predicted = [["B-PER", "I-PER"]], [["I-PER", "I-PER"]]
    scores = entity_scores(gold, predicted)
    assert (scores["entity_f1"], scores["entity_f1_strict"]) == (1.0, 0.0)


def test_scores_without_any_entity_are_zero():
    scores = entity_scores([["O", "O"]], [["O", "O"]])
    assert scores["per_type"] == scores["per_type_strict"] == {}
    assert {value for value in scores.values() if isinstance(value, float)} == {0.0}


@pytest.mark.parametrize("read", [entities, strict_entities])
def test_round_trip_of_valid_tags_changes_nothing(read):
    sentences = [*pairs(valid=True)[0]]
    assert [to_tags(read(tags), len(tags)) for tags in sentences] == sentences


def test_conversion_makes_valid_tags_with_the_same_entities(corpus):
    _, predicted = corpus
    converted = [to_tags(entities(tags), len(tags)) for tags in predicted]
    assert [strict_entities(tags) for tags in converted] == [entities(tags) for tags in predicted]


@pytest.mark.parametrize("read", [entities, strict_entities])
def test_entities_of_a_type_with_a_hyphen_keep_its_name(read):
    assert read(["B-creative-work", "I-creative-work", "O"]) == [Entity("creative-work", 0, 2)]


@pytest.mark.parametrize("tags", [["I-O"], ["B-X", "O", "I-O"], ["B-O", "I-X", "I-O"]])
def test_strict_entities_of_a_type_named_like_outside_need_their_beginning(tags):
    begun = [Entity(tag[2:], i, i + 1) for i, tag in enumerate(tags) if tag.startswith("B-")]
    assert strict_entities(tags) == begun


@pytest.mark.parametrize("tag", TAGS)
def test_is_tag_accepts_outside_begin_and_inside(tag):
    assert is_tag(tag)


@pytest.mark.parametrize("tag", ["", "X", "PER", "B", "B-", "I-", "-PER", "o", "b-PER", "S-PER", "O-PER", "B_PER"])
def test_is_tag_refuses_anything_else(tag):
    assert not is_tag(tag)


@pytest.mark.parametrize(
    ("wanted", "sentences"),
    [
        ("IOB2", ["B-PER I-PER O B-LOC", "B-PER B-PER"]),
        ("IOB2", ["O O"]),
        ("IOB1", ["I-PER I-PER O I-LOC", "I-PER B-PER I-PER"]),
        ("IO", ["I-PER I-PER O I-LOC I-PER"]),
        ("mixed", ["B-PER I-PER O I-LOC"]),
        ("mixed", ["B-PER I-LOC"]),
        ("mixed", ["B-PER O", "I-PER O"]),
    ],
)
def test_scheme_is_told_from_the_whole_file(wanted, sentences):
    assert scheme([tags.split() for tags in sentences]) == wanted


@pytest.mark.parametrize("convert", [False, True])
def test_scheme_of_random_tags_is_sound(convert):
    gold = pairs(valid=False)[0]
    sentences = [to_tags(entities(tags), len(tags)) for tags in gold] if convert else gold
    assert scheme(sentences) == ("IOB2" if convert else "mixed")
