"""`lorakit combine` on runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorakit.app.commands.combine import combine_runs
from lorakit.data.example import Example
from lorakit.errors import ConfigError, OutputError
from lorakit.inference.predictor import load
from lorakit.lora import combine as combine_adapters
from lorakit.lora import load_adapter
from tests.app.conftest import Cli
from tests.runs import changed, fit, sections

TEXTS = [Example("the superb film"), Example("a stale plot and a boring cast")]


@pytest.fixture(scope="module")
def runs(bert: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in rank and seed."""
    folder = tmp_path_factory.mktemp("combined")
    raw = sections(bert, files)
    for i, rank in enumerate((4, 2)):
        fit(changed(raw, f"lora.r={rank}", f"train.seed={i}", "train.epochs=1"), folder / f"run{i}")
    return [folder / "run0", folder / "run1"]


def test_combination_is_the_weighted_sum_of_the_updates(runs: list[Path], tmp_path: Path) -> None:
    combine_runs(runs, (0.25, 2.0), out=tmp_path / "sum")
    one, other = load(tmp_path / "sum"), load(runs[0])
    load_adapter(other.model, runs[1] / "adapter", "second")
    combine_adapters(other.model, ["default", "second"], (0.25, 2.0), "ours")
    batch = one.task.collate([item for e in one.task.encode(TEXTS) for item in e])
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.allclose(one.model(**ids).logits, other.model(**ids).logits, atol=1e-5)
    side = json.loads((tmp_path / "sum" / "lorakit.json").read_text())
    assert (side["combined"]["runs"], side["combined"]["weights"]) == ([*map(str, runs)], [0.25, 2.0])
    assert side["scores"] == {} and side["data"].keys() == other.side.data.keys()
    with pytest.raises(OutputError, match="exists already"):
        combine_runs(runs, out=tmp_path / "sum")


def test_a_weight_of_zero_takes_no_part_of_the_rank(runs: list[Path]) -> None:
    assert [combine_runs(runs, weights).facts["r"] for weights in ((1, 0), (0, 2), (1, 2))] == [4, 2, 6]
    with pytest.raises(ConfigError, match="all weights are 0"):
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


def test_command_takes_equal_weights_where_none_are_given(cli: Cli, runs: list[Path]) -> None:
    found = json.loads(cli("combine", *runs, "--json", "--rank", 2).out)
    assert (found["weights"], found["r"]) == ([0.5, 0.5], 2) and 0 < found["largest_error"] < 1
    assert cli("combine", *runs, "--weights", "a").code == 2
