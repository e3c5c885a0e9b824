"""Several recipes trained by one call: each as alone, one that fails harms no other, and a pause changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.app.api import train_recipe, train_recipes
from lorakit.engine.events import Evaluated, Event, Note
from lorakit.engine.fit import Result
from lorakit.errors import ConfigError, DataError, NumericsError
from lorakit.recipe import Recipe
from tests.runs import changed, sections, weights

STEPS = 10  # of the tests' recipe: 2 epochs of 5


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.app.api.write_figures", lambda *arguments: None)


def recipe(bert: Path, files: Path, folder: Path, *words: str) -> Recipe:
    return changed(sections(bert, files), f"output.dir={folder}", *words)


def test_train_recipes_trains_each_as_alone_and_gives_the_error_of_one_that_fails(
    bert: Path, files: Path, tmp_path: Path
) -> None:
    good = recipe(bert, files, tmp_path / "good")
    wild = recipe(bert, files, tmp_path / "wild", "train.lr=1e38")
    wrong = recipe(bert, files, tmp_path / "wrong", "lora.target_modules=qurey")
    ok, diverged, refused = train_recipes([good, wild, wrong])
    assert isinstance(ok, Result) and ok.folder == tmp_path / "good"
    assert isinstance(diverged, NumericsError)
    assert isinstance(refused, ConfigError) and not (tmp_path / "wrong").exists()
    alone = train_recipe(recipe(bert, files, tmp_path / "alone"))
    assert weights(alone.folder) == weights(ok.folder)


def test_train_recipes_raises_what_is_wrong_with_all(bert: Path, files: Path, tmp_path: Path) -> None:
    both = [recipe(bert, files, tmp_path / str(i), "data.train=nowhere.csv", f"train.seed={i}") for i in range(2)]
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        train_recipes(both)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="each of the recipes needs a folder of its own"):
        train_recipes([both[0], both[0]])


def test_train_recipes_paused_and_resumed_equals_a_run_without_a_pause(bert: Path, files: Path, tmp_path: Path) -> None:
    straight = train_recipe(recipe(bert, files, tmp_path / "straight"))
    paused = [recipe(bert, files, tmp_path / "paused")]
    (half,) = train_recipes(paused, until=0.5)
    assert isinstance(half, Result) and half.scores["step"] == STEPS // 2
    assert not (half.folder / "scores.json").exists()
    events: list[Event] = []
    (again,) = train_recipes(paused, resume="auto", until=0.5, report=events.append)  # as after a kill
    assert isinstance(again, Result) and again.scores == half.scores
    assert not any(isinstance(event, Evaluated) for event in events)
    assert Note(f"stopped after step {STEPS // 2} of {STEPS}, and saved") in events
    (whole,) = train_recipes(paused, resume="auto")
    assert isinstance(whole, Result) and weights(whole.folder) == weights(straight.folder)
    first = json.loads((whole.folder / "metrics.jsonl").read_text().split("\n")[0])
    assert first["lr"] == json.loads((straight.folder / "metrics.jsonl").read_text().split("\n")[0])["lr"]
