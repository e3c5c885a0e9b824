"""Facts of the machine: which dtype is taken, what is cast, what evaluation leaves behind."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import ConfigError
from lorakit.runtime import device

MEASURED = device.bf16_gain  # before conftest's auto_dtype stands in for it
CPU = torch.device("cpu")


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


class Module:
    """Stands for torch.cuda, torch.mps or torch.xpu: has what it is given, and one generator a device."""

    def __init__(self, **members: Any) -> None:
        self.state: dict[Any, torch.Tensor] = {}
        vars(self).update(members)

    def get_rng_state(self, device: torch.device | None = None) -> torch.Tensor:
        return self.state.get(device, torch.zeros(1))

    def set_rng_state(self, state: torch.Tensor, device: torch.device | None = None) -> None:
        self.state[device] = state


def be(patch: pytest.MonkeyPatch, kind: str | None, count: int = 1, **members: Any) -> Module:
    """Let torch find accelerators of this kind, or none."""
    module = Module(**members)
    found = None if kind is None else torch.device(kind)
    patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    patch.setattr(torch.accelerator, "device_count", lambda: count if kind else 0)
    patch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    patch.setattr(torch, "get_device_module", lambda device: module)
    return module


BF16 = {"is_bf16_supported": lambda including_emulation=True: True}
EMULATED = {"is_bf16_supported": lambda including_emulation=True: including_emulation}


@pytest.mark.parametrize(
    ("kind", "members", "dtype"),
    [
        ("cuda", BF16, torch.bfloat16),
        ("cuda", EMULATED, torch.float16),
        ("xpu", BF16, torch.bfloat16),
        ("mps", {}, torch.float32),
    ],
)
def test_pick_dtype_takes_what_a_gpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, kind: str, members: dict[str, Any], dtype: torch.dtype
) -> None:
    be(monkeypatch, kind, **members)
    assert device.pick_dtype("auto", "lora", torch.device(kind)) == dtype


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


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
@pytest.mark.parametrize("index", [0, 3])
def test_pick_device_takes_the_gpu_of_this_process(monkeypatch: pytest.MonkeyPatch, index: int, kind: str) -> None:
    be(monkeypatch, kind, 2)
    monkeypatch.setenv("LOCAL_RANK", str(index))
    assert device.pick_device("cpu") == CPU
    if index < 2:
        assert device.pick_device() == device.pick_device(kind) == torch.device(kind, index)
        return
    with pytest.raises(ConfigError, match="process 4 of this machine has no GPU; there are 2"):
        device.pick_device()


@pytest.mark.parametrize(("kind", "has"), [(None, "only the CPU"), ("cuda", "cuda and the CPU")])
def test_pick_device_refuses_what_the_machine_has_not(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, has: str
) -> None:
    be(monkeypatch, kind)
    with pytest.raises(ConfigError, match=rf"train\.device = 'mps': torch .* finds {has} on this machine"):
        device.pick_device("mps", "train.device")


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_random_state_of_an_accelerator_is_kept_beside_the_cpus(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    module, own = be(monkeypatch, kind), torch.device(kind, 0)
    device.set_random_state({"cpu": torch.get_rng_state(), kind: torch.ones(1)}, own)
    assert module.state == {None if kind == "mps" else own: torch.ones(1)}
    assert device.random_state(own)[kind] == torch.ones(1)


@pytest.mark.parametrize(
    ("kind", "members", "name"),
    [("cuda", {"get_device_name": lambda device: "Tesla T4"}, "Tesla T4, "), ("mps", {}, "MPS, "), ("cpu", {}, "")],
)
def test_machine_name_begins_with_the_gpu(
    monkeypatch: pytest.MonkeyPatch, kind: str, members: dict[str, Any], name: str
) -> None:
    be(monkeypatch, kind, **members)
    assert device.gpu_name(torch.device(kind)) == name
    assert device.machine_name(torch.device(kind)).startswith(name + device.cpu_name())


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_peak_memory_is_the_accelerators(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 7)
    assert device.peak_memory(torch.device(kind)) == 7
    assert device.peak_memory(torch.device("mps")) > 7


def test_seed_rank_is_a_plain_seed_on_the_first_rank_alone() -> None:
    drawn = []
    for rank in (0, 1, 2):
        device.seed_rank(7, rank)
        drawn.append(torch.rand(1).item())
    torch.manual_seed(7)
    assert torch.rand(1).item() == drawn[0]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("own", [None, "7"])
def test_the_memory_of_products_is_bounded_unless_the_user_says_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, value = device.PRODUCTS_KEPT
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    device.pick_device("cpu")
    assert os.environ[name] == (own or value)
