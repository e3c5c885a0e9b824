"""Cells of the matrix of interchange with peft: every architecture and every variant once, all with LORAKIT_INTEROP=all."""

from __future__ import annotations

import os
from itertools import cycle, islice
from pathlib import Path

import pytest

from tests.interop.architectures import ARCHITECTURES
from tests.interop.matrix import CHECKS, VARIANTS, Case, run_cell, run_check

WHOLE = [(architecture, variant) for architecture in ARCHITECTURES for variant in VARIANTS]
LONGEST = max(len(ARCHITECTURES), len(VARIANTS))
DIAGONAL = list(zip(*(islice(cycle(names), LONGEST) for names in (ARCHITECTURES, VARIANTS)), strict=True))
# the model that has every kind of layer
DIAGONAL += [("plain torch", name) for name, variant in VARIANTS.items() if variant.needs]
DIAGONAL += [("DeBERTa-v2 SEQ_CLS", "bias all")]  # a convolution's bias

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers about layers that the adapter then fills


@pytest.mark.parametrize(
    ("architecture", "variant"), WHOLE if os.environ.get("LORAKIT_INTEROP") == "all" else dict.fromkeys(DIAGONAL)
)
def test_cell_is_explained(architecture: str, variant: str, tmp_path: Path) -> None:
    outcomes = run_cell(architecture, variant, tmp_path)
    assert {check: outcome for check, outcome in outcomes.items() if outcome.status == "FAIL"} == {}


@pytest.mark.parametrize("check", CHECKS)
def test_check_fails_when_our_answers_are_off(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaling that is 1 % too large is in no file and in every answer."""
    from lorakit.lora import config

    monkeypatch.setitem(config.SCALINGS, "standard", lambda alpha, r: 1.01 * alpha / r)  # type: ignore[arg-type]
    outcome = run_check(check, Case(ARCHITECTURES["BERT SEQ_CLS"], VARIANTS["plain"], tmp_path))
    # saving and loading use the wrong scaling alike
    assert outcome.status == ("pass" if check == "save-load-save" else "FAIL")
