"""Answers from a folder alone, and the same folder in the hands of transformers and peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lorakit.data.example import of_text, of_words
from lorakit.data.read import read
from lorakit.errors import AdapterError, DataError, OutputError
from lorakit.inference import answer
from lorakit.inference.batch_scoring import answer_schema
from lorakit.inference.predictor import Predictor, load
from lorakit.lora import adapter_names
from lorakit.models import KINDS
from lorakit.recipe import read_recipe
from lorakit.task_info import TASKS
from lorakit.training.prepare import prepare
from tests.runs import Sections, changed, fit, save_bert, sections
from tests.tiny import items_of

RUNS = ("bert_run", "multi_label_run", "ordinal_run", "regression_run", "tagger_run", "t5_run")


@pytest.fixture(scope="module")
def predictor(bert_run: Path) -> Predictor:
    return load(bert_run)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# From the folder alone


@pytest.mark.parametrize("name", RUNS)
def test_load_restores_the_predictions_of_training_exactly(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    recipe = read_recipe(folder / "recipe.toml")
    examples = prepare(recipe).parts["validation"].examples
    loaded = load(folder)
    answers = [loaded.task.to_json(e, a) for e, a in zip(examples, loaded.answers(examples), strict=True)]
    lines = read_lines(folder / "predictions.jsonl")
    assert answers == [{key: line[key] for key in answer} for answer, line in zip(answers, lines, strict=True)]
    assert {*answers[0]} == {"text", *recipe.task.info.answer_columns}
    assert pa.Table.from_pylist(answers, answer_schema([recipe.task.name], {})).num_rows == len(examples)


@pytest.mark.parametrize("method", ["full", "head"])
def test_load_restores_other_methods_exactly(
    bert: Path, files: Path, tmp_path: Path, method: str, each_auto_dtype: str
) -> None:
    recipe = changed(sections(bert, files), f"train.method={method}", "model.dtype=auto")
    fit(recipe, tmp_path)
    loaded = load(tmp_path)
    examples = read(str(files / "validation.csv")).examples
    answers = [loaded.task.to_json(e, a) for e, a in zip(examples, loaded.answers(examples), strict=True)]
    lines = read_lines(tmp_path / "predictions.jsonl")
    assert answers == [{key: line[key] for key in answer} for answer, line in zip(answers, lines, strict=True)]


@pytest.mark.parametrize("name", RUNS)
def test_merged_predictor_is_plain_and_answers_alike(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    loaded, merged = load(folder), load(folder, merge=True)
    assert adapter_names(loaded.model)
    assert not adapter_names(merged.model)
    examples = prepare(read_recipe(folder / "recipe.toml")).parts["validation"].examples
    assert merged.lines(examples) == nearly(loaded.lines(examples))
    merged.merge_to(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def nearly(value: Any) -> Any:
    """The same, equal to what differs by no more than rounding does."""
    if isinstance(value, dict):
        return {key: nearly(each) for key, each in value.items()}
    if isinstance(value, list):
        return [nearly(each) for each in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_gives_the_scores_of_training(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    loaded = load(folder)
    recipe = read_recipe(folder / "recipe.toml")
    data = read(str(recipe.data.validation), TASKS[recipe.task.name].wants, columns=loaded.side.columns)
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    found = loaded.evaluate(data.examples)
    assert found == {key: scores[key] for key in found}


def test_load_takes_the_adapter_folder_too(bert_run: Path, predictor: Predictor, tmp_path: Path) -> None:
    shutil.copytree(bert_run / "adapter", tmp_path / "shipped")
    texts = ["a superb film", "the plot was stale"]
    assert load(tmp_path / "shipped").predict(texts) == predictor.predict(texts)


def test_answers_come_in_the_order_of_the_inputs(predictor: Predictor) -> None:
    texts = [" ".join(["the film was superb", "the plot was dreadful"][i % 2].split()[: 1 + i % 5]) for i in range(150)]
    together = predictor.predict(texts)
    assert [answer["text"] for answer in together] == texts
    alone = [predictor.predict([text])[0] for text in texts[:9]]
    assert [a["score"] for a in alone] == pytest.approx([a["score"] for a in together[:9]], abs=1e-5)


@pytest.mark.parametrize("name", ["bert_run", "tagger_run"])
def test_texts_are_encoded_a_chunk_at_a_time(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(request.getfixturevalue(name))
    texts = ["a superb film", "the plot was rather stale", "Ada visited Oslo", "a film", "the cast was dreadful and"]
    whole = loaded.predict(texts)
    monkeypatch.setattr(answer, "CHUNK", 2)
    seen: list[int] = []
    encode = type(loaded.task).encode
    monkeypatch.setattr(type(loaded.task), "encode", lambda task, some: seen.append(len(some)) or encode(task, some))
    assert [answer["text"] for answer in loaded.predict(texts)] == texts
    assert seen == [2, 2, 1]
    score = "score" if name == "bert_run" else "entities"
    if score == "score":
        found = [answer[score] for answer in loaded.predict(texts)]
        assert found == pytest.approx([answer[score] for answer in whole], abs=1e-5)


def test_answers_have_the_documented_keys(predictor: Predictor) -> None:
    (answer,) = predictor.predict(["a superb film"])
    assert list(answer) == ["text", "label", "score", "probabilities"]
    assert answer["score"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["label"]]
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_entities_have_offsets_into_the_text(tagger_run: Path) -> None:
    texts = ["Ada  visited\tOslo .", "Omar left Rome, Paul likes Lima."]
    found = [
        entity | {"text": answer["text"]} for answer in load(tagger_run).predict(texts) for entity in answer["entities"]
    ]
    assert found
    assert all(set(e) == {"entity_group", "word", "start", "end", "score", "text"} for e in found)
    assert [e["word"] for e in found] == [e["text"][e["start"] : e["end"]] for e in found]


SENTENCES = [["Ada", "visited", "Oslo", "."], ["Omar"], ["a", "film", "in", "Rome", "and", "Cairo"] * 9]


def test_words_are_answered_by_a_tag_each(tagger_run: Path) -> None:
    loaded = load(tagger_run)
    examples = [of_words(words) for words in SENTENCES]
    found = loaded.predict_words(SENTENCES)
    assert [line["words"] for line in found] == SENTENCES
    assert [tuple(line["tags"]) for line in found] == [answer.tags for answer in loaded.answers(examples)]
    assert {tag for line in found for tag in line["tags"]} > {"O"}
    whole = [loaded.task.to_json(e, a) for e, a in zip(examples, loaded.answers(examples), strict=True)]
    assert [{key: line[key] for key in ("text", "entities")} for line in found] == whole


def test_words_are_answered_by_a_generator_too(t5_run: Path) -> None:
    found = load(t5_run).predict_words(SENTENCES[:2])
    assert [len(line["tags"]) for line in found] == [4, 1]


def test_words_need_a_run_that_answers_words(predictor: Predictor) -> None:
    with pytest.raises(DataError, match="this run is one of sequence_classification, which answers texts"):
        predictor.predict_words(SENTENCES)


@pytest.mark.parametrize("sentence", ["Ada visited Oslo", [], ["Ada", " "], ["Ada", ""]])
def test_sentence_that_is_no_list_of_words_is_refused(tagger_run: Path, sentence: list[str]) -> None:
    with pytest.raises(DataError, match=r"sentence 2 of 2: .* is not a list of words"):
        load(tagger_run).predict_words([["Ada"], sentence])


def test_text_by_itself_has_one_answer(predictor: Predictor) -> None:
    alone: dict[str, Any] = predictor.predict("a superb film")
    assert [alone] == predictor.predict(["a superb film"])
    with pytest.raises(DataError, match="text 1 of 1 is empty"):
        predictor.predict(" ")


def test_no_text_has_no_answer(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_text_is_refused(predictor: Predictor, text: str) -> None:
    with pytest.raises(DataError, match="text 2 of 2 is empty"):
        predictor.predict(["a film", text])


def test_label_that_training_lacked_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("text,label\na film,godo\n")
    with pytest.raises(DataError, match=r"other\.csv:2: label 'godo' .*did you mean 'good'"):
        predictor.evaluate(read(str(tmp_path / "other.csv")).examples)


# Another base, and damage


@pytest.fixture
def other_base(bert_run: Path, tmp_path: Path) -> Path:
    """The adapter with a base of the same shapes and other weights."""
    save_bert(tmp_path / "base", seed=5)
    shutil.copytree(bert_run / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "lorakit.json"
    side = json.loads(path.read_text(encoding="utf-8"))
    side["base"]["name"] = str(tmp_path / "base")
    path.write_text(json.dumps(side), encoding="utf-8")
    return tmp_path / "adapter"


def test_base_with_another_sha256_is_refused(other_base: Path) -> None:
    with pytest.raises(AdapterError, match=r"trained on another .*sha256 .*--allow-base-mismatch"):
        load(other_base)


def test_base_with_another_sha256_loads_when_allowed(other_base: Path, predictor: Predictor) -> None:
    texts = ["a superb film"]
    assert load(other_base, allow_base_mismatch=True).predict(texts) != predictor.predict(texts)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such run folder"):
        load(tmp_path / "missing")
    with pytest.raises(OutputError, match="neither a run folder nor an adapter"):
        load(tmp_path)


def test_newer_format_is_refused(other_base: Path) -> None:
    path = other_base / "lorakit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(AdapterError, match="format 2 was written by a newer lorakit"):
        load(other_base)


@pytest.mark.parametrize(
    "change",
    [{"task": {"name": "poetry"}}, {"base": {}}, {"labels": None}, {"dtype": "fp8"}, {"max_length": "long"}],
    ids=lambda change: next(iter(change)),
)
def test_damaged_side_file_is_named(other_base: Path, change: dict) -> None:
    path = other_base / "lorakit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=r"lorakit\.json: damaged"):
        load(other_base)


# The same folder elsewhere


def inputs(loaded: Predictor) -> dict[str, Tensor]:
    texts = ["the film was superb", "a stale plot and a dreadful scene", "Ada visited Oslo ."]
    batch = loaded.task.collate(items_of(loaded.task, [of_text(text) for text in texts]))
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "token_type_ids")}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    extra = {"decoder_input_ids": batch["input_ids"][:, :4]} if model.config.is_encoder_decoder else {}
    return model.eval()(**batch, **extra).logits


def auto_class(loaded: Predictor) -> type:
    return getattr(transformers, KINDS[loaded.task.info.model_kind].auto_class)


def outputs(loaded: Predictor) -> tuple[str, ...]:
    """The names of the head's outputs."""
    return loaded.task.info.outputs(loaded.task.labels)


@pytest.mark.filterwarnings("ignore")  # of peft and transformers about layers that the adapter then fills
@pytest.mark.parametrize("name", RUNS)
def test_adapter_folder_loads_in_transformers_with_the_same_logits(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    loaded = load(folder)
    labels = {} if name == "t5_run" else {"num_labels": len(outputs(loaded))}
    theirs = auto_class(loaded).from_pretrained(folder / "adapter", dtype=torch.float32, **labels)
    torch.testing.assert_close(logits(theirs, inputs(loaded)), logits(loaded.model, inputs(loaded)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_adapter_folder_loads_in_peft_with_the_same_logits(name: str, request: pytest.FixtureRequest) -> None:
    peft = pytest.importorskip("peft")
    folder = request.getfixturevalue(name)
    loaded = load(folder)
    labels = {} if name == "t5_run" else {"num_labels": len(outputs(loaded))}
    base = auto_class(loaded).from_pretrained(loaded.side.base.name, dtype=torch.float32, **labels)
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(logits(theirs, inputs(loaded)), logits(loaded.model, inputs(loaded)))


def test_layers_that_the_checkpoint_lacked_are_shipped(bert_run: Path) -> None:
    config = json.loads((bert_run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]


@pytest.mark.parametrize("name", RUNS)
def test_merged_model_is_plain_and_has_the_same_logits(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    loaded = load(request.getfixturevalue(name))
    batch = inputs(loaded)
    before = logits(loaded.model, batch)
    loaded.merge_to(tmp_path / "merged")
    theirs, info = auto_class(loaded).from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(theirs, batch), before, atol=1e-4, rtol=1e-4)
    if name != "t5_run":
        assert tuple(theirs.config.id2label.values()) == outputs(loaded)
        assert theirs.config.problem_type == KINDS[loaded.task.info.model_kind].problem_type
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a film").input_ids == loaded.task.tokenizer("a film").input_ids


@pytest.mark.parametrize("key", [{"return_dict": False}, {"output_hidden_states": True, "output_attentions": True}])
def test_base_that_says_what_to_answer_with_is_asked_for_logits(
    bert: Path, files: Path, tmp_path: Path, key: dict[str, bool]
) -> None:
    shutil.copytree(bert, base := tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | key), encoding="utf-8")
    loaded = load(fit(changed(sections(base, files), "train.max_steps=1"), tmp_path / "run").folder)
    loaded.merge_to(tmp_path / "merged")
    assert loaded.predict(["a film"])[0]["label"] in loaded.task.labels


@pytest.mark.parametrize("words", [(), ("lora.use_dora=true",), ("train.method=head",)], ids=["lora", "dora", "head"])
def test_run_over_bf16_is_merged_in_fp32(bert: Path, files: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    fit(changed(sections(bert, files), "model.dtype=bf16", "train.max_steps=2", *words), tmp_path / "run")
    loaded = load(tmp_path / "run")
    before = logits(loaded.model, inputs(loaded))
    loaded.merge_to(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors["classifier.weight"], trained["base_model.model.classifier.weight"])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    after = logits(loaded.model, inputs(loaded))
    torch.testing.assert_close(logits(theirs, inputs(loaded)), after)
    torch.testing.assert_close(after, before.float(), atol=0.1, rtol=0)  # bf16 rounds to 1/256


def test_merged_full_model_has_the_same_logits(bert: Path, files: Path, tmp_path: Path) -> None:
    raw: Sections = sections(bert, files)
    fit(changed(raw, "train.method=full"), tmp_path / "run")
    loaded = load(tmp_path / "run")
    loaded.merge_to(tmp_path / "merged")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(theirs, inputs(loaded)), logits(loaded.model, inputs(loaded)))
