"""`lorakit export --to onnx`, and how exports prove themselves. What runs torch's exporter takes seconds and is marked slow."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lorakit
from lorakit.app.commands.export import export_run
from lorakit.app.export.check import BOUND, MADE, Agreement, Texts, agree, check_exact, texts_of
from lorakit.errors import AdapterError
from lorakit.inference.adapter_folder import read_side
from lorakit.inference.predictor import Predictor
from tests.app.conftest import Cli
from tests.conftest import N_TRAIN, N_VALIDATION
from tests.related import recipe
from tests.runs import changed, fit, sections

DOCUMENT = Path(__file__).parents[2] / "docs" / "exports.md"
slow = pytest.mark.slow


# The check itself


def compared(predictor: Predictor, run: Path, export: Any) -> Agreement:
    return agree(predictor.task, predictor.side, texts_of(run, predictor.side), predictor.model, export)


def test_texts_are_the_run_s_then_made_up_ones_of_all_lengths(bert_run: Path) -> None:
    predictor = lorakit.load(bert_run)
    texts = texts_of(bert_run, predictor.side)
    assert (texts.n_own, texts.n_gold, len(texts.examples)) == (
        N_VALIDATION + N_TRAIN,
        N_VALIDATION,
        N_VALIDATION + N_TRAIN + MADE,
    )
    made = predictor.task.encode(texts.examples[texts.n_own :])
    lengths = [len(item["input_ids"]) for (item,) in made]
    assert lengths == sorted(lengths)
    limit = predictor.side.max_length
    assert (lengths[0], lengths[-1]) == (3, limit)  # one word between [CLS] and [SEP]; as many as fit
    assert max(np.diff(lengths)) <= -(-limit // (MADE - 1))


def test_texts_come_from_answers_where_the_data_are_gone(bert_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(bert_run, run)
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(re.sub(r'train = ".*"', 'train = "gone.csv"', recipe))
    side = read_side(run / "adapter")
    for path in (run, run / "adapter"):
        texts = texts_of(path, side)
        assert (texts.n_own, texts.n_gold) == (N_VALIDATION, 0)
    shutil.move(run / "adapter", tmp_path / "alone")
    assert texts_of(tmp_path / "alone", side).n_own == 0


@pytest.mark.parametrize("run", ["bert_run", "tagger_run"])
def test_a_model_agrees_with_itself_and_not_with_another(request: pytest.FixtureRequest, run: str) -> None:
    folder = request.getfixturevalue(run)
    predictor = lorakit.load(folder)
    same = compared(predictor, folder, predictor.model)
    assert (same.logits, same.differing, same.same) == (0, 0, 1)
    assert same.before == same.after
    other = copy.deepcopy(predictor.model)
    with torch.no_grad():
        other.classifier.adapters["default"].bias[0] += 30  # every answer is the first label
    far = compared(predictor, folder, other)
    assert far.logits == pytest.approx(30, abs=1e-3)
    assert far.differing > 0
    assert far.before == same.before != far.after
    assert not far.is_exact


@pytest.mark.parametrize(("logits", "is_exact"), [(BOUND, True), (2 * BOUND, False), (float("nan"), False)])
def test_difference_beyond_the_bound_is_refused(logits: float, is_exact: bool) -> None:
    agreement = Agreement(Texts([], 0, 0), logits, 1.0, 0, {}, {})
    assert agreement.is_exact == is_exact
    if not is_exact:
        with pytest.raises(RuntimeError, match="the export differs from the model; nothing was written"):
            check_exact(agreement)


def test_logits_that_are_no_number_are_not_overlooked(tagger_run: Path) -> None:
    predictor = lorakit.load(tagger_run)

    class Broken(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            logits = predictor.model(**inputs).logits
            return SimpleNamespace(logits=logits.masked_fill(inputs["input_ids"][..., None] == 0, torch.nan))

    assert not compared(predictor, tagger_run, Broken()).is_exact


def test_merged_model_that_differs_is_not_published(
    bert_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    import lorakit.inference.predictor as predictor
    from lorakit.lora import unload

    monkeypatch.setattr(predictor, "merge_and_unload", unload)  # which leaves the adapter out
    code, _, err = cli("export", bert_run, "--to", "merged", "--out", "out")
    assert code == 1
    assert "the export differs from the model; nothing was written" in err
    assert list(tmp_path.iterdir()) == []


# Mistakes


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named(
    bert_run: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = cli("export", bert_run, "--to", "onnx", "--out", "out")
    assert (code, err) == (2, f"error: --to onnx needs {package}: pip install 'lorakit[onnx]'\n")
    assert list(tmp_path.iterdir()) == []


# Real exports


def client(folder: Path) -> Any:
    """The class that docs/exports.md shows, over an export."""
    pytest.importorskip("tokenizers")
    *_, code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert "torch" not in code
    names: dict[str, Any] = {}
    exec(code.replace('"reviews-onnx"', repr(str(folder))), names)
    return names["Classifier"]


def test_classifier_is_exported_and_the_documented_client_answers_as_the_run_does(
    bert_run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    out, n = tmp_path / "out", N_TRAIN + N_VALIDATION
    exported = export_run(bert_run, "onnx", out)
    check, sizes, *_ = exported.lines
    assert check.startswith(f"check: read back from the files, on {n + MADE} texts ({n} of the run's, {MADE} made up)")
    assert check.endswith("no answers differ")
    assert re.fullmatch(r"model.onnx: \d+\.\d MB, opset 20; 32 texts take \d+ ms, in PyTorch \d+ ms \(.*\)", sizes)
    assert exported.facts["check"]["logits"] <= BOUND * exported.facts["check"]["largest_logit"]
    assert {"model.onnx", "config.json", "lorakit.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    with pytest.raises(AdapterError, match="an export to onnx for other programs"):
        lorakit.load(out)

    texts = ["the film was superb", "dreadful", "a rather " * 40 + "boring plot"]
    ours = [line["probabilities"] for line in lorakit.load(bert_run).predict(texts)]
    assert client(out)(out)(texts) == [pytest.approx(row, abs=1e-4) for row in ours]


@slow
def test_int8_tells_what_it_costs(bert_run: Path, tmp_path: Path) -> None:
    _, _, int8, scores, *_ = export_run(bert_run, "onnx", tmp_path / "out", int8=True).lines
    assert re.match(r"int8 \(model_quantized\.onnx\): \d+\.\d MB, .* \d+\.\d% of the answers are the same", int8)
    assert scores.startswith(f"accuracy on {N_VALIDATION} validation texts: ")
    assert (tmp_path / "out" / "model_quantized.onnx").is_file()


@slow
@pytest.mark.parametrize("run", ["tagger_run", "multi_label_run", "ordinal_run", "regression_run"])
def test_every_task_that_reads_is_exported(request: pytest.FixtureRequest, run: str, cli: Cli, tmp_path: Path) -> None:
    folder = request.getfixturevalue(run)
    code, out, err = cli("export", folder, "--to", "onnx", "--out", "out", "--json")
    assert code == 0, err
    assert json.loads(out)["check"]["answers_differing"] == 0
    facts = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    predictor = lorakit.load(folder)
    assert facts["labels"] == list(predictor.task.labels)
    assert len(facts["outputs"]) == predictor.model.config.num_labels
    if run == "multi_label_run":
        texts = ["the plot", "a cast and a scene"]
        assert client(tmp_path / "out")(tmp_path / "out")(texts) == [a["labels"] for a in predictor.predict(texts)]


@slow
def test_dora_embeddings_and_other_places_are_exported(bert: Path, files: Path, tmp_path: Path, cli: Cli) -> None:
    places = "lora.target_modules=query,output.dense,word_embeddings"
    recipe = changed(sections(bert, files), "lora.use_dora=true", places, "lora.init=pissa", "train.max_steps=3")
    run = fit(recipe, tmp_path / "run").folder
    code, _, err = cli("export", run, "--to", "onnx", "--out", "out")
    assert code == 0, err


@slow
def test_crf_is_left_out_and_said_to_be(bert: Path, files: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = changed(sections(bert, files, "token_classification"), "task.crf=true", "train.max_steps=3")
    code, out, err = cli("export", fit(recipe, tmp_path / "run").folder, "--to", "onnx", "--out", "out")
    assert code == 0, err
    assert "crf: its transitions are left out" in out and "no answers differ" in out


def test_model_that_writes_is_refused(t5_run: Path, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code, _, err = cli("export", t5_run, "--to", "onnx", "--out", "out")
    assert (code, "generates text; export it with --to merged" in err) == (2, True)
    assert list(tmp_path.iterdir()) == []


@slow
def test_vectors_have_their_pooling_in_the_graph(encoder: Path, tables: Path, tmp_path: Path) -> None:
    import onnxruntime

    run = fit(recipe(encoder, tables / "pairs.csv"), tmp_path / "run").folder
    lines = export_run(run, "onnx", out := tmp_path / "onnx").lines
    assert lines[0].startswith("vectors: not normalised")
    predictor = lorakit.load(run)
    batch = predictor.tokenizer(["the film was superb", "moving"], padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    inputs = {each.name: batch[each.name] for each in session.get_inputs()}
    (vectors,) = session.run(None, inputs)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, predictor.embed(["the film was superb", "moving"]), atol=1e-4)
