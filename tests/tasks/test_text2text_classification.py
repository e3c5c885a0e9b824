"""Labels written out by a tiny T5: probabilities by brute force, scores, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny import items_of, taught
from transformers import ByT5Tokenizer, T5ForConditionalGeneration

from lorakit.data.example import Example
from lorakit.errors import ConfigError, NumericsError
from lorakit.recipe import TaskSection
from lorakit.tasks.registry import make_task
from lorakit.tasks.text2text.classification import Named, Text2TextClassification, label_log_p

LABELS = ("bad", "bad film", "fine", "good")  # one is the beginning of another
EXAMPLES = [
    Example("a fine film", "fine"),
    Example("dull", "bad"),
    Example("so good", "good"),
    Example("the worst film of all", {"bad film": 0.7, "bad": 0.3}),
]
GOLD = ["fine", "bad", "good", "bad film"]


@pytest.fixture(scope="module")
def task(byte_tokenizer: ByT5Tokenizer) -> Text2TextClassification:
    return make_task(TaskSection(name="text2text_classification"), byte_tokenizer, LABELS, 64)


@pytest.fixture(scope="module")
def trained(task: Text2TextClassification, make_writer: Callable[[], T5ForConditionalGeneration]) -> torch.nn.Module:
    return taught(make_writer(), task, task.collate(items_of(task, EXAMPLES)))


@torch.no_grad()
def by_brute_force(model: Any, ids: list[int], labels: list[list[int]]) -> list[float]:
    """Each label's probability, token by token, each among the tokens that some label has there."""
    found = []
    for label in labels:
        decoder = torch.tensor([[model.config.decoder_start_token_id, *label[:-1]]])
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits[0]
        log_p = 0.0
        for i, token in enumerate(label):
            rivals = sorted({other[i] for other in labels if other[:i] == label[:i]})
            log_p += logits[i, rivals].log_softmax(-1)[rivals.index(token)].item()
        found.append(log_p)
    return found


def test_defaults_of_the_recipe_are_the_tasks_own():
    section = TaskSection.model_validate({"name": "text2text_classification"})
    assert (section.prefix, section.constrained) == ("classify: ", True)
    said = TaskSection.model_validate({"name": "text2text_classification", "prefix": "", "constrained": False})
    assert (said.prefix, said.constrained) == ("", False)
    assert TaskSection.model_validate({"name": "text2text_ner"}).constrained is False


def test_inputs_have_the_prefix_and_targets_are_the_labels(task, byte_tokenizer):
    items = items_of(task, EXAMPLES)
    written = [byte_tokenizer.decode(item["input_ids"], skip_special_tokens=True) for item in items]
    assert written == [f"classify: {example.text}" for example in EXAMPLES]
    assert [byte_tokenizer.decode(item["labels"], skip_special_tokens=True) for item in items] == GOLD


def test_pairs_stand_behind_each_other(task, byte_tokenizer):
    (item,) = items_of(task, [Example("one", "bad", pair="two")])
    assert item["input_ids"] == byte_tokenizer("classify: one", "two")["input_ids"]


def test_probabilities_of_labels_are_those_by_brute_force_and_sum_to_one(task, trained):
    items = items_of(task, EXAMPLES)
    found = label_log_p(trained, task.collate(items), task.written)
    wanted = [by_brute_force(trained, item["input_ids"], task.written) for item in items]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(EXAMPLES)))


@torch.no_grad()
def test_training_teaches_labels_constrained_and_free(task, trained, byte_tokenizer):
    free = Text2TextClassification(byte_tokenizer, LABELS, 64, constrained=False)
    for one in (task, free):
        raws = one.predict(trained, one.collate(items_of(one, EXAMPLES)))
        answers = [one.answer(example, [raw]) for example, raw in zip(EXAMPLES, raws, strict=True)]
        assert [answer.text for answer in answers] == GOLD
        scores = one.evaluate(EXAMPLES, answers).scores
        assert (scores["accuracy"], scores["unknown"]) == (1.0, 0.0)


def test_unknown_answers_are_wrong_and_counted(byte_tokenizer):
    task = Text2TextClassification(byte_tokenizer, LABELS, 64, constrained=False)
    answers = [Named(text, 0.5) for text in ("fine", "baad", "", "bad film")]
    scores = task.evaluate(EXAMPLES, answers).scores
    assert (scores["accuracy"], scores["unknown"]) == (1 / 2, 1 / 2)
    statistics = task.evaluate(EXAMPLES, answers).statistics
    assert statistics["unknown"].value(statistics["unknown"].counts.sum(0)) == scores["unknown"]
    lines = [task.to_json(example, answer) for example, answer in zip(EXAMPLES, answers, strict=True)]
    assert [line["label"] for line in lines] == ["fine", None, None, "bad film"]
    assert [line["generated"] for line in lines] == [answer.text for answer in answers]


def test_json_has_the_label_and_the_probability_of_each(task):
    line = task.to_json(EXAMPLES[0], Named("fine", 0.4, (0.1, 0.2, 0.4, 0.3)))
    assert line == {
        "text": "a fine film",
        "label": "fine",
        "score": 0.4,
        "probabilities": dict(zip(LABELS, (0.1, 0.2, 0.4, 0.3), strict=True)),
    }


def test_answer_that_is_not_finite_is_refused(task):
    with pytest.raises(NumericsError, match="not finite"):
        task.answer(EXAMPLES[0], [Named("fine", math.nan)])


def test_label_that_the_tokenizer_cannot_write_is_refused(byte_tokenizer, word_pieces):
    section = TaskSection(name="text2text_classification")
    for tokenizer, label in ((byte_tokenizer, "</s>"), (word_pieces, "Unseen")):
        with pytest.raises(ConfigError, match=f"decodes the label '{label}' as"):
            make_task(section, tokenizer, ("film", label), 64)


def test_cut_texts_are_counted(byte_tokenizer):
    task = Text2TextClassification(byte_tokenizer, LABELS, 16)
    long = [len(byte_tokenizer("classify: " + example.text)["input_ids"]) > 16 for example in EXAMPLES]
    assert task.cut(EXAMPLES, task.encode(EXAMPLES)).texts == sum(long) > 0
