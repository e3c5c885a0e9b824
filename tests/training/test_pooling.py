"""Classifiers over the mean of a text's tokens. The oracles: a mean by hand over AutoModel, and peft over AutoModel."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit
from lorakit.app.commands.export import export_run
from lorakit.app.commands.import_ import import_adapter
from lorakit.errors import AdapterError, ConfigError, ModelError
from lorakit.models import load_base
from lorakit.pooling import classify_by_mean, own_pooling
from lorakit.runtime.events import Event, Note
from lorakit.training.checkpoint import newest_checkpoint, same_recipe
from lorakit.training.prepare import prepare
from tests.runs import changed, fit, read_lines, sections
from tests.tiny import logits, tiny, tiny_batch

CLASSIFICATION = "sequence_classification"
TEXTS = ["the film was superb", "a rather stale plot and a clumsy cast", "moving"]
CONFIGS: dict[str, dict[str, Any]] = {
    "mean": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 16},
    "cls": {"pooling_mode": "cls", "embedding_dimension": 16},
    "mean and max": {"pooling_mode": ["mean", "max"]},
    "lasttoken": {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False},
}


def says(folder: Path, bert: Path, config: object) -> Path:
    """A copy of the base whose 1_Pooling is this."""
    shutil.copytree(bert, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


def probabilities(folder: Path) -> Tensor:
    """What lorakit answers to TEXTS. Shapes: (texts, labels)."""
    return torch.tensor([list(answer["probabilities"].values()) for answer in lorakit.load(folder).predict(TEXTS)])


@torch.no_grad()
def by_hand(body: nn.Module, head: dict[str, Tensor], folder: Path) -> Tensor:
    """The same from an encoder's token states, a text at a time. Shapes: (texts, labels)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    states = [body(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    rows = [sum(own) / len(own) @ head["weight"].T + head["bias"] for own in states]
    return torch.stack(rows).softmax(-1)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "family", ["Bert", "Roberta", "DistilBert", "Electra", "ModernBert", "Albert", "DebertaV2", "GPT2"]
)
def test_logits_are_those_of_a_linear_layer_over_the_mean_of_the_tokens(family: str) -> None:
    body = tiny(f"{family}Model")
    model = copy.deepcopy(body)
    classify_by_mean(model, 3, seed=1)
    batch = tiny_batch(model)  # some of its rows are padded
    head = model.get_submodule("classifier").state_dict()
    with torch.no_grad():
        states = body(**batch).last_hidden_state
    for row, mask, found in zip(states, batch["attention_mask"], logits(model, batch), strict=True):
        n = int(mask.sum())
        close(found, sum(row[:n]) / n @ head["weight"].T + head["bias"])
    whole = {key: value[:3] for key, value in batch.items()}
    close(logits(model, {"input_ids": whole["input_ids"]}), logits(model, whole))
    alone = {key: value[-1:, : int(batch["attention_mask"][-1].sum())] for key, value in batch.items()}
    torch.testing.assert_close(logits(model, alone)[0], logits(model, batch)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("words", CONFIGS)
def test_auto_takes_what_the_base_says_and_tells_it(words: str, bert: Path, files: Path, tmp_path: Path) -> None:
    base = says(tmp_path / "base", bert, CONFIGS[words])
    assert own_pooling(base, "x") == words
    notes: list[Event] = []
    prepared = prepare(changed(sections(base, files)), notes.append)
    chosen = "mean" if words == "mean" else "cls"
    assert prepared.recipe.model.pooling == prepared.base.pooling == chosen
    assert hasattr(prepared.model, "bert") == (chosen == "cls")
    told = [note.text for note in notes if isinstance(note, Note) and "1_Pooling" in note.text]
    does = {
        "mean": "so does the classifier",
        "cls": "",
        "mean and max": "the head of its model family",
        "lasttoken": "the head of its model family",
    }
    assert len(told) == bool(does[words])
    assert all(f"by {words} (1_Pooling)" in text and does[words] in text for text in told)
    assert load_base(str(base), CLASSIFICATION, pooling="mean").pooling == "mean"


def test_damaged_file_is_named(bert: Path, tmp_path: Path) -> None:
    base = says(tmp_path / "base", bert, [])
    with pytest.raises(ModelError, match=r"1_Pooling/config.json: .*; set model.pooling = 'mean' or 'cls'"):
        load_base(str(base), CLASSIFICATION, pooling="auto")
    assert load_base(str(base), "token_classification", pooling="auto").pooling == "cls"


def test_cls_gives_the_folder_of_a_base_that_says_nothing(
    sentence_bert: Path, bert_run: Path, files: Path, tmp_path: Path
) -> None:
    run = fit(changed(sections(sentence_bert, files), "model.pooling=cls"), tmp_path / "run").folder
    name = json.loads((bert_run / "adapter" / "lorakit.json").read_text())["base"]["name"]
    for file in ("adapter_model.safetensors", "adapter_config.json", "lorakit.json"):
        mine, other = ((folder / "adapter" / file).read_text("latin-1") for folder in (run, bert_run))
        mine = mine.replace(str(sentence_bert), name)  # which is in a file whose sum is in another
        assert re.sub(r'("adapter_config.json": )"\w+"', "", mine) == re.sub(
            r'("adapter_config.json": )"\w+"', "", other
        )
        assert '"pooling"' not in mine


def test_answers_are_those_of_training_merged_and_by_hand(mean_run: Path, sentence_bert: Path) -> None:
    lines = read_lines(mean_run / "predictions.jsonl")
    after = lorakit.load(mean_run).predict([line["text"] for line in lines])
    assert {answer["label"] for answer in after} == {"good", "bad"}  # it has learned to tell them apart
    for line, answer in zip(lines, after, strict=True):
        assert answer["probabilities"] == pytest.approx(line["probabilities"], abs=1e-6)
    merged = lorakit.load(mean_run, merge=True).predict(TEXTS)
    close(torch.tensor([list(answer["probabilities"].values()) for answer in merged]), probabilities(mean_run))
    config, tensors = (mean_run / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert json.loads(config.read_text())["task_type"] == "FEATURE_EXTRACTION"
    found = load_file(tensors)
    head = {key: found[f"base_model.model.classifier.{key}"] for key in ("weight", "bias")}
    body = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(sentence_bert), mean_run / "adapter")
    close(by_hand(body.eval(), head, mean_run / "adapter"), probabilities(mean_run))


def snippet(folder: Path, base: Path) -> dict[str, Any]:
    """What the card's code without lorakit leaves, run over this folder."""
    code = re.findall(r"(?s)```python\n(.*?)```", ModelCard.load(folder / "README.md").text)[1]
    code = code.replace('"FOLDER"', repr(str(folder))).replace('"BASE"', repr(str(base))).replace("A text.", TEXTS[0])
    exec(code, left := {"print": lambda shown: left.update(shown=shown)})
    return left


def test_card_s_snippet_answers_by_peft(mean_run: Path, sentence_bert: Path) -> None:
    left = snippet(mean_run / "adapter", sentence_bert)
    assert left["shown"] == pytest.approx(lorakit.load(mean_run).predict(TEXTS[0])["probabilities"], abs=1e-6)


def test_merged_export_is_an_encoder_and_its_head(mean_run: Path, tmp_path: Path) -> None:
    lines = export_run(mean_run, "merged", out := tmp_path / "merged").lines
    assert lines[0].startswith("layout: of sentence-transformers")
    body = transformers.AutoModel.from_pretrained(out).eval()
    head = {
        key.removeprefix("linear."): value for key, value in load_file(out / "2_Dense" / "model.safetensors").items()
    }
    close(by_hand(body, head, out), probabilities(mean_run))
    again = load_base(str(out), CLASSIFICATION, labels=("bad", "good"), pooling="auto")  # as a base to train from
    assert (again.pooling, again.missing) == ("mean", ())
    wider = load_base(str(out), CLASSIFICATION, labels=("a", "b", "c"), pooling="auto")
    assert wider.missing == ("classifier.bias", "classifier.weight")


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=pytest.mark.slow), "vllm"])
def test_exports_prove_themselves(to: str, mean_run: Path, tmp_path: Path) -> None:
    lines = export_run(mean_run, to, tmp_path / "out").lines
    assert any(line.startswith("check: read back") for line in lines)
    assert any("the base is AutoModel's" in line for line in lines) == (to != "onnx")


def test_whole_model_is_shipped_with_its_head(sentence_bert: Path, files: Path, tmp_path: Path) -> None:
    run = fit(changed(sections(sentence_bert, files), "train.method=full", "train.lr=1e-3"), tmp_path / "run").folder
    lines = read_lines(run / "predictions.jsonl")
    for line, answer in zip(lines, lorakit.load(run).predict([line["text"] for line in lines]), strict=True):
        assert answer["probabilities"] == pytest.approx(line["probabilities"], abs=1e-6)
    save_file({"linear.weight": torch.zeros(3, 16)}, run / "model" / "2_Dense" / "model.safetensors")
    with pytest.raises(AdapterError, match=r"damaged: classifier.bias is missing"):
        lorakit.load(run)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_sentence_transformers_reads_whole_models(
    method: str, sentence_bert: Path, files: Path, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    words = (f"train.method={method}", "train.lr=1e-3", "data.max_length=8")
    run = fit(changed(sections(sentence_bert, files), *words), tmp_path / "run").folder
    export_run(run, "sentence-transformers", out := tmp_path / "merged")
    for folder in (out, run / "model") if method == "full" else (out,):
        found = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
        close(found.softmax(-1), probabilities(run))


def test_peft_s_adapter_over_an_encoder_is_imported(sentence_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    body = transformers.AutoModel.from_pretrained(sentence_bert)
    body.add_module("classifier", nn.Linear(16, 2))
    settings = {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query"], "modules_to_save": ["classifier"]}
    theirs = peft.get_peft_model(body, peft.LoraConfig(**settings)).eval()
    nn.init.normal_(theirs.get_parameter("base_model.model.encoder.layer.0.attention.self.query.lora_B.default.weight"))
    theirs.save_pretrained(tmp_path / "theirs")
    import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(sentence_bert), labels=("bad", "good"))
    head = theirs.get_submodule("base_model.model.classifier.modules_to_save.default").state_dict()
    close(by_hand(theirs, head, sentence_bert), probabilities(tmp_path / "ours"))


def test_resumed_run_reads_what_it_read(sentence_bert: Path, files: Path, tmp_path: Path) -> None:
    """A checkpoint of before there was a choice has none in its recipe, whatever the base says."""
    raw = sections(sentence_bert, files)
    fit(changed(raw, "train.max_steps=1"), tmp_path / "run")
    checkpoint, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    recipe = changed(raw, "train.max_steps=1")
    assert same_recipe(checkpoint, recipe, lambda event: None).model.pooling == "mean"
    checkpoint.state["recipe"] = checkpoint.state["recipe"].replace('pooling = "mean"\n', "")
    assert same_recipe(checkpoint, recipe, lambda event: None).model.pooling == "cls"


def test_mean_is_refused_where_there_is_none(bert: Path, bert_run: Path, t5: Path, files: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model.pooling = 'mean' is for tasks that answer whole texts, not for token_cl"
    ):
        changed(sections(bert, files, "token_classification"), "model.pooling=mean")
    with pytest.raises(
        ModelError, match=r"model.pooling = 'mean': .*t5 is an encoder with a decoder; the mean is for enc"
    ):
        load_base(str(t5), CLASSIFICATION, labels=("a", "b"), pooling="mean")
    with pytest.raises(ConfigError, match=r"--to sentence-transformers: .* does not read the mean .*--to merged"):
        export_run(bert_run, "sentence-transformers", tmp_path / "out")
