"""What is chosen where a recipe leaves it open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.recipe import TrainSection, read_recipe
from lorakit.runtime.events import Event, Note
from lorakit.training.budget import EVALUATIONS, LOOKS, ROWS, TWO_LABELS, choose
from lorakit.training.checkpoint import newest_checkpoint, same_recipe
from tests.runs import changed, fit, sections


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("n", [1, 100, 101, 2_000, 9_999, 70_000])
def test_every_number_of_examples_has_a_row(n: int, is_binary: bool) -> None:
    notes: list[Event] = []
    chosen = choose(TrainSection(), n, is_binary, notes.append)
    row = next(row for row in (*(TWO_LABELS if is_binary else ()), *ROWS) if n <= row.examples)
    assert (chosen.epochs, chosen.batch_size, chosen.lr) == (row.epochs, row.batch_size, row.lr)
    steps = chosen.epochs * -(-n // chosen.batch_size)
    assert chosen.eval_every is not None and steps / chosen.eval_every <= EVALUATIONS
    assert str(notes).count("train.") == 3
    seldom = choose(TrainSection(), n, is_binary, keeps_last=True).eval_every
    assert seldom is not None and chosen.eval_every <= seldom and steps / seldom <= LOOKS


def test_what_the_recipe_says_stays() -> None:
    said = TrainSection(epochs=7, batch_size=5, lr=0.25)
    assert choose(said, 1000, True, pytest.fail).model_dump() == said.model_dump()
    assert choose(TrainSection(max_steps=900), 20, True).epochs * 2 >= 900  # none of them is in the way of max_steps
    assert choose(TrainSection(method="full"), 20, True).lr < choose(TrainSection(), 20, True).lr / 5


def test_resolved_recipe_has_what_was_chosen_and_resumes_with_it_left_open(
    bert: Path, files: Path, tmp_path: Path
) -> None:
    raw = sections(bert, files)
    raw["train"] = {"max_steps": 2}
    told: list[Event] = []
    fit(changed(raw), tmp_path, told.append)
    chosen = read_recipe(tmp_path / "recipe.toml").train
    assert None not in (chosen.epochs, chosen.batch_size, chosen.lr, chosen.eval_every)
    checkpoint, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert same_recipe(checkpoint, changed(raw), lambda event: pytest.fail(str(event))).train == chosen
    evaluations = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations if "validation" in line] == [0, 1, 2]


def test_few_examples_that_were_held_out_do_not_choose_a_step(bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sections(bert, files)
    del raw["data"]["validation"]
    from lorakit.training.prepare import prepare

    raw["data"]["folds"] = 0
    notes: list[Event] = []
    assert prepare(changed(raw), notes.append).keeps_last
    assert not prepare(changed(raw, "train.patience=2")).keeps_last
    assert any("so the last one is kept" in note.text for note in notes if isinstance(note, Note))
    scores = fit(changed(raw, "train.head_start=probe"), tmp_path).scores
    assert scores["best_step"] == max(scores["best_step"], 8)
