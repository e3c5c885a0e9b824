"""`lorakit inspect --kernels`: what this machine makes of the fast parts."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from lorakit.app.cli import commands
from lorakit.runtime import device


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SHAPE", (64, 32, 48))
    monkeypatch.setattr("lorakit.app.commands.inspect.ATTENTION", (2, 2, 8, 16))


def test_the_gains_are_measured_and_printed() -> None:
    printed = CliRunner().invoke(commands, ["inspect", "--kernels"]).output
    assert "adapted linear layer, 64 rows of 32 to 48" in printed
    facts = json.loads(CliRunner().invoke(commands, ["inspect", "--kernels", "--json"]).output)
    assert facts["threads"] == torch.get_num_threads()
    assert all(facts[key] > 0 for key in ("bf16_gain", "adapted_linear_gain", "fp32_attention_gain"))


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "minilm", "--kernels"]], ids=" ".join)
def test_one_thing_is_inspected(words: list[str]) -> None:
    result = CliRunner().invoke(commands, words)
    assert result.exit_code == 2
    assert "--kernels" in result.output
