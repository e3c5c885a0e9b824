"""Classification scores against scikit-learn; entity scores are compared with seqeval's in tests/data/test_tags.py."""

from __future__ import annotations

import random

import pytest
from sklearn import metrics

from lorakit.tasks.entity_scores import prf
from lorakit.tasks.label_scores import classification_scores

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


def test_scores_per_class_equal_those_of_scikit_learn(answers):
    report = metrics.classification_report(*answers, labels=LABELS, output_dict=True, zero_division=0.0)
    scores = classification_scores(*answers, LABELS)["per_class"]
    assert list(scores) == list(LABELS)
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "support": "support"}
    assert scores == {
        label: {ours: pytest.approx(report[label][theirs]) for ours, theirs in names.items()} for label in LABELS
    }


def test_confusion_has_gold_rows_and_predicted_columns():
    confusion = classification_scores(["a", "a", "b"], ["a", "b", "b"], ("a", "b"))["confusion"]
    assert confusion == {"labels": ["a", "b"], "matrix": [[1, 1], [0, 1]]}


@pytest.mark.parametrize(
    ("counts", "scores"),
    [
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((0, 3, 0), (0.0, 0.0, 0.0)),
        ((0, 0, 3), (0.0, 0.0, 0.0)),
        ((1, 2, 4), (1 / 2, 1 / 4, 1 / 3)),
    ],
)
def test_precision_recall_and_f1_follow_from_counts(counts, scores):
    found = prf(*counts)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(scores)
    assert found["support"] == counts[-1]
