"""Sequence classification against transformers and scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from tests.tiny import items_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.data.example import Example
from lorakit.errors import ConfigError
from lorakit.recipe import TaskSection
from lorakit.tasks.sequence import SequenceClassification

LABELS = ("bad", "fine", "good")
TEXTS = ["Fine film .", "the film in Brussels , the EU .", "Peter", "black film visits Peter"]
EXAMPLES = [Example(text, label=LABELS[i % len(LABELS)]) for i, text in enumerate(TEXTS)]
PAIRS = [Example(text, label="bad", pair=f"{text} in the EU") for text in TEXTS]


@pytest.fixture
def task(word_pieces: PreTrainedTokenizerFast) -> SequenceClassification:
    return SequenceClassification(word_pieces, LABELS, max_length=32)


@pytest.fixture
def model(make_classifier: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    return make_classifier(len(LABELS))


@pytest.mark.parametrize("examples", [EXAMPLES, PAIRS], ids=["single", "pair"])
def test_batch_equals_that_of_the_tokenizer(task, examples):
    batch = task.collate(items_of(task, examples))
    pairs = [example.pair for example in examples] if examples[0].pair else None
    wanted = task.tokenizer([example.text for example in examples], pairs, padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        torch.testing.assert_close(batch[key], wanted[key])
    assert batch["labels"].tolist() == [LABELS.index(example.label) for example in examples]


@pytest.mark.parametrize("examples", [EXAMPLES, PAIRS], ids=["single", "pair"])
def test_encoding_keeps_to_the_length_limit(word_pieces, examples):
    limit = 5
    items = items_of(SequenceClassification(word_pieces, LABELS, limit), examples)
    assert max(len(item["input_ids"]) for item in items) == limit


@pytest.mark.parametrize("examples", [EXAMPLES, PAIRS], ids=["single", "pair"])
def test_loss_is_that_of_transformers_times_the_targets(task, model, examples):
    batch = task.collate(items_of(task, examples))
    assert batch["n_targets"].sum() == len(examples)
    torch.testing.assert_close(task.losses(model, batch).sum(), model(**batch).loss * len(examples))


@torch.no_grad()
def test_answers_are_probabilities_whatever_the_padding(task, model):
    items = items_of(task, EXAMPLES)
    together = torch.tensor(task.predict(model, task.collate(items)))
    alone = torch.tensor([task.predict(model, task.collate([item]))[0] for item in items])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.sum(1), torch.ones(len(items)))


def test_score_equals_that_of_scikit_learn(task):
    answers = [[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]
    predicted = ["fine", "fine", "bad", "bad"]
    score = task.evaluate(EXAMPLES, answers).scores
    assert score[task.info.metrics[0]] == accuracy_score([example.label for example in EXAMPLES], predicted)


@torch.no_grad()
def test_unlabelled_examples_are_encoded_and_answered(task, model):
    items = items_of(task, [Example(text) for text in TEXTS])
    batch = task.collate(items)
    assert "labels" not in batch
    assert len(task.predict(model, batch)) == len(TEXTS)


@pytest.mark.parametrize(("example", "more"), [(EXAMPLES[0], []), (PAIRS[0], ["pair"])], ids=["single", "pair"])
def test_json_has_text_label_score_and_probabilities(task, example, more):
    answer = [0.25, 0.25, 0.5]
    line = task.to_json(example, task.answer(example, [answer]))
    assert list(line) == ["text", *more, "label", "score", "probabilities"]
    assert (line["text"], line["label"], line["score"]) == (example.text, "good", max(answer))
    assert line["probabilities"] == dict(zip(LABELS, answer, strict=True))
    assert json.loads(json.dumps(line)) == line
    assert task.expected(example) == example.label


# Soft labels

SOFT = [
    Example(TEXTS[0], label={"bad": 0.2, "good": 0.8}),
    Example(TEXTS[1], label="fine"),
    Example(TEXTS[2], label={"fine": 0.5, "bad": 0.5}),
]


def test_loss_of_soft_labels_is_the_mean_of_hard_ones_by_their_shares(task, model):
    def hard(example: Example) -> torch.Tensor:
        return task.losses(model, task.collate(items_of(task, [example]))).sum()

    for example in SOFT:
        shares = {example.label: 1.0} if isinstance(example.label, str) else example.label
        wanted = sum(share * hard(replace(example, label=label)) for label, share in shares.items())
        torch.testing.assert_close(hard(example), wanted)


def test_loss_of_soft_and_hard_labels_together_is_their_sum(task, model):
    items = items_of(task, SOFT)
    alone = torch.stack([task.losses(model, task.collate([item])).sum() for item in items])
    torch.testing.assert_close(task.losses(model, task.collate(items)).sum(), alone.sum())


def test_soft_labels_are_scored_against_the_most_probable_one(task):
    assert [task.expected(example) for example in SOFT] == ["good", "fine", "bad"]


# Class weights


def weighted(word_pieces: PreTrainedTokenizerFast, class_weights: object) -> SequenceClassification:
    section = TaskSection(class_weights=class_weights)
    return SequenceClassification.make(section, word_pieces, LABELS, 32).fit(EXAMPLES).task


def test_balanced_weights_are_those_of_scikit_learn(word_pieces):
    wanted = compute_class_weight("balanced", classes=np.array(LABELS), y=[example.label for example in EXAMPLES])
    weights = weighted(word_pieces, "balanced").weights
    assert [weights[label] for label in LABELS] == pytest.approx(wanted)
    assert np.mean([weights[example.label] for example in EXAMPLES]) == pytest.approx(1)


def test_balanced_weights_count_shares_and_leave_out_what_is_not_there(word_pieces):
    task = SequenceClassification(word_pieces, LABELS, 32, balanced=True)
    soft = [Example("x", label={"bad": 0.5, "fine": 0.5}), Example("x", label="fine")]
    assert task.fit(soft).task.weights == pytest.approx({"bad": 2 / (2 * 0.5), "fine": 2 / (2 * 1.5)})


@pytest.mark.parametrize("class_weights", ["balanced", {"good": 3.0, "bad": 0.25}])
def test_weights_multiply_the_losses_and_not_the_divisor(word_pieces, task, model, class_weights):
    heavy = weighted(word_pieces, class_weights)
    wanted = 0.0
    for example in EXAMPLES:
        batch = task.collate(items_of(task, [example]))
        wanted += heavy.weights.get(example.label, 1.0) * task.losses(model, batch).sum()
    batch = heavy.collate(items_of(heavy, EXAMPLES))
    torch.testing.assert_close(heavy.losses(model, batch).sum(), wanted)
    assert batch["n_targets"].sum() == len(EXAMPLES)


def test_weight_of_an_unknown_label_is_refused(word_pieces):
    with pytest.raises(ConfigError, match=r"^task\.class_weights: 'goood' is not a label; did you mean 'good'\?"):
        weighted(word_pieces, {"goood": 2.0})


# Calibration

ANSWERS = [[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.4, 0.3, 0.3]]


def test_temperature_is_reported_and_left_out_of_answers_unless_asked_for(task):
    tuned = task.with_tuned(task.evaluate(EXAMPLES, ANSWERS).tuned)
    applied = replace(tuned, calibrate=True)
    raw, scores, scaled = (t.evaluate(EXAMPLES, ANSWERS).scores for t in (task, tuned, applied))
    assert "calibration" not in raw
    names = ("ece", "brier", "nll")
    assert raw.items() <= scores.items()
    assert scores["calibration"]["unscaled"] == {name: raw[name] for name in names}
    assert scores["calibration"]["scaled"] == {name: scaled[name] for name in names}
    assert scores["calibration"]["scaled"]["nll"] < scores["calibration"]["unscaled"]["nll"]
    assert (scores["calibration"]["applied"], scaled["calibration"]["applied"]) == (False, True)
    assert scores["accuracy"] == scaled["accuracy"]
    plain, mended = (t.to_json(EXAMPLES[0], ANSWERS[0]) for t in (tuned, applied))
    assert plain == task.to_json(EXAMPLES[0], ANSWERS[0])
    assert mended["label"] == plain["label"]
    assert mended["score"] == mended["probabilities"][mended["label"]] != plain["score"]
    assert sum(mended["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize("calibrate", [False, True])
def test_statistics_equal_the_scores(task, calibrate):
    tuned = replace(task.with_tuned(task.evaluate(EXAMPLES, ANSWERS).tuned), calibrate=calibrate)
    scores, statistics, _ = tuned.evaluate(EXAMPLES, ANSWERS)
    assert statistics.keys() == {key for key, value in scores.items() if isinstance(value, float)}
    for name, statistic in statistics.items():
        assert float(statistic.of(np.ones(statistic.n))) == pytest.approx(scores[name])


def test_metrics_are_among_the_scores(task):
    assert set(task.info.metrics_of(task.labels)) <= task.evaluate(EXAMPLES, ANSWERS).scores.keys()
    assert "f1" not in task.info.metrics_of(task.labels)
    assert "f1" in task.info.metrics_of(("a", "b"))
