"""Tags of words against seqeval, in every scheme, and which scheme a file uses."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
from seqeval import metrics as seqeval
from seqeval.metrics import v1 as seqeval_v1
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2

from lorakit.data.tags import OUTSIDE, SCHEMES, Entity, entities, is_tag, odd_tags, scheme, strict_entities, to_tags
from lorakit.tasks.metrics.entities import entity_scores

TYPES = ("LOC", "ORG", "PER")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI"))
LONGEST = 12
PAIRS = 300
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
def test_entity_scores_of_all_and_of_each_type_equal_those_of_seqeval(corpus, reading):
    scores = entity_scores(*corpus)
    precision, recall, f1, _ = seqeval_scores(*corpus, "micro", **READINGS[reading])
    found = [scores[f"entity_{part}{reading}"] for part in ("precision", "recall", "f1")]
    assert found == pytest.approx([precision, recall, f1])
    wanted = zip(*seqeval_scores(*corpus, None, **READINGS[reading]), strict=True)
    rows = scores[f"per_type{reading}"]
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


def test_is_tag_accepts_outside_begin_inside_end_and_single_and_nothing_else():
    assert all(map(is_tag, [*TAGS, "E-PER", "S-PER", "L-PER", "U-PER"]))
    others = ["", "X", "PER", "B", "B-", "I-", "-PER", "o", "b-PER", "M-PER", "O-PER", "B_PER"]
    assert not any(map(is_tag, others))


IOBES_TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BIES"))


def test_entities_of_iobes_equal_those_of_seqeval():
    rng = random.Random(PAIRS)
    sentences = [[rng.choice(IOBES_TAGS) for _ in range(rng.randint(1, LONGEST))] for _ in range(PAIRS)]
    wanted = [[Entity(kind, start, last + 1) for kind, start, last in get_entities(tags)] for tags in sentences]
    assert [entities(tags) for tags in sentences] == wanted


def test_entities_of_bilou_equal_those_of_iobes():
    rng = random.Random(PAIRS)
    sentences = [[rng.choice(IOBES_TAGS) for _ in range(rng.randint(1, LONGEST))] for _ in range(PAIRS)]
    renamed = [[tag.replace("E-", "L-").replace("S-", "U-") for tag in tags] for tags in sentences]
    assert [entities(tags) for tags in renamed] == [entities(tags) for tags in sentences]


def written(spans: list[Entity], length: int, scheme: str) -> list[str]:
    """The tags of entities in any scheme."""
    tags = [OUTSIDE] * length
    for i, (kind, start, end) in enumerate(spans):
        touches = i > 0 and spans[i - 1].end == start and spans[i - 1].type == kind
        begin = {"IO": "I", "IOB1": "B" if touches else "I"}.get(scheme, "B")
        last = {"IOBES": "E", "BILOU": "L"}.get(scheme, "I")
        single = {"IOBES": "S", "BILOU": "U"}.get(scheme, begin)
        prefixes = [begin, *"I" * (end - start - 2), last] if end - start > 1 else [single]
        tags[start:end] = [f"{prefix}-{kind}" for prefix in prefixes]
    return tags


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_told_and_read_back(name):
    gold = [entities(tags) for tags in pairs(valid=True)[0]]
    if name == "IO":  # which cannot tell two neighbours of a type apart
        gold = [[e for e in found if e.start > 0 and all(e.start != other.end for other in found)] for found in gold]
    sentences = [written(found, LONGEST, name) for found in gold]
    assert scheme(sentences) == name
    assert [entities(tags) for tags in sentences] == gold
    assert not any(odd_tags(tags, name) for tags in sentences)


@pytest.mark.parametrize(
    ("wanted", "odd", "sentences"),
    [
        ("IOB2", [], ["B-PER I-PER O B-LOC", "B-PER B-PER"]),
        ("IOB2", [], ["O O"]),
        ("IOB1", [], ["I-PER I-PER O I-LOC", "I-PER B-PER I-PER"]),
        ("IO", [], ["I-PER I-PER O I-LOC I-PER"]),
        ("IOBES", [], ["B-PER I-PER E-PER S-PER O"]),
        ("BILOU", [], ["B-PER I-PER L-PER U-PER O"]),
        ("IOB2", [(0, 3)], ["B-PER I-PER O I-LOC"]),
        ("IOB2", [(0, 1)], ["B-PER I-LOC B-LOC"]),
        ("IOB2", [(1, 0)], ["B-PER O", "I-PER O"]),
        ("IOB2", [(0, 2)], ["B-PER I-PER S-PER"]),
        ("IOB1", [(1, 1)], ["I-PER B-PER O I-PER", "O B-LOC"]),
        ("IOBES", [(0, 3), (1, 1)], ["S-PER S-LOC O B-PER O", "B-PER I-PER", "B-LOC E-LOC"]),
        ("IOBES", [(0, 1)], ["S-PER I-PER", "B-PER I-PER E-PER", "S-LOC"]),
        ("IOBES", [(0, 2)], ["B-PER E-PER U-PER", "S-LOC"]),
        ("IOBES", [(0, 0)], ["B-PER S-LOC", "B-LOC E-LOC"]),
    ],
)
def test_scheme_is_the_one_that_the_whole_file_breaks_least(wanted, odd, sentences):
    tags = [sentence.split() for sentence in sentences]
    assert scheme(tags) == wanted
    assert [(i, j) for i, sentence in enumerate(tags) for j in odd_tags(sentence, wanted)] == odd


@pytest.mark.parametrize("convert", [False, True])
def test_odd_tags_of_random_ones_are_those_that_conversion_changes(convert):
    gold = pairs(valid=False)[0]
    sentences = [to_tags(entities(tags), len(tags)) for tags in gold] if convert else gold
    changed = [
        [i for i, (a, b) in enumerate(zip(tags, to_tags(entities(tags), len(tags)), strict=True)) if a != b]
        for tags in sentences
    ]
    assert [odd_tags(tags, "IOB2") for tags in sentences] == changed
    assert any(changed) != convert
