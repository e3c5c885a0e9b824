"""`lorakit check`: facts and verdict of a file or a recipe, lengths against a model, and labels that a run does not believe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cleanlab.filter import find_label_issues

from lorakit.app.checking import CUT, suspects, unlikely_labels
from lorakit.data.example import Example
from lorakit.data.read import read
from lorakit.errors import ConfigError
from lorakit.inference.predictor import Predictor, load
from lorakit.recipe import TaskSection
from lorakit.tasks.sequence import MultiLabelClassification
from tests.app.conftest import Cli
from tests.runs import changed, reviews, sections, write_reviews

FLIP = {"good": "bad", "bad": "good"}
SURE = 0.9


def facts(cli: Cli, *words: object) -> dict[str, Any]:
    code, out, err = cli("check", *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_check_of_a_file_counts_and_ends_with_a_verdict(cli: Cli, tmp_path: Path) -> None:
    write_reviews(tmp_path / "mine.csv", n=12)
    shown = facts(cli, "mine.csv")
    assert shown["parts"].keys() == {"train"}
    assert shown["parts"]["train"]["examples"] == 12
    assert shown["parts"]["train"]["labels"] == {"good": 6, "bad": 6}
    assert shown["parts"]["train"]["tokens"] is None
    assert (shown["verdict"], shown["ready"]) == ("ready to train", True)
    lines = cli("check", "mine.csv").out.splitlines()
    assert lines[-1] == "ready to train"
    assert "train: 12 examples" in lines
    assert "  2 labels: good: 6 (50.0%); bad: 6 (50.0%); none: 0" in lines


def test_check_of_a_recipe_looks_at_all_parts(cli: Cli, bert: Path, files: Path, tmp_path: Path) -> None:
    rows = (files / "train.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([*rows[:3], "brand new,odd"]) + "\n")
    (tmp_path / "small.toml").write_text(changed(sections(bert, files), "data.test=test.csv").to_toml())
    shown = facts(cli, "small.toml")
    sizes = {name: part["examples"] for name, part in shown["parts"].items()}
    assert (sizes, shown["ready"]) == ({"train": 36, "validation": 12, "test": 3}, False)
    assert "texts of test that are also in train: 2 (66.7%)" in shown["verdict"]
    assert "labels that do not occur in train: 1" in shown["verdict"]
    assert "\nproblem: labels that do not occur in train: 1\n  odd\n" in cli("check", "small.toml").out


def test_check_of_a_recipe_without_validation_finds_no_text_on_both_sides_of_the_split(
    cli: Cli, bert: Path, tmp_path: Path
) -> None:
    lines = [f"{text},{label}" for text, label in reviews(30)] * 2
    (tmp_path / "twice.csv").write_text("\n".join(["text,label", *lines]))
    raw = {**sections(bert, tmp_path), "data": {"train": "twice.csv"}}
    (tmp_path / "small.toml").write_text(changed(raw).to_toml())
    assert facts(cli, "small.toml")["verdict"] == "ready to train"


def test_check_with_a_model_counts_tokens_and_what_is_cut(cli: Cli, bert: Path, tmp_path: Path) -> None:
    short, long = "the film was superb", "the " * 70
    rows = [f"{short} {word},{label}" for word, label in (("a", "good"), ("cast", "bad"))] * 6
    (tmp_path / "long.csv").write_text("\n".join(["text,label", *rows, f"{long},good"]))
    shown = facts(cli, "long.csv", "--model", bert)
    tokens = shown["parts"]["train"]["tokens"]
    assert (tokens["limit"], tokens["texts"], tokens["lengths"]["max"]) == (64, 1, 64)
    assert tokens["lengths"]["min"] == 7  # five words, [CLS] and [SEP]
    assert CUT < 1 / 13
    assert shown["verdict"] == "1 problem: train: texts cut at 64 tokens: 1 (7.7%)"
    assert facts(cli, "long.csv", "--model", bert, "data.max_length=8")["parts"]["train"]["tokens"]["limit"] == 8


@pytest.mark.parametrize(("model", "cut"), [("roberta", 0), ("t5", 12)])
def test_check_of_entities_counts_types_and_cut_targets(
    cli: Cli, request: pytest.FixtureRequest, files: Path, model: str, cut: int
) -> None:
    words = ("--model", request.getfixturevalue(model)) + (("task.max_target_length=8",) if cut else ())
    shown = facts(cli, files / "validation.conll", *words)
    part = shown["parts"]["train"]
    assert part["labels"] == {"PER": 12, "LOC": 12}
    assert part["tokens"]["targets"] == cut
    assert shown["ready"] == (not cut)
    assert any("tag scheme IOB2" in note for note in shown["notes"])


def test_check_names_what_training_would_refuse(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\na,good\nb,good\n")
    assert "every training example has the label 'good'" in facts(cli, "one.csv")["verdict"]


# Suspected label errors


def probabilities(labels: tuple[str, ...], truth: str) -> list[float]:
    """Probabilities of a run that is rather sure of the truth."""
    return [SURE if label == truth else (1 - SURE) / (len(labels) - 1) for label in labels]


def test_suspects_are_cleanlab_s() -> None:
    chance = np.random.default_rng(0)
    gold = chance.integers(0, 3, 60)
    given = gold.copy()
    given[:4] = (gold[:4] + 1) % 3
    table = 0.1 + 0.7 * np.eye(3)[gold] + chance.uniform(0, 0.05, (60, 3))
    table /= table.sum(1, keepdims=True)
    places = [(str(i), "text") for i in range(60)]
    rows = [dict(zip("abc", row, strict=True)) for row in table]
    found = unlikely_labels(places, ["abc"[label] for label in given], rows)
    expected = find_label_issues(given, table, return_indices_ranked_by="self_confidence", n_jobs=1)
    numbers = [int(suspect.where) for suspect in found]
    assert numbers == expected.tolist()
    assert set(numbers) == {0, 1, 2, 3}
    assert [suspect[2:4] for suspect in found] == [("abc"[given[i]], "abc"[gold[i]]) for i in numbers]
    each = unlikely_labels(places, [["abc"[label]] for label in given], rows)
    wanted = set()
    for number, label in enumerate("abc"):
        is_given, both = (given == number).astype(int), np.stack([1 - table[:, number], table[:, number]], 1)
        names = (f"not {label}", label)
        issues = np.flatnonzero(find_label_issues(is_given, both, n_jobs=1)).tolist()
        wanted |= {(str(i), names[is_given[i]], names[1 - is_given[i]]) for i in issues}
    assert {(suspect[0], *suspect[2:4]) for suspect in each} == wanted
    assert ("0", "abc"[given[0]], f"not {'abc'[given[0]]}") in wanted


def test_suspects_are_the_labels_that_were_flipped(
    bert_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = reviews(60)
    flipped = {3, 17, 40}
    rows = [f"{text},{FLIP[label] if i in flipped else label}" for i, (text, label) in enumerate(truth)]
    (tmp_path / "noisy.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    predictor = load(bert_run)
    labels = predictor.task.labels
    monkeypatch.setattr(Predictor, "answers", lambda *_: [probabilities(labels, label) for _, label in truth])
    found = suspects(predictor, read(str(tmp_path / "noisy.csv")).examples)
    assert {suspect.where for suspect in found} == {f"{tmp_path / 'noisy.csv'}:{i + 2}" for i in flipped}
    assert {(s.given, s.suggested) for s in found} <= {("good", "bad"), ("bad", "good")}
    assert {s.probability for s in found} == {SURE}


def test_suspects_among_several_labels_are_each_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = [("a",) * (i % 2) + ("b",) * (i % 3 == 0) for i in range(60)]
    task = MultiLabelClassification(None, ("a", "b"), 64)
    side = SimpleNamespace(labels=task.labels, task=TaskSection(name=task.info.name))
    predictor = Predictor(None, task, side, None, None)
    answers = [[SURE if label in labels else 1 - SURE for label in task.labels] for labels in truth]
    monkeypatch.setattr(Predictor, "answers", lambda *_: answers)
    noisy = {7: ("a", "b"), 30: ()}  # truly a, and b
    examples = [Example(f"text {i}", noisy.get(i, labels), where=f"x:{i}") for i, labels in enumerate(truth)]
    found = {(s.where, s.given, s.suggested) for s in suspects(predictor, examples)}
    assert found == {("x:7", "b", "not b"), ("x:30", "not b", "b")}


def test_suspects_among_tags_name_the_word(tagger_run: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load(tagger_run)
    examples = list(read(str(files / "train.conll"), "words").examples)
    labels = predictor.task.labels
    truth = [torch.tensor([probabilities(labels, tag) for tag in example.tags]).log() for example in examples]
    halves = [[SimpleNamespace(log_p=half) for half in log_p.split(2)] for log_p in truth]  # as windows give them
    monkeypatch.setattr("lorakit.app.checking.predict_all", lambda *_: halves)
    wrong = examples[5]
    assert wrong.tags[0] == "B-PER"
    examples[5] = type(wrong)(wrong.text, words=wrong.words, tags=("O", *wrong.tags[1:]), where=wrong.where)
    (suspect,) = suspects(predictor, examples)
    assert (suspect.where, suspect.given, suspect.suggested) == (wrong.where, "O", "B-PER")
    assert suspect.text == f"{wrong.words[0]} (word 1)"


def test_check_with_a_run_lists_suspects_and_says_that_training_data_hide_errors(
    cli: Cli, bert_run: Path, files: Path, tmp_path: Path
) -> None:
    shown = facts(cli, files / "train.csv", "--run", bert_run)
    assert shown["suspects"].keys() == {"train"}
    assert shown["parts"]["train"]["tokens"]["limit"] == load(bert_run).side.max_length
    out = cli("check", files / "train.csv", "--run", bert_run).out
    assert "suspected label errors in train: " in out
    assert "it may have memorised label errors" in out
    write_reviews(tmp_path / "new.csv", n=12, seed=9)
    assert "memorised label errors" not in cli("check", "new.csv", "--run", bert_run).out


def test_check_without_cleanlab_says_how_to_get_it(
    cli: Cli, bert_run: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cleanlab"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    code, out, _ = cli("check", files / "validation.csv", "--run", bert_run)
    assert code == 0
    assert "note: suspected label errors need an extra: pip install 'lorakit[cleanlab]'" in out


def test_tasks_without_probabilities_have_no_suspects(t5_run: Path, files: Path) -> None:
    with pytest.raises(
        ConfigError, match="text2text_ner: label errors can only be found for tasks that give each label a probability"
    ):
        suspects(load(t5_run), read(str(files / "validation.conll"), "words").examples[:1])


def test_held_out_examples_share_no_group_with_training(cli: Cli, bert: Path, tmp_path: Path) -> None:
    rows = [f"text {i},{'good' if i % 4 else 'bad'},user {i // 10}" for i in range(200)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label,user", *rows]) + "\n")
    raw = {**sections(bert, tmp_path), "data": {"train": "reviews.csv", "group": "user"}}
    (tmp_path / "grouped.toml").write_text(changed(raw).to_toml())
    shown = facts(cli, "grouped.toml")
    assert shown["parts"]["validation"]["labels"] == {"good": 15, "bad": 5}
    assert (
        "20 examples (10%) are held out, chosen by seed 0, the same share of each label, and no user is on both sides"
    ) in shown["notes"][-1]
    assert not [finding for finding in shown["findings"] if "groups of" in finding["name"]]
