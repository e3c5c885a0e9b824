"""What the tests of lorakit.lora compare with: peft, and copies of state taken before."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lorakit.lora import LoraConfig, adapter_parameters, add_adapter, hosts, save_adapter
from tests.tiny import copier

CLOSE = {"rtol": 0.0, "atol": 2e-6}  # the contract for two fp32 computations of the same thing


@torch.no_grad()
def fill(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    """The model with its adapter moved off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        parameter.add_(0.1 * torch.empty_like(parameter).normal_(generator=generator))
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused call must leave alone: structure, values, what is trainable."""
    return {
        "modules": [(path, type(module), module.training) for path, module in model.named_modules()],
        "trainable": [(path, parameter.requires_grad) for path, parameter in model.named_parameters()],
        "tensors": {path: tensor.clone() for path, tensor in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: Mapping[str, Any]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["trainable"] == before["trainable"]
    assert_same_tensors(after["tensors"], before["tensors"])


def assert_same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """The same keys, and every value equal bit for bit."""
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def peft_config(config: LoraConfig, task_type: str | None = None, **kw: Any) -> peft.LoraConfig:
    """The same settings for peft."""
    targets, excluded = config.target_modules, config.exclude_modules
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=(excluded if isinstance(excluded, str) else list(excluded)) or None,
        layers_to_transform=config.layers_to_transform and list(config.layers_to_transform),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=list(config.modules_to_save) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type=task_type,
        **kw,
    )


def peft_model(model: nn.Module, config: LoraConfig, task_type: str | None = None, **kw: Any) -> peft.PeftModel:
    """A copy of the plain model with peft's adapter in it."""
    return peft.get_peft_model(copier(model)(), peft_config(config, task_type, **kw)).eval()


def peft_load(model: nn.Module, folder: Path) -> peft.PeftModel:
    """A copy of the plain model with the adapter in `folder`, as peft reads it."""
    return peft.PeftModel.from_pretrained(copier(model)(), folder).eval()


def filled_and_saved(model: nn.Module, config: LoraConfig, folder: Path) -> nn.Module:
    """Give the model an adapter off its start and write it to the folder; the plain model as it was is given back."""
    base = copier(model)()
    add_adapter(model, config)
    fill(model)
    save_adapter(model, folder, config)
    return base


def peft_save(model: peft.PeftModel, folder: Path) -> Path:
    """Write peft's adapter, without a look at the hub."""
    with warnings.catch_warnings():  # peft takes any lora_bias for a shard that was not gathered
        warnings.filterwarnings("ignore", ".*have invalid shape.*")
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_parameters(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    """peft's trainable tensors under the names that lorakit gives them in memory."""
    return {_our_name(path): p for path, p in model.named_parameters() if p.requires_grad}


def _our_name(path: str) -> str:
    path = path.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    path = re.sub(r"\.(lora_A|lora_B|lora_magnitude_vector)\.default\.weight$", r".\1", path)
    return path.replace("lora_magnitude_vector", "magnitude")


def lora_paths(model: nn.Module) -> set[str]:
    """The paths of peft's adapted layers, or of ours, in the names of the plain model."""
    if isinstance(model, peft.PeftModel):
        return set(model.base_model.targeted_module_names)
    return {path for path, host in hosts(model) if hasattr(host, "lora")}
