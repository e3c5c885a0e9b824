"""What Python offers: its names, strings and sections for `train`, what it shows on the way and in notebooks, and its types."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lorakit
import lorakit.lora
from lorakit.app import api, estimators
from lorakit.app.api import train_recipe, train_recipes
from lorakit.app.console import score_lines
from lorakit.app.report.comparison import compare_runs
from lorakit.errors import ConfigError, DataError, NumericsError, OutputError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Evaluated, Event, Started
from lorakit.training.results import Result
from tests.runs import GOOD, changed, scores_of, sections, weights, write_entities, write_reviews

ROOT = Path(__file__).parents[2]


def test_dir_has_the_public_names_and_each_is_there() -> None:
    for module in (lorakit, lorakit.lora):
        assert dir(module) == sorted(module.__all__)
        assert all(getattr(module, name) is not None for name in dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'tain'"):
        _ = lorakit.tain  # type: ignore[attr-defined]


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """Where each recipe goes instead of being trained."""
    trained: list[Recipe] = []
    monkeypatch.setattr(api, "train_recipe", lambda recipe, **options: trained.append(recipe))
    monkeypatch.chdir(tmp_path)
    write_reviews(Path("reviews.csv"), 4)
    write_entities(Path("notes.conll"), 4)
    return trained


def test_strings_and_shortcuts_stand_for_keys_of_sections(recipes: list[Recipe]) -> None:
    lorakit.train(model="minilm", data=Path("reviews.csv"), lr=1e-3, r=4, folder=Path("a"), train={"epochs": 2})
    sections: Mapping[str, Any] = {
        "model": {"base": "minilm"},
        "data": {"train": "reviews.csv"},
        "lora": {"r": 4},
        "train": {"epochs": 2, "lr": 1e-3},
        "output": {"dir": "a"},
    }
    lorakit.train(**sections)
    assert recipes[0] == recipes[1] and recipes[0].train.lr == 1e-3
    lorakit.train(model="minilm", data="notes.conll")
    lorakit.train(model="minilm", data="reviews.csv", task="regression")
    lorakit.train(model="minilm", data={"train": "notes.conll"}, task={"crf": True})
    names = ["token_classification", "sequence_regression", "token_classification"]
    assert [recipe.task.name for recipe in recipes[2:]] == names
    assert set(estimators.KNOBS) == {"model", *api.SHORTCUTS}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lrr": 1}, r"train\(\) has no argument 'lrr'; did you mean 'lr'\?"),
        ({"warmup": 0.1}, r"train\(\) has no argument 'warmup'; write train={'warmup': 0.1}"),
        ({"lr": 1.0, "train": {"lr": 2.0}}, r"lr=1.0 and train={'lr': 2.0}: set one of them"),
        ({"train": {"lrr": 2.0}}, r"train\(\): unknown key 'train.lrr'; did you mean 'train.lr'"),
        ({"test_size": 0.2}, r"train\(\) has no argument 'test_size'; did you mean 'validation_share'\?"),
        ({"class_weight": "balanced"}, r"'class_weight'; write task={'class_weights': 'balanced'}"),
        ({"learning_rate": 2.0}, r"train\(\) has no argument 'learning_rate'; did you mean 'lr'\?"),
        ({"lora": {"rank": 2}}, r"train\(\): unknown key 'lora.rank'; did you mean 'lora.r'\?"),
        ({"data": [["A delight.", "good"]]}, r"train\(\): data is a list, not the name of a file; save it as one, or "),
        ({"train": 3}, r"train\(\): train = 3: should be a table"),
        ({"task": "regresion"}, r"train\(\): task.name = 'regresion': should be 'sequence_cla"),
    ],
)
def test_mistakes_name_the_argument(settings: dict[str, Any], message: str, recipes: list[Recipe]) -> None:
    with pytest.raises(ConfigError, match=message):
        lorakit.train(**{"model": "minilm", "data": "reviews.csv", **settings})
    assert recipes == []


@pytest.mark.usefixtures("no_pictures")
def test_result_and_predictor_answer_and_are_short(
    bert: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    data = {"train": str(files / "train.csv"), "folds": 0}
    small: Mapping[str, Any] = {"model": bert, "data": data, "train": {"max_steps": 1, "head_start": "random"}}
    result = lorakit.train(**small, folder=tmp_path / "run", report=events.append)
    assert isinstance(events[0], api.Note) and any(isinstance(event, Started) for event in events)
    assert capsys.readouterr().err == ""  # neither a terminal nor a notebook, and there is a report
    assert result.predict(GOOD[0]) == lorakit.load(result.folder).predict(GOOD[0])
    assert repr(result).startswith(f"Result({str(result.folder)!r}, accuracy {result.scores['accuracy']:.4f} [")
    assert repr(result.predictor) == f"Predictor({str(bert)!r}, sequence_classification, 2 labels: bad, good)"
    with pytest.raises(DataError, match="text 2 of 2: nan is neither a text nor a pair of texts"):
        result.predict([GOOD[0], math.nan])  # type: ignore[list-item]
    with pytest.raises(OutputError, match=r"`lorakit report .*` writes it"):
        result.report()
    lorakit.train(**small, folder=tmp_path / "loud", verbose=True)
    assert "validation accuracy" in capsys.readouterr().err


ACCEPTED = """
from pathlib import Path
import lorakit
from lorakit.lora import LoraConfig
result = lorakit.train(
    model={"base": "minilm", "dropout": 0.0}, data={"train": "reviews.csv", "label": ["a", "b"]}, task="ner",
    lora={"target_modules": ["query", "value"]}, train={"epochs": 3, "schedule": "cosine"}, lr=1e-3, folder=Path("a"),
)
again: lorakit.Result = lorakit.train(model="minilm", data="reviews.csv", verbose=False)
label: str = result.predict("What a film!")["label"]
predictor: lorakit.Predictor = lorakit.load(result.folder)
page: Path = result.report()
config = LoraConfig(r=8)
"""
REFUSED = {  # by what mypy says of it
    'incompatible type "dict[str, float]"; expected "TrainKeys': "lorakit.train(model='a', data='b', train={'lrr': 0.1})",
    'incompatible type "dict[str, str]"; expected "TrainKeys': "lorakit.train(model='a', data='b', train={'lr': 'x'})",
    'expected "str | Path | ModelKeys"': "lorakit.train(model={'dropout': 0.1}, data='b')",
    'Unexpected keyword argument "lrr"': "lorakit.train(model='a', data='b', lrr=0.1)",
    'Module has no attribute "tain"': "lorakit.tain()",
}


@pytest.mark.slow
def test_types_accept_a_script_and_refuse_wrong_keys(tmp_path: Path) -> None:
    (tmp_path / "accepted.py").write_text(ACCEPTED)
    (tmp_path / "refused.py").write_text("\n".join(["import lorakit", *REFUSED.values()]))
    words = ["--strict", "--cache-dir", str(ROOT / ".mypy_cache" / "of-a-user"), "accepted.py", "refused.py"]
    done = subprocess.run([sys.executable, "-m", "mypy", *words], cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    for number, (message, error) in enumerate(zip(REFUSED, errors, strict=True), start=2):
        assert error.startswith(f"refused.py:{number}: ") and message in error


# Several recipes trained by one call: each as alone, one that fails harms no other, and a pause changes nothing.


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
    each = [scores_of(run)["nll"] for run in runs]
    scores = scores_of(found.folder)
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
