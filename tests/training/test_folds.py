"""Cross-validation: what ships has seen all examples, and each is scored by a fold that has not seen it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorakit.data.batches import number_folds
from lorakit.data.example import Example
from lorakit.errors import ConfigError
from lorakit.inference.answer import answer_all
from lorakit.lora import LoraConfig, add_adapter
from lorakit.models import load_base
from lorakit.recipe import read_recipe
from lorakit.runtime.device import cast_frozen_
from lorakit.training.checkpoint import newest_checkpoint
from lorakit.training.parts import FOLDS, count_folds, read_parts
from tests.runs import Sections, changed, fit, read_lines, sections, taken_up

FOLDED = ("data.folds=3", "train.epochs=2")


def folded(base: Path, files: Path, task: str = "sequence_classification") -> Sections:
    """A recipe that names no validation examples."""
    raw = sections(base, files, task)
    del raw["data"]["validation"]
    return raw


@pytest.mark.parametrize("head", ["random", "probe"])
def test_ships_what_all_examples_teach_and_scores_what_each_fold_has_not_seen(
    head: str, bert: Path, files: Path, tmp_path: Path
) -> None:
    """Against plain runs over files that were divided by hand; with dropout, so also its draws are those of a plain run."""
    names = f"data.label_names={str(head == 'probe').lower()}"
    raw, words = folded(bert, files), (*FOLDED, f"train.head_start={head}", names)
    result = fit(changed(raw, *words), tmp_path / "folds")
    every = read_parts(changed(raw, *words))[0]["train"]
    named = changed(raw, *words, "data.folds=0", f"data.validation={raw['data']['train']}", "train.patience=9")
    plain = fit(named, tmp_path / "all")
    own, whole = tensors(tmp_path / "folds"), tensors(tmp_path / "all")
    last = {key: tensor for key, tensor in whole.items() if not key.startswith("best/")}
    torch.testing.assert_close({key: own[key] for key in last}, last, atol=0, rtol=0)
    assert plain.scores["examples"]["train"] == result.scores["examples"]["train"] == len(every)
    answers = read_lines(tmp_path / "folds" / "predictions.jsonl")
    right, n = np.array([line["label"] == line["expected"] for line in answers]), len(every)
    as_many_as_trained = np.random.RandomState(0).randint(0, n, (1000, n))[:, : n - n // 3]
    ends = np.quantile(right[as_many_as_trained].mean(1), (0.025, 0.975))
    assert result.scores["intervals"]["accuracy"] == pytest.approx(list(ends))
    numbers = number_folds(every, 3, 0)
    assert [line["text"] for line in answers] == [example.text for example in every]
    for fold in range(3):
        paths = [tmp_path / f"{fold}-{name}.jsonl" for name in ("train", "validation")]
        for path, held_out in zip(paths, (False, True), strict=True):
            rows = [
                {"text": e.text, "label": e.label}
                for e, n in zip(every, numbers, strict=True)
                if (n == fold) == held_out
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        alone = {**raw, "data": {"train": str(paths[0]), "validation": str(paths[1])}}
        fit(changed(alone, *words[1:], "train.eval_every=1000"), tmp_path / str(fold))
        trained = {key: t for key, t in tensors(tmp_path / str(fold)).items() if key.startswith("parameter/")}
        torch.testing.assert_close({key: own[f"fold-{fold}/{key}"] for key in trained}, trained, atol=0, rtol=0)
        if head == "random":  # else the plain run may have kept the probe
            mine = [line for line, number in zip(answers, numbers, strict=True) if number == fold]
            for line, expected in zip(mine, read_lines(tmp_path / str(fold) / "predictions.jsonl"), strict=True):
                assert line["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-6)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint of a run holds."""
    return dict(newest_checkpoint(folder / "checkpoints")[0].tensors)


def test_resumed_is_never_stopped(bert: Path, files: Path, tmp_path: Path) -> None:
    words = ("lora.update=adalora", "lora.init=pissa", "train.patience=1")
    recipe = changed(folded(bert, files), *FOLDED, "train.checkpoint_every=3", *words)
    whole = fit(recipe, tmp_path / "whole")
    again = taken_up(recipe, tmp_path / "stopped", 4).fit()
    torch.testing.assert_close(tensors(again.folder), tensors(whole.folder), atol=0, rtol=0)
    ships = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (again, whole)]
    torch.testing.assert_close(*ships, atol=0, rtol=0)
    assert read_lines(again.folder / "predictions.jsonl") == read_lines(whole.folder / "predictions.jsonl")


@pytest.mark.parametrize(
    "task", ["multi_label_classification", "sequence_regression", "token_classification", "text2text_ner"]
)
def test_every_task_is_scored_over_all_examples(
    task: str, request: pytest.FixtureRequest, files: Path, tmp_path: Path
) -> None:
    base = request.getfixturevalue("t5" if task.startswith("text2text") else "bert")
    recipe = changed(folded(base, files, task), "data.folds=2", "train.epochs=1")
    scores = fit(recipe, tmp_path).scores
    assert scores["folds"] == 2
    assert (
        scores["examples"]["validation"]
        == scores["examples"]["train"]
        == len(read_lines(tmp_path / "predictions.jsonl"))
    )
    assert scores["best_step"] == max(line["step"] for line in read_lines(tmp_path / "metrics.jsonl"))
    assert read_recipe(tmp_path / "recipe.toml").data.folds == 2


def test_folds_hold_each_example_out_once_by_label_and_never_apart_from_its_text_or_group() -> None:
    examples = [Example(f"text {i % 80}", "abc"[i % 80 % 3], group=f"user {i % 40}") for i in range(100)]
    for by_group in (False, True):
        numbers = number_folds(examples, 5, 0, by_group=by_group)
        assert len(numbers) == 100
        assert set(numbers) == set(range(5))
        for fold in range(5):
            assert 15 <= numbers.count(fold) <= 25
            for key in ("text", "group") if by_group else ("text",):
                values = [getattr(e, key) for e in examples]
                sides = [
                    {v for v, n in zip(values, numbers, strict=True) if (n == fold) == held} for held in (True, False)
                ]
                assert not sides[0] & sides[1]
    apart = [Example(str(i), "abc"[i % 3]) for i in range(60)]
    numbers = number_folds(apart, 5, 1)
    of_fold = [Counter(e.label for e, n in zip(apart, numbers, strict=True) if n == fold) for fold in range(5)]
    assert of_fold == [dict.fromkeys("abc", 4)] * 5
    assert numbers != number_folds(apart, 5, 2)
    two = [Example(str(i), "a", group="xy"[i % 2]) for i in range(20)]
    assert set(number_folds(two, 5, 0, by_group=True)) == {0, 1}


def test_folds_are_chosen_by_the_number_of_examples(bert: Path, files: Path) -> None:
    raw = folded(bert, files)
    recipe = changed(raw)
    assert [count_folds(recipe, n) for n in (2, 3, 5, 199, 200, 499, 500, 10_000)] == [2, 3, 3, 3, 2, 2, 0, 0]
    assert FOLDS[-1][0] == 500
    for words in ("data.validation_share=0.1", "data.folds=0", "train.method=full", "data.cache=somewhere"):
        assert count_folds(changed(raw, words), 100) == 0
    assert count_folds(changed(raw, "data.folds=7"), 10_000) == 7
    with pytest.raises(ConfigError, match=r"data\.folds = 7: .*train\.csv has 6 examples"):
        count_folds(changed(raw, "data.folds=7"), 6)
    for word in ("data.validation=x.csv", "train.method=full", "train.shard_base=true", "data.cache=x"):
        with pytest.raises(ConfigError, match=r"data\.folds = 5: not possible, because "):
            changed(raw, "data.folds=5", word)
    with pytest.raises(ConfigError, match=r"data\.folds"):
        changed(raw, "data.folds=1")


def test_the_base_is_loaded_once_and_the_last_evaluation_answers_for_the_run(
    bert: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, answers = Mock(wraps=load_base), Mock(wraps=answer_all)
    monkeypatch.setattr("lorakit.training.prepare.load_base", loads)
    monkeypatch.setattr("lorakit.training.run.answer_all", answers)
    fit(changed(folded(bert, files), *FOLDED, "train.eval_every=1000"), tmp_path)
    assert (loads.call_count, answers.call_count) == (1, 3)  # the last step alone is evaluated, by three folds


def test_bases_that_share_weights_do_not_change_each_other(bert: Path) -> None:
    base = load_base(str(bert), "sequence_classification", labels=("a", "b"))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    one, other = base.copy(), base.copy()
    for copy in (one, other):
        weight = copy.model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
        assert (
            weight.data_ptr() == base.model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").data_ptr()
        )
    add_adapter(one.model, LoraConfig(r=2, modules_to_save=one.saved_modules), seed=0)
    cast_frozen_(one.model, torch.bfloat16)
    head = other.new_head()
    assert head is not None
    torch.nn.init.ones_(head.weight)
    torch.testing.assert_close(base.model.state_dict(), before, atol=0, rtol=0)
