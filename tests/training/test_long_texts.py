"""Runs over texts longer than the model's limit, from the data to the folder and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.data.read import read
from lorakit.inference.predictor import load
from lorakit.runtime.events import Event, Note
from lorakit.training.prepare import prepare
from tests.runs import changed, fit, sections

LIMIT = 8  # tokens; some sentences have 17 words


@pytest.fixture(scope="module")
def windowed(roberta: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = changed(sections(roberta, files, "token_classification"), f"data.max_length={LIMIT}", "task.stride=2")
    return fit(recipe, tmp_path_factory.mktemp("windowed") / "run").folder


def test_every_gold_entity_is_scored(windowed: Path, files: Path) -> None:
    scores = json.loads((windowed / "scores.json").read_text(encoding="utf-8"))
    tags = [tag for example in read(str(files / "validation.conll"), "words").examples for tag in example.tags]
    support = {kind: row["support"] for kind, row in scores["per_type"].items()}
    assert support == {kind: tags.count(f"B-{kind}") for kind in ("LOC", "PER")}


def test_folder_answers_long_texts_as_training_did(windowed: Path, files: Path) -> None:
    loaded = load(windowed)
    assert (loaded.task.max_length, loaded.side.task.stride) == (LIMIT, 2)
    examples = read(str(files / "validation.conll"), "words").examples
    lines = (windowed / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    wanted = [{key: json.loads(line)[key] for key in ("text", "entities")} for line in lines]
    assert [loaded.task.to_json(e, a) for e, a in zip(examples, loaded.answers(examples), strict=True)] == wanted


def test_windows_are_told(roberta: Path, files: Path) -> None:
    events: list[Event] = []
    recipe = changed(sections(roberta, files, "token_classification"), f"data.max_length={LIMIT}")
    parts = prepare(recipe, events.append).parts
    for name, part in parts.items():
        longer = [items for items in part.items if len(items) > 1]
        told = f"{name}: longer than 8 tokens: {len(longer)} texts, read in {sum(map(len, longer))} overlapping windows"
        assert Note(told) in events
        assert longer
    assert not any("cut" in event.text for event in events if isinstance(event, Note))
