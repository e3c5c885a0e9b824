"""Classification scores against scikit-learn; entity scores are compared with seqeval's in tests/data/test_tags.py."""

from __future__ import annotations

import random

import numpy as np
import pytest
from nervaluate import Evaluator
from sklearn import metrics

from lorakit.data.tags import Entity, entities
from lorakit.tasks.metrics.entities import SCHEMAS, entity_scores, error_counts, semeval_scores
from lorakit.tasks.metrics.labels import classification_scores, classification_statistics

LABELS = ("a", "b", "c", "never")


@pytest.fixture(scope="module")
def answers() -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    gold = rng.choices(LABELS[:3], k=200)
    return gold, [label if rng.random() < 0.6 else rng.choice(LABELS[:3]) for label in gold]


def test_accuracy_and_macro_f1_equal_those_of_scikit_learn(answers):
    scores = classification_scores(*answers, LABELS)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(*answers))
    macro = metrics.f1_score(*answers, labels=LABELS, average="macro", zero_division=0.0)
    assert scores["macro_f1"] == pytest.approx(macro)


@pytest.mark.parametrize("unknown", [False, True])
def test_mcc_equals_that_of_scikit_learn(answers, unknown):
    gold, predicted = answers
    predicted = ["?", "??", *predicted[2:]] if unknown else predicted
    known = [label if label in LABELS else "?" for label in predicted]
    assert classification_scores(gold, predicted, LABELS)["mcc"] == pytest.approx(
        metrics.matthews_corrcoef(gold, known)
    )


def test_f1_of_two_labels_is_that_of_the_second(answers):
    gold, predicted = (["b" if label == "b" else "a" for label in side] for side in answers)
    scores = classification_scores(gold, predicted, ("a", "b"))
    assert scores["positive_label"] == "b"
    assert scores["f1"] == pytest.approx(metrics.f1_score(gold, predicted, pos_label="b"))
    assert "f1" not in classification_scores(gold, predicted, ("a", "b", "c"))


@pytest.mark.parametrize("labels", [LABELS, ("a", "b")])
def test_statistics_equal_the_scores_and_those_of_a_resample(answers, labels):
    gold, predicted = (np.array([label if label in labels else labels[0] for label in side]) for side in answers)
    statistics = classification_statistics(gold, predicted, labels)
    chosen = np.random.default_rng(0).integers(0, len(gold), len(gold))
    weights = np.bincount(chosen, minlength=len(gold))
    scores = classification_scores(gold, predicted, labels)
    again = classification_scores(gold[chosen], predicted[chosen], labels)
    assert statistics.keys() == {key for key, value in scores.items() if isinstance(value, float)}
    for name, statistic in statistics.items():
        assert float(statistic.value(statistic.counts.sum(0))) == pytest.approx(scores[name])
        assert float(statistic.value(weights @ statistic.counts)) == pytest.approx(again[name])


@pytest.mark.parametrize("constant", ["gold", "predicted", "both"])
def test_mcc_of_a_constant_side_is_0(constant):
    gold = ["a"] * 4 if constant != "predicted" else ["a", "b"] * 2
    predicted = ["a"] * 4 if constant != "gold" else ["a", "b"] * 2
    assert classification_scores(gold, predicted, ("a", "b"))["mcc"] == 0.0


def test_scores_per_class_equal_those_of_scikit_learn(answers):
    report = metrics.classification_report(*answers, labels=LABELS, output_dict=True, zero_division=0.0)
    scores = classification_scores(*answers, LABELS)["per_class"]
    assert list(scores) == list(LABELS)
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "support": "support"}
    assert scores == {
        label: {ours: pytest.approx(report[label][theirs]) for ours, theirs in names.items()} for label in LABELS
    }


def test_confusion_is_that_of_scikit_learn_without_unknown_answers(answers):
    gold, predicted = answers
    predicted = ["?", *predicted[1:]]
    expected = metrics.confusion_matrix(gold, predicted, labels=LABELS)
    confusion = classification_scores(gold, predicted, LABELS)["confusion"]
    assert confusion == {"labels": list(LABELS), "matrix": expected.tolist()}


# Kinds of entity errors against nervaluate.


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


def test_schemas_equal_those_of_nervaluate(corpus):
    theirs = Evaluator(*corpus, tags=list(TYPES), loader="list").evaluate()["overall"]
    found = semeval_scores(*read(corpus))
    assert found.keys() == set(SCHEMAS)
    for schema, scores in found.items():
        wanted = theirs["ent_type" if schema == "type" else schema]
        assert scores == {key: pytest.approx(getattr(wanted, key)) for key in KEYS}


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
