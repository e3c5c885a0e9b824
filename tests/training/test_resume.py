"""What may differ between a checkpoint and the run that goes on from it: each difference is refused or told, none silent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from lorakit.errors import ConfigError, OutputError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Event, Note
from lorakit.training.checkpoint import (
    MAY_CHANGE,
    Checkpoint,
    check_identity,
    find_checkpoint,
    identity,
    newest_checkpoint,
    same_recipe,
)
from lorakit.training.prepare import Prepared, prepare
from tests.runs import Sections, changed, fit, save_bert, sections, start


@pytest.fixture(scope="module")
def own(bert: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Sections:
    """A recipe over a base model and data that the tests here may change."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(bert, folder / "bert")
    shutil.copytree(files, folder / "data")
    raw = sections(folder / "bert", folder / "data")
    raw["data"]["test"] = str(folder / "data" / "validation.ratings.csv").replace("ratings.csv", "test.csv")
    shutil.copy(files / "validation.csv", raw["data"]["test"])
    raw["train"]["max_steps"] = 2
    return raw


@pytest.fixture(scope="module")
def checkpoint(own: Sections, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("begun")
    fit(changed(own), folder)
    return newest_checkpoint(folder / "checkpoints")[0]


def go_on(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """What is told when a run of this recipe goes on from the checkpoint."""
    told: list[Event] = []
    prepared = prepare(same_recipe(checkpoint, recipe, told.append))
    check_identity(checkpoint, prepared, told.append)
    return [event.text for event in told if isinstance(event, Note)]


def test_same_run_goes_on_without_a_word(own: Sections, checkpoint: Checkpoint) -> None:
    assert go_on(checkpoint, changed(own)) == []


CHOSEN = ("model.pooling=cls", "model.dropout=0", "data.folds=0", "data.label_names=false")  # when the run began
REFUSED = {
    "train.lr=0.5": "train.lr was 0.02, now 0.5",
    "train.seed=3": "train.seed was 0, now 3",
    "train.batch_size=4": "train.batch_size was 8, now 4",
    "train.micro_batch_size=4": "train.micro_batch_size was None, now 4",
    "train.epochs=5": "train.epochs was 2, now 5",
    "train.patience=2": "train.patience was None, now 2",
    "lora.alpha=9": "lora.alpha was 16.0, now 9",
    "lora.target_modules=query": "lora.target_modules was 'all-linear', now 'query'",
    "model.dtype=bf16": "model.dtype was 'fp32', now 'bf16'",
    "data.max_length=20": "data.max_length was None, now 20",
}


@pytest.mark.parametrize("word", REFUSED)
def test_changed_key_is_refused_with_both_values(own: Sections, checkpoint: Checkpoint, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"the recipe changed .*{REFUSED[word]}.*may change") as caught:
        same_recipe(checkpoint, changed(own, word, "train.weight_decay=0"), lambda event: None)
    assert "train.weight_decay was 0.01, now 0" in str(caught.value)  # every difference, not the first alone


@pytest.mark.parametrize(
    "word", ["output.dir=elsewhere", "train.checkpoint_every=1", "train.non_finite=skip", "data.test=other.csv"]
)
def test_key_that_may_change_is_told(own: Sections, checkpoint: Checkpoint, word: str) -> None:
    told: list[Event] = []
    key, _, value = word.partition("=")
    recipe = same_recipe(checkpoint, changed(own, word), told.append)
    assert key in MAY_CHANGE
    assert recipe == changed(own, word, *CHOSEN)
    (note,) = told
    assert isinstance(note, Note)
    assert note.text.startswith(f"--resume: {key} was ")
    assert value in note.text


@pytest.mark.parametrize("part", ["train", "validation"])
def test_data_changed_by_a_byte_are_refused(own: Sections, checkpoint: Checkpoint, part: str) -> None:
    path = Path(own["data"][part])
    before = path.read_bytes()
    path.write_bytes(before.replace(b"film", b"plot", 1))
    try:
        with pytest.raises(ConfigError, match=rf"the data changed .*sha256 of .*{part}\.csv differs"):
            go_on(checkpoint, changed(own))
    finally:
        path.write_bytes(before)


def test_changed_test_data_are_told(own: Sections, checkpoint: Checkpoint) -> None:
    path = Path(own["data"]["test"])
    before = path.read_bytes()
    path.write_bytes(before.replace(b"film", b"plot", 1))
    try:
        (note,) = go_on(checkpoint, changed(own))
        assert str(path) in note
    finally:
        path.write_bytes(before)


def test_other_base_of_the_same_name_is_refused(own: Sections, checkpoint: Checkpoint, tmp_path: Path) -> None:
    place = Path(own["model"]["base"])
    place.rename(tmp_path / "first")
    save_bert(place, seed=1)
    try:
        with pytest.raises(ConfigError, match="the base model changed"):
            go_on(checkpoint, changed(own))
    finally:
        shutil.rmtree(place)
        (tmp_path / "first").rename(place)


def test_other_tokenizer_is_refused(own: Sections, checkpoint: Checkpoint) -> None:
    path = Path(own["model"]["base"]) / "tokenizer.json"
    before = path.read_text()
    path.write_text(before.replace('"film"', '"move"'))
    try:
        with pytest.raises(ConfigError, match=r"the base model changed .*: its tokenizer has sha256"):
            go_on(checkpoint, changed(own))
    finally:
        path.write_text(before)


def test_other_machine_is_told(own: Sections, checkpoint: Checkpoint) -> None:
    machine = {**checkpoint.state["machine"], "torch": "2.0", "threads": 64}
    other = Checkpoint(checkpoint.step, checkpoint.tensors, {**checkpoint.state, "machine": machine})
    (note,) = go_on(other, changed(own))
    assert "threads was 64, now" in note
    assert "torch was 2.0, now" in note
    assert "may differ slightly" in note


def test_dtype_that_was_measured_is_kept(
    own: Sections, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(own, "model.dtype=auto")
    assert recipe.model.dtype == "auto"
    assert same_recipe(checkpoint, recipe, lambda event: None) == changed(own, *CHOSEN)
    monkeypatch.setattr("lorakit.runtime.device.bf16_gain", lambda: float("inf"))
    prepared: Prepared = prepare(recipe)
    assert 'dtype = "bf16"' in identity(prepared)["recipe"]


@pytest.mark.parametrize("kind", ["parameter", "best", "exp_avg"])
def test_tensor_of_another_shape_is_refused_and_not_stretched(
    own: Sections, checkpoint: Checkpoint, tmp_path: Path, kind: str
) -> None:
    name = next(key for key in checkpoint.tensors if key.startswith(f"{kind}/"))
    tensors = {**checkpoint.tensors, name: torch.zeros(1)}
    with pytest.raises(OutputError, match=rf"{re.escape(name)} is of shape \(1,\), not"):
        start(changed(own), tmp_path).restore(Checkpoint(checkpoint.step, tensors, checkpoint.state))


def test_no_checkpoint_yet_begins_the_run(tmp_path: Path) -> None:
    told: list[Event] = []
    assert find_checkpoint(tmp_path, "auto", told.append) is None
    assert told == [Note(f"{tmp_path}: no checkpoint yet, so starting from the first step")]


def test_checkpoints_of_which_none_is_whole_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(OutputError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, "auto", lambda event: None)
