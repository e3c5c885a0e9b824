"""Sequence classification against transformers and scikit-learn."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.metrics import accuracy_score
from tests.tiny import items_of

from lorakit.data.example import Example
from lorakit.tasks.sequence_classification import SequenceClassification

LABELS = ("bad", "fine", "good")
TEXTS = ["Fine film .", "the film in Brussels , the EU .", "Peter", "black film visits Peter"]
EXAMPLES = [Example(text, label=LABELS[i % len(LABELS)]) for i, text in enumerate(TEXTS)]
PAIRS = [Example(text, label="bad", pair=f"{text} in the EU") for text in TEXTS]


@pytest.fixture
def task(word_pieces) -> SequenceClassification:
    return SequenceClassification(word_pieces, LABELS, max_length=32)


@pytest.fixture
def model(make_classifier):
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
    assert task.n_targets(batch) == len(examples)
    torch.testing.assert_close(task.loss(model, batch), model(**batch).loss * len(examples))


def test_loss_of_a_batch_is_the_sum_of_its_rows(task, model):
    items = items_of(task, EXAMPLES)
    rows = [task.loss(model, task.collate([item])) for item in items]
    torch.testing.assert_close(task.loss(model, task.collate(items)), torch.stack(rows).sum())


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
    score = task.score(EXAMPLES, answers)
    assert score[task.metric] == accuracy_score([example.label for example in EXAMPLES], predicted)


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
