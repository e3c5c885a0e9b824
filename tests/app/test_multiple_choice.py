"""Multiple choice. The oracle: transformers' AutoModelForMultipleChoice, of losses, logits and folders, and peft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel
from transformers import AutoModelForMultipleChoice

import lorakit
from lorakit.app.commands.export import export_run
from lorakit.app.export.adapters import merge
from lorakit.data.example import Example
from lorakit.errors import ConfigError, DataError
from lorakit.inference.answer import Answered
from lorakit.inference.predictor import Predictor
from lorakit.training.prepare import prepare
from tests.app.conftest import Cli, every_command_reads
from tests.related import save_table
from tests.runs import changed, fit, read_lines, scores_of, sections

ROWS = [
    ("a good film", ("boring plot", "superb cast", "stale"), "B"),
    ("a film with a long title that goes on", ("superb", "boring scene"), "A"),
    ("plot", ("a", "b", "c", "d", "e"), "E"),
]
QUESTIONS = [Example(text, label, choices=choices) for text, choices, label in ROWS]


def oracle(model: Any, predictor: Predictor, example: Example) -> Any:
    """transformers' answer to one question, (1, C), with its loss where the question has a label."""
    texts = [example.text] * len(example.choices)
    batch = predictor.tokenizer(texts, list(example.choices), padding=True, truncation=True, return_tensors="pt")
    label = None if example.label is None else torch.tensor(["ABCDE".index(str(example.label))])
    with torch.no_grad():
        return model(**{key: ids[None] for key, ids in batch.items()}, labels=label)


@pytest.fixture(scope="module")
def run(bert: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("train.epochs=8", "train.lr=1e-2", "train.micro_batch_size=3", "lora.dropout=0")
    recipe = changed(sections(bert, files, "multiple_choice"), *words)
    return fit(recipe, tmp_path_factory.mktemp("choice") / "run").folder


def test_run_learns_and_scores_what_it_answers(run: Path, files: Path) -> None:
    scores = scores_of(run)
    assert scores["accuracy"] > 0.7 and scores["metric"] == "accuracy"  # by chance 0.42
    low, high = scores["intervals"]["accuracy"]
    assert low <= scores["accuracy"] <= high
    lines = read_lines(run / "predictions.jsonl")
    assert sum(line["label"] == line["expected"] for line in lines) / len(lines) == pytest.approx(scores["accuracy"])
    assert {len(line["choices"]) for line in lines} == {2, 3}
    predictor = lorakit.load(run)
    again = predictor.evaluate(predictor.read_labelled(str(files / "validation.choices.csv")).examples)
    assert again["nll"] == pytest.approx(scores["nll"], rel=1e-5)


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_logits_and_loss_are_those_of_transformers(form: str, run: Path, tmp_path: Path) -> None:
    predictor = lorakit.load(run)
    if form == "merged":
        merge(run, tmp_path / "merged")
        theirs = AutoModelForMultipleChoice.from_pretrained(tmp_path / "merged")
    else:  # which finds class and base in the adapter's own files
        theirs = AutoPeftModel.from_pretrained(run / "adapter")
    answers = [oracle(theirs.eval(), predictor, example) for example in QUESTIONS]
    mine = predictor.answers(QUESTIONS)
    for answer, one in zip(answers, mine, strict=True):
        torch.testing.assert_close(torch.tensor(one), answer.logits[0].softmax(0), rtol=1e-4, atol=1e-6)
    task = predictor.task
    batch = task.collate([item for own in task.encode(QUESTIONS) for item in own])
    with torch.no_grad():
        losses = task.losses(predictor.model, batch)
    assert batch["n_targets"].tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 1]
    expected = torch.stack([answer.loss for answer in answers])
    torch.testing.assert_close(losses[batch["n_targets"] == 1], expected, rtol=1e-4, atol=1e-5)
    assert losses.count_nonzero() == len(QUESTIONS)


def test_gradient_is_that_of_cross_entropy_over_each_question(run: Path) -> None:
    task = lorakit.load(run).task
    batch = task.collate([item for own in task.encode(QUESTIONS) for item in own])
    scores = torch.randn(10, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mine = task.losses(Answered(scores, {}), batch).sum()
    groups = scores[:, 0].split([len(example.choices) for example in QUESTIONS])
    expected = sum(
        torch.nn.functional.cross_entropy(group[None], torch.tensor(["ABCDE".index(str(e.label))]))
        for group, e in zip(groups, QUESTIONS, strict=True)
    )
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(*(torch.autograd.grad(value, scores)[0] for value in (mine, expected)))


def test_checkpoint_of_transformers_is_gone_on_with(bert: Path, files: Path, run: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "base")
    raw = sections(tmp_path / "base", files, "multiple_choice")
    again = fit(changed(raw, "train.max_steps=1"), tmp_path / "again").scores
    assert again["base_score"] == pytest.approx(scores_of(run)["accuracy"])


def test_every_command_takes_it(run: Path, bert: Path, files: Path, cli: Cli, tmp_path: Path) -> None:
    data = files / "validation.choices.csv"
    trained = cli(
        "train", data, "--model", bert, "--task", "choice", "train.epochs=1", f"output.dir={tmp_path / 'run'}"
    )
    assert trained.code == 0, trained.err
    assert "choices are column 'choice1', 'choice2', 'choice3'" in trained.err
    every_command_reads(cli, tmp_path / "run", data)
    assert re.search("[ABC]: [a-z]+", (tmp_path / "run" / "report.html").read_text())
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "multiple-choice" in card and "AutoModelForMultipleChoice" in card and "predictor.rank(" in card
    assert json.loads(cli("evaluate", run, files / "train.choices.csv", "--json").out)["accuracy"] > 0.85
    save_table(
        tmp_path / "new.csv", ["question", "choice1", "choice2", "choice3"], [("which one", "superb", "stale", "")]
    )
    (line,) = cli("predict", run, "--file", "new.csv").out.splitlines()
    answer = json.loads(line)
    assert list(answer) == ["text", "choices", "label", "score", "probabilities"] and len(answer["probabilities"]) == 2
    assert cli("predict", run, "--file", "new.csv", "--out", "folder", "--format", "jsonl").code == 0
    assert read_lines(next(Path("folder").glob("part-*")))[0]["label"] == answer["label"]
    named = ("predict", run, "which one", "--choice", "superb", "--choice", "stale")
    assert json.loads(cli(*named).out) == answer
    save_table(tmp_path / "other.csv", ["question", "x", "y", "ok"], [("which one", "superb", "stale", "A")])
    assert json.loads(cli("predict", run, "--file", "other.csv", "--choices", "x,y").out)["label"] == answer["label"]
    assert cli("evaluate", run, "other.csv", "--choices", "x,y", "--label", "ok").code == 0
    checked = cli("check", data, "--task", "choice", "--json")
    assert checked.code == 0 and json.loads(checked.out)["parts"]["train"]["labels"].keys() == {"A", "B", "C"}


def test_choices_are_ranked_here_and_by_a_server(run: Path) -> None:
    from fastapi.testclient import TestClient

    from lorakit.app.server.routes import Service, create_app
    from lorakit.inference.adapter_pool import AdapterPool

    predictor, texts = lorakit.load(run), list(ROWS[0][1])
    ranked = predictor.rank("which one", texts)
    assert sum(entry["score"] for entry in ranked) == pytest.approx(1)
    assert ranked[0]["text"] == texts[ranked[0]["index"]]
    with AdapterPool({"choice": run}) as pool:
        client = TestClient(create_app(Service(pool), hosts=["*"]))
        answered = client.post("/rerank", json={"query": "which one", "texts": texts}).json()
        assert [entry["index"] for entry in answered] == [entry["index"] for entry in ranked]
        assert [entry["score"] for entry in answered] == pytest.approx([entry["score"] for entry in ranked], abs=1e-5)
        few = client.post("/rerank", json={"query": "which one", "texts": texts[:1]})
        assert few.status_code == 422 and "1 choices, not 2 to 26" in few.json()["error"]
        alone = client.post("/predict", json={"inputs": "which one"})
        assert alone.status_code == 422 and "picks one of several choices" in alone.json()["error"]


@pytest.mark.slow
def test_onnx_file_gives_a_score_a_choice(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    output = export_run(run, "onnx", tmp_path / "onnx")
    assert output.facts["check"]["answers_differing"] == 0


def test_what_cannot_be_is_refused_in_words(bert: Path, files: Path, run: Path, bert_run: Path, cli: Cli) -> None:
    raw = sections(bert, files, "multiple_choice")
    with pytest.raises(ConfigError, match=r"fits single pairs, which task.name = 'multiple_choice' cannot judge"):
        prepare(changed(raw, "train.head_start=probe"))
    with pytest.raises(ConfigError, match=r"data.choices = 'x' is for multiple choice, not sequence_classification"):
        changed(sections(bert, files), "data.choices=x")
    predictor = lorakit.load(run)
    for choices, message in (
        ([], "this run picks one of several choices, but there are none"),
        (["superb"], "1 choices, not 2 to 26"),
        (["superb"] * 27, "27 choices, not 2 to 26"),
        (["superb", " "], "choice 2 is empty"),
    ):
        with pytest.raises(DataError, match=f"query: {message}"):
            predictor.rank("which one", choices)
    for words, message in (
        (
            ("which one",),
            "text 1 of 1: this run picks one of several choices, but there are none; give them in columns",
        ),
        (("which one", "--choices", "x,y"), "--choices only works with --file"),
        (("which one", "or", "--choice", "x"), "--choice only works with one TEXT"),
        (
            ("--file", files / "validation.csv", "--choices", "x,y"),
            "--choices = 'x' is not a column; known: label, text",
        ),
    ):
        refused = cli("predict", run, *words)
        assert refused.code in (2, 3) and message in refused.err, refused.err
    refused = cli("predict", bert_run, "a film", "--choice", "x", "--choice", "y")
    assert refused.code == 3 and "does not pick one of several choices, its task is sequence_class" in refused.err


def test_few_questions_are_scored_by_cross_validation(bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sections(bert, files, "multiple_choice")
    del raw["data"]["validation"]
    notes: list[object] = []
    recipe = changed(raw, "data.folds=2", "train.epochs=1")
    prepare(changed(raw, "data.folds=2", "data.max_length=8"), notes.append)
    assert not any("windows" in str(note) for note in notes), notes  # a question with three choices is no long text
    scores = fit(recipe, tmp_path).scores
    assert scores["folds"] == 2 and scores["examples"]["validation"] == scores["examples"]["train"]
    lines = read_lines(tmp_path / "predictions.jsonl")
    assert sum(line["label"] == line["expected"] for line in lines) / len(lines) == pytest.approx(scores["accuracy"])
