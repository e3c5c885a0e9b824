"""Facts of the machine: which dtype is taken, what is cast, what evaluation leaves behind."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from lorakit.errors import ConfigError
from lorakit.runtime import device

MEASURED = device.bf16_gain  # before conftest's auto_dtype stands in for it
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("method", ["lora", "head"])
@pytest.mark.parametrize(("asked", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_pick_dtype_gives_what_is_asked_for(method: str, asked: str, dtype: torch.dtype) -> None:
    assert device.pick_dtype(asked, method, CPU) == dtype


@pytest.mark.parametrize(("gain", "dtype"), [(0.3, torch.float32), (5.0, torch.bfloat16)])
def test_pick_dtype_takes_the_faster_one_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, gain: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(device, "bf16_gain", lambda: gain)
    assert device.pick_dtype("auto", "lora", CPU) == dtype


@pytest.mark.parametrize(("supported", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_pick_dtype_takes_bf16_on_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert device.pick_dtype("auto", "lora", CUDA) == dtype


@pytest.mark.parametrize("asked", ["auto", "fp32"])
def test_pick_dtype_keeps_full_fine_tuning_in_fp32(asked: str) -> None:
    assert device.pick_dtype(asked, "full", CPU) == torch.float32


def test_bf16_gain_is_a_ratio() -> None:
    assert 0 < MEASURED() < float("inf")


def test_cast_frozen_leaves_what_is_trained_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    device.cast_frozen_(model, torch.bfloat16)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_restores_the_mode_also_after_an_error(training: bool) -> None:
    model = nn.Dropout().train(training)
    with pytest.raises(ZeroDivisionError), device.evaluating(model):
        assert not model.training
        assert torch.is_inference_mode_enabled()
        _ = 1 / 0
    assert model.training is training


@pytest.mark.parametrize("asked", [True, False])
def test_deterministic_restores_what_was_set_before(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with device.deterministic(asked):
        assert torch.are_deterministic_algorithms_enabled() is asked
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is asked
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("index", [0, 3])
def test_pick_device_takes_the_gpu_of_this_process(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setenv("LOCAL_RANK", str(index))
    if index < 2:
        assert device.pick_device() == torch.device("cuda", index)
        return
    with pytest.raises(ConfigError, match="process 4 of this machine has no GPU: there are 2"):
        device.pick_device()


def test_seed_rank_is_a_plain_seed_on_the_first_rank_alone() -> None:
    drawn = []
    for rank in (0, 1, 2):
        device.seed_rank(7, rank)
        drawn.append(torch.rand(1).item())
    torch.manual_seed(7)
    assert torch.rand(1).item() == drawn[0]
    assert len(set(drawn)) == 3
