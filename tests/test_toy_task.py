"""A task from outside of the package, whole: its facts, its class, one line that registers it, and every command on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import Tensor, nn

import lorakit
from lorakit.data.example import Example
from lorakit.errors import ConfigError
from lorakit.task_info import TASKS, TaskInfo
from lorakit.tasks.base import Batch, inputs_of
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.labels import mean, values
from lorakit.tasks.sequence import SequenceTask, texts_of
from tests.app.conftest import Cli, cli, every_command_reads, no_pictures  # noqa: F401
from tests.app.test_server import serve
from tests.runs import write_ratings

INFO = TaskInfo(
    name="median_regression",
    made_by=f"{__name__}:MedianRegression.make",
    model_kind="regression",
    wants="number",
    metrics=("mae",),
    answer_columns=("value",),
    word="median",
    outputs=lambda labels: ("value",),
)


@dataclass(frozen=True)
class MedianRegression(SequenceTask):
    """Regression by absolute error, whose best constant answer is the median."""

    info = INFO

    def target(self, example: Example) -> list[float]:
        return [self.expected(example)]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**inputs_of(batch)).logits  # (B, 1)
        return (logits.float() - batch["labels"]).abs().sum(1)

    def predict(self, model: nn.Module, batch: Batch) -> list[float]:
        numbers: list[float] = model(**inputs_of(batch)).logits.float().squeeze(-1).tolist()
        return numbers

    def evaluate(self, examples: Sequence[Example], answers: Sequence[float]) -> Evaluation:
        distances = np.abs(np.array([self.expected(example) for example in examples]) - np.array(answers))
        statistics = {"mae": mean(distances)}
        return Evaluation(values(statistics), statistics)

    def to_json(self, example: Example, answer: float) -> dict[str, Any]:
        return {**texts_of(example), "value": answer}

    def expected(self, example: Example) -> float:
        assert isinstance(example.label, float)
        return example.label


@pytest.fixture
def registered() -> Iterator[None]:
    lorakit.register_task(INFO)
    yield
    del TASKS[INFO.name]


@pytest.mark.usefixtures("registered")
def test_task_from_outside_does_all_that_others_do(cli: Cli, bert: Path, tmp_path: Path) -> None:  # noqa: F811
    data, run = write_ratings(tmp_path / "ratings.csv", 24), tmp_path / "run"
    words = ("--task", "median", "--label", "stars", "train.epochs=2", "train.lr=1e-2", f"output.dir={run}", "--json")
    trained = cli("train", data, "--model", bert, *words)
    assert trained.code == 0, trained.err
    scores = json.loads(trained.out)
    assert scores["metric"] == "mae" and scores["intervals"]["mae"][0] <= scores["mae"] <= scores["intervals"]["mae"][1]

    evaluated = json.loads(cli("evaluate", run, data, "--json").out)
    predicted = json.loads(cli("predict", run, "a superb film").out)
    assert evaluated["mae"] > 0 and set(predicted) == {"text", "value"}
    done = cli("predict", run, "--file", data, "--out", "answers.parquet")
    assert done.code == 0 and "value" in pq.read_schema("answers.parquet").names

    with serve(tmp_path) as server:
        answered = server.ask("/predict", {"inputs": "a superb film"}).json
    assert answered == [{"label": "value", "score": pytest.approx(predicted["value"], abs=1e-5)}]

    every_command_reads(cli, run, data)
    assert "median regression" in (run / "report.html").read_text()


def test_task_that_is_not_registered_is_not_known(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    found = cli("train", tmp_path / "x.csv", "--model", "minilm", "task.name=median_regression")
    assert found.code == 2 and "'median_regression'" in found.err


def test_name_of_another_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^task 'sequence_regression' is registered already, made by lorakit"):
        lorakit.register_task(TaskInfo(**{**vars(INFO), "name": "sequence_regression"}))
    with pytest.raises(ConfigError, match=r"^task 'x': answer_columns: 'mood' is not one of \('label', "):
        TaskInfo(**{**vars(INFO), "name": "x", "answer_columns": ("mood",)})
