"""Several recipes trained by one call: each as alone, one that fails harms no other, and a pause changes nothing."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from lorakit.app.api import train_recipe, train_recipes
from lorakit.app.console import score_lines
from lorakit.app.report.comparison import compare_runs
from lorakit.errors import ConfigError, DataError, NumericsError, OutputError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Evaluated, Event
from lorakit.training.results import Result
from tests.runs import changed, sections, weights

STEPS = 10  # of the tests' recipe: 2 epochs of 5


pytestmark = pytest.mark.usefixtures("no_pictures")


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
    with pytest.raises(ConfigError, match="two recipes have the same output folder; give each a different one"):
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
    (whole,) = train_recipes(paused, resume="auto")
    assert isinstance(whole, Result) and weights(whole.folder) == weights(straight.folder)
    first = json.loads((whole.folder / "metrics.jsonl").read_text().split("\n")[0])
    assert first["lr"] == json.loads((straight.folder / "metrics.jsonl").read_text().split("\n")[0])["lr"]


def test_train_seeds_leaves_mean_and_sample_deviation_beside_a_run_for_each(
    bert: Path, files: Path, tmp_path: Path
) -> None:
    several = recipe(bert, files, tmp_path / "several", "train.seeds=3,1", "train.epochs=1")
    found = train_recipe(several)
    runs = [found.folder / "seed-3", found.folder / "seed-1"]
    each = [json.loads((run / "scores.json").read_text())["nll"] for run in runs]
    scores = json.loads((found.folder / "scores.json").read_text())
    assert scores["nll"] == pytest.approx(statistics.fmean(each))
    assert scores["deviation"]["nll"] == pytest.approx(statistics.stdev(each)) and each[0] != each[1]
    assert (scores["n"], scores["seeds"]) == (2, [3, 1])
    assert f"nll                {scores['nll']:.4f} ± {statistics.stdev(each):.4f}" in score_lines(found.scores)
    facts = compare_runs([found.folder]).facts["groups"]["A"]
    assert facts["seeds"] == [1, 3]
    assert facts["scores"]["nll"]["deviation"] == pytest.approx(statistics.stdev(each))
    with pytest.raises(OutputError, match="exists already"):
        train_recipe(several)


def test_train_seeds_leaves_nothing_after_a_mistake(bert: Path, files: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        train_recipe(recipe(bert, files, tmp_path / "several", "train.seeds=0,1", "data.train=nowhere.csv"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "recipe.toml").write_text(recipe(bert, files, tmp_path).to_toml())
    (tmp_path / "several" / "notes.txt").write_text("mine")
    with pytest.raises(DataError):
        mistaken = recipe(bert, files, tmp_path / "several", "train.seeds=0,1", "data.train=nowhere.csv")
        train_recipe(mistaken, resume="auto")
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == ["notes.txt", "recipe.toml"]
    with pytest.raises(ConfigError, match=r"train\.seed = 4 and train\.seeds = \[0, 1\]: set one of them"):
        recipe(bert, files, tmp_path, "train.seeds=0,1", "train.seed=4")
    with pytest.raises(ConfigError, match="the same seed twice"):
        recipe(bert, files, tmp_path, "train.seeds=1,1")
