"""`lorakit combine`: the search, against functions whose best point is known, and on runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorakit.app.commands.combine import FIRST_STEP, LAST_STEP, Judge, Several, Way, combine_runs, search_weights
from lorakit.data.batches import split
from lorakit.data.example import Example
from lorakit.errors import ConfigError, OutputError
from lorakit.inference.predictor import load
from lorakit.lora import combine as combine_adapters
from tests.app.conftest import Cli
from tests.runs import changed, fit, sections, write_reviews

TEXTS = [Example("the superb film"), Example("a stale plot and a boring cast")]

# The search


@pytest.mark.parametrize("best", [(0.3, 0.7), (1.2, -0.4), (0.0, 1.0)])
def test_search_comes_near_the_best_point(best: tuple[float, float]) -> None:
    calls: list[tuple[float, ...]] = []

    def value(point: tuple[float, ...]) -> float:
        calls.append(point)
        return -sum((a - b) ** 2 for a, b in zip(point, best, strict=True))

    found, tried = search_weights(value, [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)], 100)
    assert all(abs(a - b) <= LAST_STEP for a, b in zip(found, best, strict=True))
    assert tried == len(calls) == len(set(calls)) <= 100


def test_search_keeps_its_budget_and_the_earlier_of_equals() -> None:
    starts = [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
    best, tried = search_weights(lambda point: 1.0, starts, 7)
    assert best == (0.5, 0.5) and tried <= 7
    assert search_weights(lambda point: float("nan"), starts, 4) == ((0.5, 0.5), 4)
    assert search_weights(sum, starts, 4) == ((0.5 + FIRST_STEP, 0.5), 4)


# Runs


@pytest.fixture(scope="module")
def runs(bert: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in rank and seed."""
    folder = tmp_path_factory.mktemp("combined")
    raw = sections(bert, files)
    for i, rank in enumerate((4, 2)):
        fit(changed(raw, f"lora.r={rank}", f"train.seed={i}", "train.epochs=1"), folder / f"run{i}")
    return [folder / "run0", folder / "run1"]


def test_combine_searches_on_one_half_and_scores_on_the_other(runs: list[Path], files: Path, tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "held-out.csv", 40, seed=5)
    found = combine_runs(runs, judge=Judge(str(data), trials=12), out=tmp_path / "both")
    rows = found.facts["combinations"]
    assert [row["name"] for row in rows] == [*map(str, runs), "equal weights", "found"]
    assert (found.facts["examples"], found.facts["searched"] <= 12) == ({"searched": 20, "scored": 20}, True)
    predictors = [load(run) for run in (*runs, tmp_path / "both")]
    _, unseen = split(predictors[0].read_labelled(str(data)).examples, 0.5, 0)
    scores = [predictor.evaluate(unseen)["accuracy"] for predictor in predictors]
    assert scores == [row["score"] for row in rows if row["name"] != "equal weights"]
    side = json.loads((tmp_path / "both" / "lorakit.json").read_text())
    assert side["combined"]["weights"] == found.facts["weights"]
    assert str(data) in side["data"] and side["scores"] == {"accuracy": rows[-1]["score"]}
    with pytest.raises(OutputError, match="exists already"):
        combine_runs(runs, weights=(1, 1), out=tmp_path / "both")


def test_combine_with_given_weights_is_the_sum_of_the_updates(runs: list[Path], tmp_path: Path) -> None:
    combine_runs(runs, (0.25, 2.0), out=tmp_path / "sum")
    several = Several(runs, Way())
    combine_adapters(several.model, several.names, (0.25, 2.0), "ours")
    one, other = load(tmp_path / "sum"), several
    batch = one.task.collate([item for e in one.task.encode(TEXTS) for item in e])
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.allclose(one.model(**ids).logits, other.model(**ids).logits, atol=1e-5)


def test_a_weight_of_zero_takes_no_part_of_the_rank(runs: list[Path]) -> None:
    assert [combine_runs(runs, weights).facts["r"] for weights in ((1, 0), (0, 2), (1, 2))] == [4, 2, 6]
    with pytest.raises(ConfigError, match="all of them are 0"):
        combine_runs(runs, (0, 0))


def test_numbers_are_combined_in_the_units_of_the_first_run(bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sections(bert, files, "sequence_regression")
    texts, folders = ["the superb film", "a stale plot"], []
    for i, name in enumerate(("stars", "hundredths")):
        data = tmp_path / f"{name}.csv"
        rows = (files / "train.ratings.csv").read_text().splitlines()
        label = rows[0].split(",").index(raw["data"]["label"])
        cells = [row.split(",") for row in rows[1:]]
        values = [
            ",".join(str(float(c) * 100 + 7) if i and j == label else c for j, c in enumerate(row)) for row in cells
        ]
        data.write_text("\n".join([rows[0], *values]) + "\n")
        words = (f"data.train={data}", f"data.validation={data}", "train.epochs=1")
        folders.append(fit(changed(raw, *words), tmp_path / name).folder)
    alone = [load(folder).predict(texts) for folder in folders]
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        out = tmp_path / f"combined{weights}"
        combine_runs(folders, weights, out=out)
        for answer, first, second in zip(load(out).predict(texts), *alone, strict=True):
            if 1.0 in weights:
                assert answer["value"] == pytest.approx((first, second)[weights.index(1.0)]["value"], rel=1e-4)
            else:  # the heads are averaged, and so are the updates below them: not the answers
                assert (
                    min(first["value"], second["value"]) - 50 < answer["value"] < max(first["value"], second["value"])
                )


def test_command_prints_a_table_and_json(cli: Cli, runs: list[Path], files: Path) -> None:
    words = ("combine", *runs, "--on", files / "train.csv", "--search", 5)
    code, out, err = cli(*words)
    assert code == 0, err
    assert out.splitlines()[1].startswith(str(runs[0]))
    assert "scores on the 18 examples that the search over 18 others has not seen; 5 weights tried" in out
    found = json.loads(cli(*words, "--json", "--weights", "0.5,0.5").out)
    assert found["weights"] == [0.5, 0.5] and found["examples"] == {"searched": 0, "scored": 36}
    assert cli(*words, "--weights", "a").code == 2
