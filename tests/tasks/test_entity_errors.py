"""Kinds of entity errors against nervaluate."""

from __future__ import annotations

import random

import pytest
from nervaluate import Evaluator

from lorakit.data.tags import Entity, entities
from lorakit.tasks.metrics.entities import SCHEMAS, entity_scores, error_counts, semeval_scores

TYPES = ("LOC", "ORG", "PER")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BIII"))  # long entities, so that many overlap
SENTENCES = 400
KEYS = ("correct", "incorrect", "partial", "missed", "spurious", "precision", "recall", "f1")
Corpus = tuple[list[list[str]], list[list[str]]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = random.Random(0)
    gold = [rng.choices(TAGS, k=rng.randint(1, 15)) for _ in range(SENTENCES)]
    return gold, [[tag if rng.random() < 0.6 else rng.choice(TAGS) for tag in tags] for tags in gold]


def read(corpus: Corpus) -> tuple[list[list[Entity]], ...]:
    return tuple([entities(tags) for tags in sentences] for sentences in corpus)


@pytest.fixture(scope="module")
def theirs(corpus: Corpus) -> dict:
    return Evaluator(*corpus, tags=list(TYPES), loader="list").evaluate()["overall"]


@pytest.mark.parametrize("schema", [*SCHEMAS])
def test_schemas_equal_those_of_nervaluate(corpus, theirs, schema):
    found = semeval_scores(*read(corpus))[schema]
    wanted = theirs["ent_type" if schema == "type" else schema]
    assert found == {key: pytest.approx(getattr(wanted, key)) for key in KEYS}


def test_strict_schema_has_the_f1_of_conlleval(corpus):
    scores = entity_scores(*corpus)
    assert scores["semeval"]["strict"]["f1"] == pytest.approx(scores["entity_f1"])


def test_errors_cut_the_strict_schema_into_kinds(corpus):
    errors, strict = error_counts(*read(corpus)), semeval_scores(*read(corpus))["strict"]
    assert {key: errors[key] for key in ("correct", "missed", "spurious")} == {
        key: strict[key] for key in ("correct", "missed", "spurious")
    }
    assert errors["type"] + errors["boundary"] + errors["type_and_boundary"] == strict["incorrect"]


@pytest.mark.parametrize(
    ("guess", "kind"),
    [
        ("O B-PER I-PER O", "correct"),
        ("O B-LOC I-LOC O", "type"),
        ("B-PER I-PER I-PER O", "boundary"),
        ("O O B-LOC I-LOC", "type_and_boundary"),
        ("O O O O", "missed"),
    ],
)
def test_error_is_of_its_kind(guess, kind):
    errors = error_counts([entities(["O", "B-PER", "I-PER", "O"])], [entities(guess.split())])
    assert {name for name, count in errors.items() if count} == {kind}


def test_entity_made_up_is_spurious():
    errors = error_counts([[]], [[Entity("PER", 0, 1)]])
    assert {name for name, count in errors.items() if count} == {"spurious"}


def test_no_entities_score_zero():
    assert {tuple(row.values()) for row in semeval_scores([[]], [[]]).values()} == {(0,) * len(KEYS)}
