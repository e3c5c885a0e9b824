"""Answers from a folder alone, and the same folder in the hands of transformers and peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lorakit.data.example import Example, of_text, of_words
from lorakit.data.read import read
from lorakit.errors import DataError, OutputError
from lorakit.inference import answer
from lorakit.inference.batch_scoring import answer_schema
from lorakit.inference.predictor import Predictor, load
from lorakit.lora import adapter_names
from lorakit.models import KINDS
from lorakit.recipe import read_recipe
from lorakit.task_info import TASKS
from tests.conftest import set_auto_dtype
from tests.runs import changed, fit, nearly, read_lines, scores_of, sections
from tests.tiny import items_of

RUNS = ("bert_run", "multi_label_run", "ordinal_run", "regression_run", "tagger_run", "t5_run")


@pytest.fixture(scope="module")
def predictor(bert_run: Path) -> Predictor:
    return load(bert_run)


class Loaded(NamedTuple):
    """A run folder, what was loaded from it, and the examples that it was validated with."""

    folder: Path
    predictor: Predictor
    examples: Sequence[Example]


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest) -> Loaded:
    folder: Path = request.getfixturevalue(request.param)
    predictor, recipe = load(folder), read_recipe(folder / "recipe.toml")
    data = read(str(recipe.data.validation), TASKS[recipe.task.name].wants, columns=predictor.side.columns)
    return Loaded(folder, predictor, data.examples)


def assert_answers_as_in_training(loaded: Predictor, examples: Sequence[Example], folder: Path) -> None:
    answers, lines = loaded.lines(examples), read_lines(folder / "predictions.jsonl")
    assert answers == [{key: line[key] for key in answer} for answer, line in zip(answers, lines, strict=True)]


def test_load_restores_the_answers_and_scores_of_training_exactly(run: Loaded) -> None:
    assert_answers_as_in_training(run.predictor, run.examples, run.folder)
    answers, task = run.predictor.lines(run.examples), run.predictor.task
    assert {*answers[0]} == {"text", *task.info.answer_columns}
    assert pa.Table.from_pylist(answers, answer_schema([task.info.name], {})).num_rows == len(run.examples)
    scores = scores_of(run.folder)
    again = run.predictor.evaluate(run.examples)
    assert again == {key: scores[key] for key in again}


# From the folder alone


@pytest.mark.parametrize("method", ["full", "head"])
def test_load_restores_other_methods_exactly(
    bert: Path, files: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bf16 is fast, so that the head is trained over a base in bf16, and the whole model in fp32."""
    set_auto_dtype(monkeypatch, "bf16")
    words = (f"train.method={method}", "model.dtype=auto", "train.max_steps=3")
    fit(changed(sections(bert, files), *words), tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert_answers_as_in_training(loaded, read(str(files / "validation.csv")).examples, tmp_path / "run")
    if method == "full":
        loaded.merge_to(tmp_path / "merged")
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(theirs, inputs(loaded)), logits(loaded.model, inputs(loaded)))


def test_load_takes_the_adapter_folder_too(bert_run: Path, predictor: Predictor, tmp_path: Path) -> None:
    shutil.copytree(bert_run / "adapter", tmp_path / "shipped")
    texts = ["a superb film", "the plot was stale"]
    assert load(tmp_path / "shipped").predict(texts) == predictor.predict(texts)
    config = json.loads((bert_run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]  # what the checkpoint lacked


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
    assert loaded.predict(texts) == nearly(whole)
    assert seen == [2, 2, 1]


SENTENCES = [["Ada", "visited", "Oslo", "."], ["Omar"], ["a", "film", "in", "Rome", "and", "Cairo"] * 9]


def test_words_are_answered_by_a_tag_each(tagger_run: Path, t5_run: Path, predictor: Predictor) -> None:
    loaded = load(tagger_run)
    examples = [of_words(words) for words in SENTENCES]
    lines = loaded.predict_words(SENTENCES)
    assert [line["words"] for line in lines] == SENTENCES
    assert [tuple(line["tags"]) for line in lines] == [answer.tags for answer in loaded.answers(examples)]
    assert {tag for line in lines for tag in line["tags"]} > {"O"}
    assert [{key: line[key] for key in ("text", "entities")} for line in lines] == loaded.lines(examples)
    for sentence in ("Ada visited Oslo", [], ["Ada", " "], ["Ada", ""]):
        with pytest.raises(DataError, match=r"sentence 2 of 2: .* is not a list of non-empty words"):
            loaded.predict_words([["Ada"], sentence])  # type: ignore[list-item]
    assert [len(line["tags"]) for line in load(t5_run).predict_words(SENTENCES[:2])] == [4, 1]
    with pytest.raises(DataError, match="this run's task, sequence_classification, takes texts"):
        predictor.predict_words(SENTENCES)


def test_text_by_itself_has_one_answer(predictor: Predictor) -> None:
    alone: dict[str, Any] = predictor.predict("a superb film")
    assert [alone] == predictor.predict(["a superb film"])
    assert predictor.predict([]) == []
    with pytest.raises(DataError, match="text 1 of 1 is empty"):
        predictor.predict(" ")
    for text in ("", " \n"):
        with pytest.raises(DataError, match="text 2 of 2 is empty"):
            predictor.predict(["a film", text])


# Another base, and damage


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such run folder"):
        load(tmp_path / "missing")
    with pytest.raises(OutputError, match="neither a run folder nor a lorakit adapter"):
        load(tmp_path)
    for seed in "01":
        (tmp_path / f"seed-{seed}" / "adapter").mkdir(parents=True)
        (tmp_path / f"seed-{seed}" / "adapter" / "lorakit.json").touch()
    with pytest.raises(OutputError, match=r"contains 2 runs, .* choose one, for example .*seed-0$"):
        load(tmp_path)


# The same folder elsewhere


def inputs(loaded: Predictor) -> dict[str, Tensor]:
    texts = ["the film was superb", "a stale plot and a dreadful scene", "Ada visited Oslo ."]
    batch = loaded.task.collate(items_of(loaded.task, [of_text(text) for text in texts]))
    return {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "token_type_ids")}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a model says of texts, of a tagger's tokens those that are no padding."""
    if model.config.is_encoder_decoder:
        return model.eval()(**batch, decoder_input_ids=batch["input_ids"][:, :4]).logits
    answer: Tensor = model.eval()(**batch).logits
    return answer if answer.dim() == 2 else answer[batch["attention_mask"] == 1]


def auto_class(loaded: Predictor) -> type:
    return getattr(transformers, KINDS[loaded.task.info.model_kind].auto_class)


def outputs(loaded: Predictor) -> tuple[str, ...]:
    """The names of the head's outputs."""
    return loaded.task.info.outputs(loaded.task.labels)


@pytest.mark.filterwarnings("ignore")  # of peft and transformers about layers that the adapter then fills
@pytest.mark.parametrize("run", ["bert_run", "tagger_run", "t5_run"], indirect=True)
def test_adapter_folder_loads_in_transformers_and_peft_with_the_same_logits(run: Loaded) -> None:
    peft, loaded, adapter = pytest.importorskip("peft"), run.predictor, run.folder / "adapter"
    labels = {} if loaded.model.config.is_encoder_decoder else {"num_labels": len(outputs(loaded))}
    read_by = auto_class(loaded).from_pretrained
    by_transformers = read_by(adapter, dtype=torch.float32, **labels)
    base = read_by(loaded.side.base.name, dtype=torch.float32, **labels)
    for theirs in (by_transformers, peft.PeftModel.from_pretrained(base, adapter)):
        torch.testing.assert_close(logits(theirs, inputs(loaded)), logits(loaded.model, inputs(loaded)))


def test_merged_model_is_plain_and_answers_alike(run: Loaded, tmp_path: Path) -> None:
    loaded, merged = run.predictor, load(run.folder, merge=True)
    assert adapter_names(loaded.model)
    assert not adapter_names(merged.model)
    assert merged.lines(run.examples) == nearly(loaded.lines(run.examples))
    for name, other in (("merged", merged), ("by itself", load(run.folder))):
        other.merge_to(tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "by itself")]
    assert weights[0] == weights[1]
    theirs, info = auto_class(loaded).from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = inputs(loaded)
    torch.testing.assert_close(logits(theirs, batch), logits(loaded.model, batch), atol=1e-4, rtol=1e-4)
    if not theirs.config.is_encoder_decoder:
        assert tuple(theirs.config.id2label.values()) == outputs(loaded)
        assert theirs.config.problem_type == KINDS[loaded.task.info.model_kind].problem_type
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a film").input_ids == loaded.task.tokenizer("a film").input_ids


def test_base_that_says_what_to_answer_with_is_asked_for_logits(bert: Path, files: Path, tmp_path: Path) -> None:
    keys = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    shutil.copytree(bert, base := tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | keys), encoding="utf-8")
    loaded = load(fit(changed(sections(base, files), "train.max_steps=1"), tmp_path / "run").folder)
    loaded.merge_to(tmp_path / "merged")
    assert loaded.predict(["a film"])[0]["label"] in loaded.task.labels


@pytest.mark.parametrize("words", [(), ("train.method=head",)], ids=["lora", "head"])
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
