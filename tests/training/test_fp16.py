"""An fp16 base, as GPUs without bf16 have it: loss and gradients of fp32, a loss scale that finds its size, T5 kept out of it.

On a CPU torch computes in fp16 too, so that nothing here stands in for a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.inference.predictor import load
from lorakit.runtime import device
from lorakit.training import loop
from lorakit.training.loop import LOSS_SCALE, train
from lorakit.training.prepare import prepare
from lorakit.training.run import member_of
from lorakit.training.run_files import read_run
from tests.runs import Sections, Stopped, changed, fit, resumed, sections, start, stop_after, weights

FP16 = ("model.dtype=fp16", "model.dropout=0", "lora.dropout=0")


def gradients(raw: Sections, scale: float, *words: str) -> tuple[dict[str, torch.Tensor], float, int]:
    """Each parameter's gradient in the first step, the loss scale after it, and how often the step was computed."""
    member = member_of(prepared := prepare(changed(raw, *words)))
    member.loss_scale = scale
    found: dict[str, torch.Tensor] = {}
    member.optimizer.register_step_pre_hook(
        lambda *_: found.update(
            {name: p.grad.clone() for name, p in member.named_parameters.items() if p.grad is not None}
        )
    )
    n = 0

    def count(*_: object) -> None:
        nonlocal n
        n += 1

    handle = prepared.model.register_forward_pre_hook(count)
    next(train(prepared.model, [member]))
    handle.remove()
    return found, member.loss_scale, n


def test_gradients_of_an_fp16_base_are_those_of_fp32(bert: Path, files: Path) -> None:
    raw = sections(bert, files)
    ours, scale, _ = gradients(raw, LOSS_SCALE, *FP16)
    theirs, _, _ = gradients(raw, 1.0, *FP16, "model.dtype=fp32")
    assert scale <= LOSS_SCALE
    flat = [torch.cat([found[name].flatten() for name in sorted(found)]) for found in (ours, theirs)]
    assert ours.keys() == theirs.keys()
    assert torch.cosine_similarity(*flat, dim=0) > 0.999
    torch.testing.assert_close(flat[0].norm(), flat[1].norm(), rtol=0.02, atol=0)


def test_scale_is_halved_until_nothing_overflows_and_no_step_is_lost(bert: Path, files: Path) -> None:
    raw = sections(bert, files)
    expected, start, once = gradients(raw, 1024.0, *FP16)
    found, scale, n = gradients(raw, 2.0**30, *FP16)
    assert (start, once) == (1024.0, 1)
    assert n > 3
    assert scale == 2.0 ** (30 - (n - 1))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)


def test_scale_is_doubled_after_some_steps(bert: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS_TO_DOUBLE", 4)
    member = member_of(prepared := prepare(changed(sections(bert, files), *FP16)))
    member.loss_scale = 8.0
    scales = [member.loss_scale for _ in train(prepared.model, [member])]
    assert scales == [8, 8, 8, 16, 16, 16, 16, 32, 32, 32]


def test_run_over_an_fp16_base_is_recorded_resumed_and_answers(five_steps: Sections, tmp_path: Path) -> None:
    recipe = changed(five_steps, "model.dtype=fp16")
    fit(recipe, tmp_path / "whole")
    assert read_run(tmp_path / "whole").scores.dtype == "float16"
    with pytest.raises(Stopped):
        start(recipe, tmp_path / "stopped", stop_after(4)).fit()
    run = resumed(recipe, tmp_path / "stopped")
    assert run.member.loss_scale == LOSS_SCALE
    run.fit()
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    predictor = load(tmp_path / "whole")
    assert next(predictor.model.parameters()).dtype == torch.float16


def test_t5_stays_in_fp32_where_auto_would_be_fp16(t5: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.training.prepare.pick_dtype", lambda *_: torch.float16)
    raw = sections(t5, files, "text2text_ner")
    raw["model"]["dtype"] = "auto"
    prepared = prepare(changed(raw))
    assert (prepared.dtype, prepared.recipe.model.dtype) == (torch.float32, "fp32")
    with pytest.raises(ConfigError, match=r"model\.dtype = 'fp16': .* \(t5\) computes numbers beyond fp16"):
        prepare(changed(raw, "model.dtype=fp16"))


def test_device_is_the_recipes(bert: Path, files: Path) -> None:
    assert prepare(changed(sections(bert, files), "train.device=cpu")).device == torch.device("cpu")
    if not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match=r"train.device = 'xpu': torch .* finds the CPU alone on this machine"):
            prepare(changed(sections(bert, files), "train.device=xpu"))
    assert set(device.DTYPE_NAMES.values()) == set(device.DTYPES)
