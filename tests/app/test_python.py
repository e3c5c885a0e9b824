"""What Python offers: its names, strings and sections for `train`, what it shows on the way and in notebooks, and its types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lorakit
import lorakit.lora
from lorakit.app import api, estimators
from lorakit.errors import ConfigError, OutputError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Event, Started
from tests.runs import GOOD, write_entities, write_reviews

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
        ({"train": 3}, r"train\(\): train = 3: should be a table"),
        ({"task": "regresion"}, r"train\(\): task.name = 'regresion': should be 'sequence_cla"),
    ],
)
def test_mistakes_name_the_argument(settings: dict[str, Any], message: str, recipes: list[Recipe]) -> None:
    with pytest.raises(ConfigError, match=message):
        lorakit.train(model="minilm", data="reviews.csv", **settings)
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
