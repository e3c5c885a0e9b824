"""Tasks over whole texts on the command line: calibrated, merged, scored, and adopted from peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakit
from lorakit.app.report.charts import write_loss
from tests.app.conftest import Cli
from tests.app.test_import import WITH_POOLER, foreign
from tests.runs import read_lines, scores_of

TEXT = "the film was superb"
LEFT_OUT = {
    "multi_label_run": "thresholds: a plain model uses 0.5 for each label; the tuned ones are ",
    "ordinal_run": "outputs: logits of a label beyond the k-th",
    "regression_run": "units: value = ",
}


def test_temperature_is_shown_and_put_into_answers_when_asked_for(cli: Cli, bert: Path, files: Path) -> None:
    short = ("train.max_steps=2", "train.batch_size=8", "model.dtype=fp32", "task.calibrate=true", "output.dir=run")
    code, out, _ = cli("train", files / "train.csv", "--model", bert, *short, "data.folds=0")
    assert code == 0
    assert re.search(r"  a temperature of \d+\.\d\d \(applied\) changes ece from 0\.\d{3} to 0\.\d{3}, nll ", out)
    scores = json.loads(Path("run/scores.json").read_text())
    assert scores["calibration"]["scaled"] == {name: scores[name] for name in ("ece", "brier", "nll")}
    (first, *_) = read_lines(Path("run/predictions.jsonl"))
    (again,) = lorakit.load("run").predict([first["text"]])
    assert again["score"] == pytest.approx(first["score"], abs=1e-5)


@pytest.mark.filterwarnings("ignore")  # of transformers' pipeline about a missing device
def test_correlation_with_a_constant_is_undefined_wherever_it_is_shown(
    cli: Cli, bert: Path, files: Path, tmp_path: Path
) -> None:
    Path("constant.csv").write_text("text,stars\na film,1.5\na superb film,1.5\n")
    words = ("--model", bert, "--task", "regression", "--label", "stars", "data.validation=constant.csv")
    short = ("train.max_steps=2", "train.eval_every=1", "train.batch_size=8", "output.dir=run", "model.dtype=fp32")
    code, out, err = cli("train", files / "train.ratings.csv", *words, *short)
    assert code == 0, err
    assert "step 2/2  validation pearson undefined  (best so far)" in err
    assert re.search(r"^pearson +undefined$", out, re.M) and "nan" not in out.lower()
    scores = scores_of(tmp_path / "run")
    assert (scores["pearson"], scores["best_step"]) == (None, 2)
    assert "pearson" not in scores["intervals"] and "mae" in scores["intervals"]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    write_loss(tmp_path / "loss.png", lines, scores)
    assert cli("report", "run").code == 0
    assert "undefined" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_pipeline_of_transformers_answers_by_a_merged_model_and_what_it_lacks_is_named(
    cli: Cli, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    run = request.getfixturevalue(name)
    code, out, _ = cli("merge", run, "--out", "merged")
    assert (code, out.splitlines()[-1]) == (0, "merged model: merged")
    assert "\ncheck: read back from the files, on " in out and LEFT_OUT[name] in out
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "merged"), top_k=None, device="cpu")
    found = {answer["label"]: answer["score"] for answer in pipeline([TEXT])[0]}
    loaded = lorakit.load(run)
    (ours,) = loaded.predict([TEXT])
    if name == "regression_run":
        units = loaded.side.tuned
        assert units["mean"] + units["spread"] * found["value"] == pytest.approx(ours["value"], abs=1e-5)
    elif name == "multi_label_run":
        assert found == pytest.approx(ours["probabilities"], abs=1e-5)
    else:
        assert len(found) == len(ours["probabilities"]) - 1  # one output a step between labels


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "outputs", "options"),
    [
        ("sequence_regression", 1, ()),
        ("ordinal_classification", 2, ("--labels", "low,mid,high")),
        ("multi_label_classification", 3, ("--labels", "a,b,c")),
    ],
)
def test_adapter_of_peft_is_adopted_for_its_task(
    cli: Cli, bert: Path, tmp_path: Path, task: str, outputs: int, options: Any
) -> None:
    theirs = foreign(bert, tmp_path / "theirs", outputs, **WITH_POOLER)
    code, _, err = cli("import", "theirs", "--out", "ours", "--task", task, *options)
    assert (code, err) == (0, "")
    batch = transformers.AutoTokenizer.from_pretrained(bert)(TEXT, return_tensors="pt")
    (logits,) = theirs(**batch).logits
    (answer,) = lorakit.load(tmp_path / "ours").predict([TEXT])
    if task == "sequence_regression":
        assert answer["value"] == pytest.approx(logits.item(), abs=1e-5)
    elif task == "multi_label_classification":
        assert list(answer["probabilities"].values()) == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    else:
        assert answer["probabilities"]["low"] == pytest.approx(1 - logits[0].sigmoid().item(), abs=1e-5)


def test_ordinal_adapter_without_its_order_is_refused(cli: Cli, bert: Path, tmp_path: Path) -> None:
    foreign(bert, tmp_path / "theirs", 2, **WITH_POOLER)
    code, _, err = cli("import", "theirs", "--out", "ours", "--task", "ordinal_classification")
    assert code == 2
    assert "name the labels from lowest to highest with --labels" in err
