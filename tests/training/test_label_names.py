"""The names of labels as texts that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lorakit.data.example import Example
from lorakit.errors import ConfigError
from lorakit.recipe import make_recipe
from lorakit.runtime.events import Event
from lorakit.training.parts import FEW_PER_LABEL, label_texts
from lorakit.training.prepare import prepare
from tests.runs import changed, fit, resumed, sections


def texts(labels: Sequence[str], n: int, task: str = "sequence_classification", **data: bool) -> list[Example]:
    recipe = make_recipe({"model": {"base": "x"}, "data": data, "task": {"name": task}})
    label = (labels[0],) if task == "multi_label_classification" else labels[0]
    return label_texts(recipe, labels, [Example(text="a", label=label)] * n, tokenize)


def tokenize(texts: list[str]) -> dict[str, list[list[int]]]:
    return {"input_ids": [[min(ord(char), 255) for char in text] for text in texts]}


def test_are_trained_on_where_few_texts_have_labels_that_are_words() -> None:
    assert [(e.text, e.label) for e in texts(("card_arrival", "lost-card"), 2 * FEW_PER_LABEL)] == [
        ("card arrival", "card_arrival"),
        ("lost card", "lost-card"),
    ]
    assert [e.label for e in texts(("joy", "fear"), 9, "multi_label_classification")] == [("joy",), ("fear",)]
    assert len(texts(("gut", "schön"), 9, "ordinal_classification")) == 2
    assert not texts(("joy", "fear"), 2 * FEW_PER_LABEL + 1)
    assert len(texts(("joy", "fear"), 2 * FEW_PER_LABEL + 1, label_names=True)) == 2
    assert not texts(("joy", "fear"), 9, label_names=False)
    assert not texts(("0", "1"), 9)
    assert not texts(("LABEL_0", "LABEL_1"), 9)  # would be one text under two labels
    assert not texts(("体育", "音乐"), 9)  # the same, to this tokenizer
    assert [e.text for e in texts(("0", "joy"), 9, label_names=True)] == ["0", "joy"]


def test_need_single_texts_with_labels(bert: Path, files: Path) -> None:
    recipe = make_recipe({"model": {"base": "x"}, "data": {"label_names": True}})
    with pytest.raises(ConfigError, match=r"label_names = true: .* these examples are pairs of texts"):
        label_texts(recipe, ("yes", "no"), [Example(text="a", pair="b", label="yes")], tokenize)
    with pytest.raises(ConfigError, match=r"label_names = true: texts do not have labels in .*'token_classification'"):
        changed(sections(bert, files, "token_classification"), "data.label_names=true")


def test_are_noted_and_belong_to_training_alone(roberta: Path, files: Path, tmp_path: Path) -> None:
    raw = sections(roberta, files)
    notes: list[Event] = []
    prepared = prepare(changed(raw), notes.append)
    train, validation = prepared.parts["train"], prepared.parts["validation"]
    tokenizer = prepared.base.tokenizer
    assert [tokenizer.decode(item["input_ids"][1:-1]) for item in train.flat[-2:]] == ["bad", "good"]
    assert (len(train.examples), len(train.items), len(train.flat)) == (36, 36, 38)
    assert not validation.names
    assert any("names of the 2 labels" in str(note) for note in notes)
    del raw["data"]["validation"]
    folded = prepare(changed(raw, "data.folds=2"))
    assert len(folded.parts["validation"].examples) == len(folded.fold_of) == 36
    whole = fit(changed(raw, "data.folds=2", "train.max_steps=2"), tmp_path / "run")
    assert whole.scores["examples"] == {"train": 36, "validation": 36}
    again = resumed(changed(raw, "data.folds=2", "train.max_steps=2"), tmp_path / "run")
    assert again.prepared.recipe.data.label_names
