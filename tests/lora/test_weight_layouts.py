"""Layers other than nn.Linear: embeddings, convolutions, GPT-2's Conv1D, and one module under several names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.lora import (
    LoraConfig,
    add_adapter,
    delete_adapter,
    load_adapter,
    merge,
    save_adapter,
    select_targets,
    unmerge,
)
from tests.lora.oracle import CLOSE, fill, peft_load
from tests.tiny import tiny_t5

KINDS = ["emb", "padded", "conv", "reflected", "conv2", "fc"]
# peft's convolutions forget the base's dilation and padding mode, so that its own merge differs from its forward.
LIKE_PEFT = ["emb", "padded", "conv", "fc"]


class Mixed(nn.Module):
    """One layer of every kind that can be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "mixed"}
        self.emb = nn.Embedding(50, 16)
        self.padded = nn.Embedding(50, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 24, 3, padding=1, stride=2)
        self.reflected = nn.Conv1d(24, 12, 3, padding=1, padding_mode="reflect", bias=False)
        self.conv2 = nn.Conv2d(1, 8, (3, 2), dilation=(1, 2))
        self.grouped = nn.Conv1d(12, 12, 1, groups=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.emb(ids) + self.padded(ids)).transpose(1, 2)
        x = self.grouped(self.reflected(self.conv(x)))
        return self.fc(x.mean(-1)) + self.conv2(x[:, None]).mean((1, 2, 3))[:, None]


IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    """The model with an adapter whose tensors are all away from their start."""
    add_adapter(model, config)
    return fill(model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LIKE_PEFT)
def test_peft_loads_our_folder_and_we_the_one_it_writes(kind: str, dora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=(kind,), use_dora=dora)
    model, again = adapted(mixed(), config), mixed()
    save_adapter(model, tmp_path / "ours", config)
    theirs = peft_load(mixed(), tmp_path / "ours")
    torch.testing.assert_close(theirs(IDS), model(IDS), **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(IDS), model(IDS), **CLOSE)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_and_is_merged_and_unmerged(kind: str, settings: dict[str, Any]) -> None:
    model, config = mixed(), LoraConfig(r=4, target_modules=(kind,), **settings)
    base, plain = model(IDS), mixed().state_dict()
    add_adapter(model, config)
    assert torch.equal(model(IDS), base)
    fill(model)
    before = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(IDS), before)
    delete_adapter(model, "default")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.items())


def test_grouped_convolution_is_no_target() -> None:
    with pytest.raises(ConfigError, match="nothing matches 'grouped'"):
        select_targets(mixed(), LoraConfig(target_modules=("grouped",)))


def test_all_linear_leaves_embeddings_and_convolutions_alone() -> None:
    assert [target.path for target in select_targets(mixed(), LoraConfig())] == ["fc"]


def test_lora_on_a_tied_embedding_leaves_the_output_layer_alone() -> None:
    model = tiny_t5().eval()
    head = model.lm_head.weight.detach().clone()
    adapted(model, LoraConfig(r=4, target_modules=("shared",)))
    merge(model)
    assert torch.equal(model.lm_head.weight, head)
    unmerge(model)
    assert model.lm_head.weight is model.encoder.embed_tokens.base.weight
