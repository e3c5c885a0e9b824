"""The learning-rate probe: its rule on losses that are known, and a real one on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorakit.app.sweep.lr_probe import SHORT_RUNS, plan_probe, recommend
from lorakit.app.sweep.plan import Options
from lorakit.errors import ConfigError
from tests.app.conftest import Cli
from tests.runs import changed, sections


def bowl(rate: float, best: float) -> float:
    return 0.3 + 0.1 * math.log(rate / best) ** 2


@pytest.mark.parametrize("best", [2e-4, 1e-3, 3.3e-3])
def test_recommend_finds_the_bottom_of_a_bowl_between_the_rates(best: float) -> None:
    rates = [10 ** (-i / 3) for i in range(15, 2, -1)]
    rate, is_at_edge = recommend(rates, [bowl(rate, best) for rate in rates])
    assert rate == pytest.approx(best / SHORT_RUNS, rel=0.05) and not is_at_edge


def test_recommend_tells_of_an_edge_and_steps_back_from_what_diverged() -> None:
    assert recommend([1e-4, 1e-3, 1e-2], [0.7, 0.5, 0.4]) == (1e-2, True)
    assert recommend([1e-4, 1e-3, 1e-2], [0.3, 0.5, None]) == (1e-4, True)
    assert recommend([1e-4, 1e-3, 1e-2], [0.7, 0.5, None]) == (pytest.approx(1e-3 / SHORT_RUNS, rel=0.02), False)


@pytest.mark.usefixtures("no_pictures")
def test_probe_trains_every_rate_over_the_same_batches(cli: Cli, bert: Path, files: Path) -> None:
    Path("tiny.toml").write_text(changed(sections(bert, files)).to_toml())
    words = ("sweep", "tiny.toml", "train.lr=1e-3,2e-2,1e37", "--lr-probe", "--probe-steps", 8)
    code, out, err = cli(*words)
    assert code == 0, err
    assert cli(*words, "--resume").out == out
    folder = Path("runs") / "tiny-lr-probe"
    found = json.loads((folder / "lr-probe.json").read_text())
    assert found["rates"] == [1e-3, 2e-2, 1e37] and found["losses"][-1] is None
    for name, rate in (("000-lr0.001-seed0", 1e-3), ("001-lr0.02-seed0", 2e-2)):
        metrics = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in metrics if "loss" in line]
        assert len(losses) == 8 and metrics[-2]["lr"] == rate
        assert found["losses"][found["rates"].index(rate)] == pytest.approx((losses[-1] + losses[-2]) / 2)
    assert out.splitlines()[-1] == f"to use it: lorakit train tiny.toml train.lr={found['recommended']:g}"
    assert (folder / "lr-probe.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.lr=1e-3,1e-2", "at least three rates"),
        ("train.lr=0..1e-2", "must begin above 0"),
        ("lora.r=4,8", "varies train.lr only"),
    ],
)
def test_probe_refuses(tmp_path: Path, word: str, message: str) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(changed(sections(Path("base"), Path("data"))).to_toml())
    with pytest.raises(ConfigError, match=message):
        plan_probe(Options(path, (word,)))
    with pytest.raises(ConfigError, match="--lr-probe and --random"):
        plan_probe(Options(path, (), random=3))
