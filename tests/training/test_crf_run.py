"""A CRF through a whole run: trained, shipped with the adapter, resumed, answered from, and left out of a merged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorakit.app.commands.export import export_run
from lorakit.app.export.adapters import merge
from lorakit.data.read import read
from lorakit.errors import ConfigError
from lorakit.inference.predictor import load
from lorakit.runtime.events import Event, Note
from lorakit.tasks.tag_decoding import CRF
from lorakit.training.prepare import prepare
from tests.runs import changed, fit, read_lines, scores_of, sections, taken_up, weights

KEY = "base_model.model.crf.transitions"


@pytest.fixture(scope="module")
def raw(roberta: Path, files: Path) -> dict:
    found = sections(roberta, files, "token_classification")
    found["task"]["crf"] = True
    return found


@pytest.fixture(scope="module")
def crf_run(raw: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(changed(raw), tmp_path_factory.mktemp("crf") / "run").folder


def test_transitions_are_trained_and_shipped_with_the_adapter(crf_run: Path) -> None:
    tensors = load_file(crf_run / "adapter" / "adapter_model.safetensors")
    assert tensors[KEY].abs().max() > 0
    config = json.loads((crf_run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] == ["classifier", "crf"]


def test_folder_answers_as_training_did(crf_run: Path, files: Path) -> None:
    loaded = load(crf_run)
    examples = read(str(files / "validation.conll"), "words").examples
    answers = [loaded.task.to_json(e, a) for e, a in zip(examples, loaded.answers(examples), strict=True)]
    assert answers == [
        {key: line[key] for key in ("text", "entities")} for line in read_lines(crf_run / "predictions.jsonl")
    ]
    scores = scores_of(crf_run)
    found = loaded.evaluate(examples)
    assert found == {key: scores[key] for key in found}
    merged = load(crf_run, merge=True).lines(examples)
    places = [
        [(e["entity_group"], e["start"], e["end"]) for line in some for e in line["entities"]]
        for some in (merged, answers)
    ]
    assert places[0] == places[1]


def test_resumed_run_ends_as_one_that_never_stopped(raw: dict, crf_run: Path, tmp_path: Path) -> None:
    recipe = changed(raw, "train.checkpoint_every=2")
    taken_up(recipe, tmp_path, 5).fit()
    assert weights(tmp_path) == weights(crf_run)
    assert read_lines(tmp_path / "predictions.jsonl") == read_lines(crf_run / "predictions.jsonl")


def test_head_alone_can_be_trained_with_it(raw: dict, tmp_path: Path) -> None:
    fit(changed(raw, "train.method=head", "train.max_steps=2"), tmp_path)
    assert KEY in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert load(tmp_path).predict(["Ada left Oslo ."])


def test_full_fine_tuning_has_no_place_for_it(raw: dict) -> None:
    with pytest.raises(ConfigError, match=r"task\.crf = true: train\.method = 'full' writes a plain model"):
        prepare(changed(raw, "train.method=full"))


def test_bf16_base_keeps_the_transitions_in_fp32(raw: dict) -> None:
    model = prepare(changed(raw, "model.dtype=bf16")).model
    (trained,) = [p for name, p in model.named_parameters() if name.endswith("transitions") and p.requires_grad]
    assert trained.dtype == torch.float32


def test_merged_model_is_plain_and_says_what_it_lost(crf_run: Path, tmp_path: Path) -> None:
    said = merge(crf_run, tmp_path / "merged").lines
    assert said[0] == "crf: its transitions are left out, so a plain model tags each word on its own"
    _, info = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded = load(crf_run)
    before = loaded.predict(["Ada left Oslo ."])
    loaded.merge_to(tmp_path / "again")
    assert loaded.predict(["Ada left Oslo ."])[0]["entities"] == [
        entity | {"score": pytest.approx(entity["score"], abs=1e-5)} for entity in before[0]["entities"]
    ]


@pytest.mark.parametrize("to", ["peft", "vllm"])
def test_export_keeps_the_transitions(crf_run: Path, tmp_path: Path, to: str) -> None:
    export_run(crf_run, to, tmp_path / "out")
    file = "adapter_model.safetensors" if to == "peft" else "head/model.safetensors"
    ours = load_file(crf_run / "adapter" / "adapter_model.safetensors")[KEY]
    (theirs,) = [
        value for key, value in load_file(tmp_path / "out" / file).items() if key.endswith(f"{CRF}.transitions")
    ]
    assert torch.equal(theirs, ours)


# Runs over texts longer than the model's limit, from the data to the folder and back.


LIMIT = 8  # tokens; some sentences have 17 words


@pytest.fixture(scope="module")
def windowed(roberta: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = changed(sections(roberta, files, "token_classification"), f"data.max_length={LIMIT}", "task.stride=2")
    return fit(recipe, tmp_path_factory.mktemp("windowed") / "run").folder


def test_every_gold_entity_is_scored(windowed: Path, files: Path) -> None:
    scores = scores_of(windowed)
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
