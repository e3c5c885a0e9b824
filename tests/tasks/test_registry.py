"""Labels are found in a fixed order, and those that cannot be learned are refused."""

from __future__ import annotations

import random
import re

import pytest

from lorakit.data.example import Example, of_words
from lorakit.errors import AdapterError, ConfigError, DataError
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.registry import check_labels, find_labels, make_task

WORD_TASKS = [name for name, kind in TASKS.items() if kind.wants == "words"]


def texts(*labels: str) -> list[Example]:
    return [Example("text", label=label, where=f"a.csv:{line}") for line, label in enumerate(labels, start=2)]


def sentences(*tags: str) -> list[Example]:
    rows = [row.split() for row in tags]
    return [of_words(["x"] * len(row), row, f"a.conll:{line}") for line, row in enumerate(rows, start=1)]


@pytest.mark.parametrize(
    "labels",
    [
        ("0", "1", "2", "10", "11"),
        ("-10", "-1", "0", "1"),
        ("1", "2", "10", "a", "b"),
        ("0", "07", "7", "8"),
        ("B", "a", "b"),
        ("1", "-", "--1", "1.5"),
        ("neg", "pos"),
    ],
)
def test_labels_are_ordered_numbers_by_value_then_names(labels):
    for seed in range(3):
        shuffled = random.Random(seed).sample(labels * 2, 2 * len(labels))
        assert find_labels("sequence_classification", texts(*shuffled)) == labels
        several = [Example("x", label=tuple(shuffled[i : i + 2])) for i in range(0, len(shuffled), 2)]
        assert find_labels("multi_label_classification", [*several, Example("x", label=())]) == labels


def test_numbers_have_no_labels():
    examples = [Example("x", label=1.0, where="a.csv:2")]
    assert find_labels("sequence_regression", examples) == ()
    check_labels("sequence_regression", examples, ())


@pytest.mark.parametrize("name", TASKS)
def test_metric_of_the_recipe_is_one_of_the_tasks(name):
    metrics = TASKS[name].metrics
    assert TaskSection(name=name).selection_metric == metrics[0]
    assert [TaskSection(name=name, metric=metric).selection_metric for metric in metrics] == [*metrics]
    wrong = metrics[0] + "s"
    message = f"task.metric = {wrong!r} is not a score of {name}; did you mean {metrics[0]!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskSection(name=name, metric=wrong)


def test_f1_of_one_label_takes_two_labels(word_pieces):
    section = TaskSection(name="sequence_classification", metric="f1")
    with pytest.raises(
        ConfigError, match=r"^task\.metric = 'f1' is not a score of sequence_classification; known: acc"
    ):
        make_task(section, word_pieces, ("a", "b", "c"), 32)


@pytest.mark.parametrize("name", ["multi_label_classification", "sequence_regression"])
def test_damaged_tuning_is_refused(name, word_pieces):
    with pytest.raises(AdapterError, match=f"damaged: tuned values do not fit {name}"):
        make_task(TaskSection(name=name), word_pieces, ("a", "b"), 32, {"thresholds": {"a": 0.5}, "mean": "x"})


def test_labels_of_words_are_tags_or_types():
    examples = sentences("O B-PER I-PER", "B-LOC O")
    assert find_labels("token_classification", examples) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert find_labels("text2text_ner", examples) == ("LOC", "PER")


@pytest.mark.parametrize("task", WORD_TASKS)
def test_types_of_words_are_checked(task):
    known = find_labels(task, sentences("B-PER B-LOC"))
    check_labels(task, sentences("O I-PER", "O"), known)
    with pytest.raises(DataError, match=r"^a\.conll:2: label 'PERS' is not in the training data; did you mean 'PER'\?"):
        check_labels(task, sentences("O B-PER", "O B-PERS"), known)
    with pytest.raises(DataError, match=r"^a\.conll: the training data has no entities: every tag is O"):
        find_labels(task, sentences("O O", "O"))


def test_labels_of_texts_are_checked():
    check_labels("sequence_classification", [Example("text")], ("a", "b"))
    several = Example("x", label=("a", "c"), where="a.csv:2")
    for task, examples, message in (
        (
            "sequence_classification",
            texts("positive", "postive"),
            "a.csv:3: label 'postive' is not in the training data",
        ),
        ("multi_label_classification", [several], "a.csv:2: label 'c' is not in the training data"),
    ):
        with pytest.raises(DataError, match="^" + re.escape(message)):
            check_labels(task, examples, ("a", "b", "negative", "positive"))
    nothing = [Example("x", label=(), where="a.csv:2")]
    for task, examples, message in (
        (
            "sequence_classification",
            texts("x", "x"),
            "every training example has the label 'x'; at least two labels are",
        ),
        ("multi_label_classification", nothing, "no training example has a label"),
    ):
        with pytest.raises(DataError, match=f"^a.csv: {message}"):
            find_labels(task, examples)


@pytest.mark.parametrize("name", TASKS)
def test_task_made_from_a_recipe_has_its_facts(name, word_pieces, byte_tokenizer):
    tokenizer = byte_tokenizer if TASKS[name].model_kind == "text2text" else word_pieces
    assert make_task(TaskSection(name=name), tokenizer, ("a", "b"), 32).info is TASKS[name]


def test_knobs_of_text_to_text_reach_the_task(byte_tokenizer):
    section = TaskSection(name="text2text_ner", prefix="find: ", max_target_length=9)
    task = make_task(section, byte_tokenizer, ("PER",), 32)
    assert (task.prefix, task.max_target_length, task.max_length) == ("find: ", 9, 32)
