"""Tasks over whole texts on the command line: trained, asked, scored, looked at, merged, and adopted from peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakit
from lorakit.app.report.figures import write_loss
from tests.app.conftest import Cli
from tests.app.test_import import WITH_POOLER, foreign
from tests.runs import DATA

TEXT = "the film was superb"
KEYS = {
    "bert_run": ["text", "label", "score", "probabilities"],
    "multi_label_run": ["text", "labels", "probabilities"],
    "ordinal_run": ["text", "label", "score", "probabilities"],
    "regression_run": ["text", "value"],
}
LEFT_OUT = {
    "multi_label_run": "thresholds: a plain model has 0.5 for each label; tuned: ",
    "ordinal_run": "outputs: logits of a label beyond the k-th",
    "regression_run": "units: value = ",
}
WORDS = {
    "classification": ("train.csv", (), "sequence_classification", "accuracy"),
    "multi-label": (
        "train.ratings.csv",
        ("--label", "topics", "data.label_separator=|"),
        "multi_label_classification",
        "macro_average_precision",
    ),
    "ordinal": ("train.ratings.csv", ("--label", "stars"), "ordinal_classification", "quadratic_kappa"),
    "regression": ("train.ratings.csv", ("--label", "stars"), "sequence_regression", "pearson"),
}


@pytest.mark.parametrize("word", WORDS)
def test_word_trains_its_task(cli: Cli, bert: Path, files: Path, tmp_path: Path, word: str) -> None:
    data, options, task, metric = WORDS[word]
    short = ("train.max_steps=2", "train.batch_size=8", "output.dir=run", "model.dtype=fp32")
    code, out, err = cli("train", files / data, "--model", bert, "--task", word, *options, *short, "--json")
    assert (code, json.loads(out)["metric"]) == (0, metric), err
    assert f'name = "{task}"' in (tmp_path / "run" / "recipe.toml").read_text()


@pytest.mark.parametrize("name", KEYS)
def test_answers_scores_and_facts_of_a_run(cli: Cli, request: pytest.FixtureRequest, files: Path, name: str) -> None:
    run = request.getfixturevalue(name)
    assert (run / "loss.png").is_file()
    code, out, _ = cli("predict", run, TEXT)
    assert code == 0
    assert list(json.loads(out)) == KEYS[name]
    scores = json.loads((run / "scores.json").read_text())
    source = json.loads((run / "adapter" / "lorakit.json").read_text())["task"]["name"]
    code, out, _ = cli("evaluate", run, files / f"validation.{DATA[source][0]}", "--json")
    assert code == 0
    assert json.loads(out)[scores["metric"]] == scores[scores["metric"]]
    code, out, _ = cli("inspect", run)
    assert code == 0
    assert f"task: {source}" in out


def test_temperature_is_shown_and_put_into_answers_when_asked_for(cli: Cli, bert: Path, files: Path) -> None:
    short = ("train.max_steps=2", "train.batch_size=8", "model.dtype=fp32", "task.calibrate=true", "output.dir=run")
    code, out, _ = cli("train", files / "train.csv", "--model", bert, *short)
    assert code == 0
    assert re.search(r"  a temperature of \d+\.\d\d, in the answers, takes ece 0\.\d{3} to 0\.\d{3}, nll ", out)
    scores = json.loads(Path("run/scores.json").read_text())
    assert scores["calibration"]["scaled"] == {name: scores[name] for name in ("ece", "brier", "nll")}
    (first, *_) = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    (again,) = lorakit.load("run").predict([first["text"]])
    assert again["score"] == pytest.approx(first["score"], abs=1e-5)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_merge_says_what_a_plain_model_lacks(cli: Cli, request: pytest.FixtureRequest, name: str) -> None:
    code, out, _ = cli("merge", request.getfixturevalue(name), "--out", "merged")
    assert code == 0
    assert LEFT_OUT[name] in out


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
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (scores["pearson"], scores["best_step"]) == (None, 2)
    assert "pearson" not in scores["intervals"] and "mae" in scores["intervals"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    write_loss(tmp_path / "loss.png", lines, scores)
    assert cli("report", "run").code == 0
    assert "undefined" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("name", ["multi_label_run", "regression_run"])
def test_pipeline_of_transformers_gives_the_same_answer(
    cli: Cli, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    run = request.getfixturevalue(name)
    assert cli("merge", run, "--out", "merged").code == 0
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "merged"), top_k=None, device="cpu")
    found = {answer["label"]: answer["score"] for answer in pipeline([TEXT])[0]}
    loaded = lorakit.load(run)
    (ours,) = loaded.predict([TEXT])
    if name == "regression_run":
        units = loaded.side.tuned
        assert units["mean"] + units["spread"] * found["value"] == pytest.approx(ours["value"], abs=1e-5)
    else:
        assert found == pytest.approx(ours["probabilities"], abs=1e-5)


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
