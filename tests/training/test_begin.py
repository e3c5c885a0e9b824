"""A run that begins from the adapter of an earlier one: equal to it before the first step, and refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.app.report.page import fact_rows
from lorakit.errors import AdapterError, ConfigError, LorakitError
from lorakit.inference.adapter_folder import load_shipped, read_side
from lorakit.inference.answer import answer_all
from lorakit.lora.peft_files import adapter_tensors
from lorakit.recipe import Recipe, read_recipe
from lorakit.runtime.device import cast_frozen_
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.run_files import read_run
from tests.runs import Sections, changed, fit, sections, taken_up, weights


def begun(raw: Sections, run: Path, *words: str) -> Recipe:
    """The recipe that begins from a run; what the run's adapter says is left out."""
    kept = {name: table for name, table in raw.items() if name != "lora"}
    return changed({**kept, "model": {**raw["model"], "adapter": str(run)}}, *words)


def answers(prepared: Prepared) -> list[Any]:
    part = prepared.parts["validation"]
    return answer_all(prepared.model, prepared.task, part.examples, part.items, prepared.device)


def tensors(prepared: Prepared) -> dict[str, torch.Tensor]:
    return adapter_tensors(prepared.model, prepared.adapter)


CASES = {
    "classifier": ("bert", "sequence_classification", "bert_run", ()),
    "mean": ("sentence_bert", "sequence_classification", "mean_run", ()),
    "tagger": ("roberta", "token_classification", "tagger_run", ()),
    "numbers": ("bert", "sequence_regression", "regression_run", ()),
    "text to text": ("t5", "text2text_ner", "t5_run", ("data.validation_share=0.5",)),
}


@pytest.mark.parametrize("case", CASES)
def test_step_0_is_the_run_it_begins_from_bit_for_bit(case: str, files: Path, request: pytest.FixtureRequest) -> None:
    base, task, run, words = CASES[case]
    folder = request.getfixturevalue(run) / "adapter"
    prepared = prepare(begun(sections(request.getfixturevalue(base), files, task), folder.parent, *words))
    base_model = load_shipped(folder, read_side(folder))
    shipped = base_model.model
    cast_frozen_(shipped, prepared.dtype)
    base_model.speed_up(prepared.device)
    ours, theirs = tensors(prepared), adapter_tensors(shipped)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    part = prepared.parts["validation"]
    assert answers(prepared) == answer_all(shipped, prepared.task, part.examples, part.items, prepared.device)
    trained = {name for name, p in prepared.model.named_parameters() if p.requires_grad}
    assert trained and all(".adapters.default." in name for name in trained)


def other_labels(files: Path, folder: Path) -> Path:
    """The reviews with a third label."""
    for name in ("train", "validation"):
        lines = (files / f"{name}.csv").read_text().splitlines()
        third = [line.rpartition(",")[0] + ",so-so" if i % 3 == 1 else line for i, line in enumerate(lines)]
        (folder / f"{name}.csv").write_text("\n".join(third) + "\n")
    return folder


@pytest.mark.parametrize("head_start", ["random", "probe"])
def test_head_of_other_labels_is_new_over_the_same_adapter(
    bert: Path, bert_run: Path, files: Path, tmp_path: Path, head_start: str
) -> None:
    raw = sections(bert, other_labels(files, tmp_path))
    ours = tensors(prepare(begun(raw, bert_run, f"train.head_start={head_start}")))
    theirs = adapter_tensors(load_shipped(bert_run / "adapter", read_side(bert_run / "adapter")).model)
    fresh = tensors(prepare(changed(raw, f"train.head_start={head_start}")))
    assert ours.keys() == theirs.keys()
    head = {key for key in ours if ".classifier." in key}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - head), "the pooler too"
    assert len(ours["base_model.model.classifier.weight"]) == 3
    is_fresh = all(torch.equal(ours[key], fresh[key]) for key in head)
    assert is_fresh == (head_start == "random"), "the probe is over the adapter"


def test_head_is_new_where_it_is_asked_for(bert: Path, bert_run: Path, files: Path) -> None:
    prepared = prepare(begun(sections(bert, files), bert_run, "model.adapter_head=new"))
    theirs = adapter_tensors(load_shipped(bert_run / "adapter", read_side(bert_run / "adapter")).model)
    key = "base_model.model.classifier.weight"
    assert not torch.equal(tensors(prepared)[key], theirs[key])


def test_another_task_goes_on_with_the_adapter_alone(roberta: Path, tagger_run: Path, files: Path) -> None:
    prepared = prepare(begun(sections(roberta, files), tagger_run))
    theirs = adapter_tensors(load_shipped(tagger_run / "adapter", read_side(tagger_run / "adapter")).model)
    ours = tensors(prepared)
    lora = [key for key in ours if ".lora_" in key]
    assert lora and all(torch.equal(ours[key], theirs[key]) for key in lora)
    assert {key for key in ours if ".lora_" not in key} == {
        f"base_model.model.classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    }


def test_run_records_what_it_began_from_and_its_recipe_can_be_run_again(
    bert: Path, bert_run: Path, files: Path, tmp_path: Path
) -> None:
    recipe = begun(sections(bert, files), bert_run, "train.max_steps=2", "data.folds=0")
    fit(recipe, tmp_path / "run")
    side = read_side(tmp_path / "run" / "adapter")
    sha256 = read_side(bert_run / "adapter").files["adapter_model.safetensors"]
    assert side.begins_from == {"adapter": str(bert_run), "sha256": sha256, "head": "kept"}
    assert dict(fact_rows(read_run(tmp_path / "run")))["starts from"] == "sequence_classification, head kept"
    again = read_recipe(tmp_path / "run" / "recipe.toml")
    assert again.lora.r == 4, "what the adapter says is written"
    taken_up(changed(again.model_dump(), "train.checkpoint_every=1"), tmp_path / "again", 2).fit()
    assert weights(tmp_path / "again") == weights(tmp_path / "run"), "stopped and resumed, too"
    assert "begins_from" not in json.loads((bert_run / "adapter" / "lorakit.json").read_text())


def test_folds_and_seeds_begin_from_it_together(bert: Path, bert_run: Path, files: Path, tmp_path: Path) -> None:
    from lorakit.training.joint import prepare_all

    raw = sections(bert, files)
    del raw["data"]["validation"]
    recipes = [begun(raw, bert_run, f"train.seed={seed}", "data.folds=2") for seed in (1, 2)]
    first, second = (member for member in prepare_all(recipes) if isinstance(member, Prepared))
    assert first.model is second.model
    alone = adapter_tensors(load_shipped(bert_run / "adapter", read_side(bert_run / "adapter")).model)
    for member in (first, second, *first.folds, *second.folds):
        own = tensors(member)
        assert all(torch.equal(own[key], alone[key]) for key in alone)


def test_quantised_base_is_that_of_the_adapter(bert: Path, files: Path, tmp_path: Path) -> None:
    fit(changed(sections(bert, files), "model.quantize=nf4", "train.max_steps=1"), tmp_path / "run")
    prepared = prepare(begun(sections(bert, files), tmp_path / "run", "model.kernels=plain"))
    assert prepared.recipe.model.quantize == "nf4"
    folder = tmp_path / "run" / "adapter"
    part = prepared.parts["validation"]
    shipped = load_shipped(folder, read_side(folder)).model
    assert answers(prepared) == answer_all(shipped, prepared.task, part.examples, part.items, prepared.device)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "another rank": (("lora.r=8",), "lora.r = 8: .*, which the run starts from, has 4; leave this setting out"),
    "other targets": (
        ("lora.target_modules=[query]",),
        r"lora.target_modules = \('query',\): .* leave this setting out",
    ),
    "another init": (("lora.init=pissa",), "lora.init = 'pissa': .* has 'kaiming'"),
    "another form of the base": (("model.quantize=int8",), "model.quantize = 'int8': .* has 'none'"),
    "no folder": (("model.adapter=nowhere",), "model.adapter = 'nowhere': nowhere: no such run folder"),
    "a folder of nothing": (
        ("model.adapter=.",),
        r"model.adapter = '\.': \.: neither a run folder nor a lorakit adapter",
    ),
    "the whole model": (("train.method=full",), "train.method = 'full': a run with model.adapter continues with LoRA"),
    "its head, of other labels": (
        ("model.adapter_head=keep", "data.label=stars"),
        "'keep': .* with the labels bad, good;",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_the_adapter_is_refused_before_weights_are_loaded(
    bert: Path, bert_run: Path, files: Path, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorakit.training.prepare.load_base", None)
    raw = sections(bert, files)
    if "data.label=stars" in words:
        raw["data"] |= {name: str(files / f"{name}.ratings.csv") for name in ("train", "validation")}
    with pytest.raises(ConfigError, match=message):
        prepare(begun(raw, bert_run, *words))


def test_adapter_of_another_base_is_refused_before_weights_are_loaded(
    roberta: Path, bert_run: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.training.prepare.load_base", None)
    with pytest.raises(
        ConfigError, match=r"model.adapter = .*: trained on .*bert', of which .*roberta' differs: its weights"
    ):
        prepare(begun(sections(roberta, files), bert_run))


def test_damaged_adapter_is_refused(bert: Path, bert_run: Path, files: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bert_run / "adapter", tmp_path / "adapter")
    (copy / "adapter_model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(AdapterError, match="damaged"):
        prepare(begun(sections(bert, files), copy))


def test_head_alone_is_no_adapter_to_begin_from(bert: Path, files: Path, tmp_path: Path) -> None:
    fit(changed(sections(bert, files), "train.method=head", "train.max_steps=1"), tmp_path / "run")
    with pytest.raises(LorakitError, match="only a head"):
        prepare(begun(sections(bert, files), tmp_path / "run"))
