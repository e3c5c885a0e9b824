"""The kinds of update besides LoRA and DoRA: a frozen A, VeRA's vectors, AdaLoRA's budget, parts of a fused projection."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.lora import LoraConfig, RankBudget, adapter_parameters, add_adapter, count_parameters, hosts, save_adapter
from lorakit.lora.layers import Layer
from lorakit.training.checkpoint import optimizer_tensors, restore_optimizer
from tests.lora.oracle import CLOSE, assert_same_tensors, fill, peft_load
from tests.tiny import BERT_SIZES, logits, randomized, tiny_batch, tiny_bert, tiny_gpt2

UPDATES = ("lora", "dora", "lora_fa", "vera", "adalora")
WIDTH, R = BERT_SIZES["hidden_size"], 4
LAYERS = 2 * BERT_SIZES["num_hidden_layers"]  # query and value of each block
update = pytest.mark.parametrize("update", UPDATES)


def config_of(update: str, **kw: Any) -> LoraConfig:
    return LoraConfig(r=R, lora_alpha=8, target_modules=("query", "value"), update=update, **kw)


def layer_of(model: nn.Module) -> Layer:
    layer = hosts(model)[0][1]
    assert isinstance(layer, Layer)
    return layer


@update
def test_starts_as_the_base_and_trains_all_it_has(update: str) -> None:
    model = tiny_bert()
    batch = tiny_batch(model)
    before = logits(model, batch)
    add_adapter(model, config_of(update, modules_to_save=("classifier",)))
    assert torch.equal(logits(model, batch), before)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2, weight_decay=0)
    start = {key: parameter.clone() for key, parameter in adapter_parameters(model).items()}
    for _ in range(3):  # the second step moves what the first left without a gradient
        model(**batch).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [key for key, parameter in adapter_parameters(model).items() if torch.equal(parameter, start[key])] == []
    assert_same_tensors({key: p for key, p in model.named_parameters() if not p.requires_grad}, frozen)


@pytest.mark.parametrize(
    ("update", "expected"),
    [("lora", 2 * WIDTH * R), ("lora_fa", WIDTH * R), ("vera", WIDTH + R), ("adalora", 2 * WIDTH * R + R)],
)
def test_parameter_counts(update: str, expected: int) -> None:
    model = tiny_bert()
    add_adapter(model, config_of(update))
    assert count_parameters(model).lora == LAYERS * expected


def test_vera_shares_its_factors_among_layers() -> None:
    model = tiny_bert()
    add_adapter(model, config_of("vera"))
    places = {host.lora("default").lora_A.data_ptr() for _, host in hosts(model) if isinstance(host, Layer)}
    assert len(places) == 1
    start = {
        float(v)
        for key, p in adapter_parameters(model).items()
        if key.endswith("lambda_d")
        for v in p.detach().flatten()
    }
    assert list(start) == [pytest.approx(VeraConfig.d_initial)]


class Fused(nn.Module):
    """q, k and v in one layer, as in GPT-2 and ModernBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.Wqkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(3 * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.Wqkv(x))


@pytest.mark.parametrize(("update", "init"), [("lora", "kaiming"), ("dora", "pissa"), ("lora_fa", "kaiming")])
def test_parts_of_a_fused_projection(update: str, init: str, tmp_path: Path) -> None:
    model = randomized(Fused())
    base = copy.deepcopy(model)
    config = LoraConfig(r=R, target_modules=("Wqkv:qv",), update=update, init_lora_weights=init)
    add_adapter(model, config)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model(x), base(x))
    assert layer_of(model).lora("default").lora_B.shape == (2 * WIDTH, R)
    fill(model)
    rows = model.Wqkv(x) - base.Wqkv(x)
    q, k, v = rows.split(WIDTH, dim=-1)
    if update != "dora":  # whose lengths belong to every row
        assert not k.any()
    assert q.any() and v.any()
    save_adapter(model, tmp_path, config)
    torch.testing.assert_close(peft_load(base, tmp_path)(x), model(x), **CLOSE)


def test_gpt2_adapts_q_and_v_inside_of_c_attn() -> None:
    model = tiny_gpt2()
    add_adapter(model, LoraConfig(r=R, target_modules=("c_attn:qv",)))
    assert count_parameters(model).lora == 2 * (WIDTH * R + 2 * WIDTH * R)


MISTAKES = {
    "letters": ("Wqkv:qx", "after the colon write some of the letters q, k and v"),
    "none": ("Wqkv:", "after the colon write some"),
    "twice": ("Wqkv:qq", "after the colon write some"),
    "no thirds": ("out:q", r"out \(2 x 96\) is not q, k and v stacked"),
    "interleaved": ("query_key_value:qv", "is not q, k and v stacked"),
}


@pytest.mark.parametrize(("entry", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistaken_parts(entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapter(Fused(), LoraConfig(r=2, target_modules=(entry,)))


def test_vera_takes_whole_layers() -> None:
    with pytest.raises(ConfigError, match="'Wqkv:q': update = 'vera' takes whole layers only"):
        LoraConfig(target_modules=("Wqkv:q",), update="vera")


STEPS, TARGET = 40, 2


def budgeted(start: dict[str, Tensor] | None = None) -> tuple[nn.Module, torch.optim.Optimizer, RankBudget]:
    model = tiny_bert()
    add_adapter(model, config_of("adalora"))
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW([{"params": list(parameters.values()), "names": list(parameters)}], lr=1e-2)
    if start:
        restore_optimizer(optimizer, start)
    budget = RankBudget(model, TARGET, STEPS)
    budget.attach(optimizer)
    return model, optimizer, budget


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[int]:
    """Train, and give the number of singular values that are left after each step."""
    batch = tiny_batch(model)
    left = []
    for _ in range(steps):
        (model(**batch).logits - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        left.append(sum(int(p.ne(0).sum()) for key, p in adapter_parameters(model).items() if key.endswith("lora_E")))
    return left


def test_budget_falls_to_its_target_and_stays(tmp_path: Path) -> None:
    model, optimizer, budget = budgeted()
    assert float(budget.regulariser().detach()) < 1e-10
    assert [budget.size(step) for step in (0, STEPS // 10)] == [LAYERS * R] * 2
    left = train(model, optimizer, STEPS)
    assert left == sorted(left, reverse=True)
    assert left[0] == LAYERS * R and left[STEPS - STEPS // 4 :] == [LAYERS * TARGET] * (STEPS // 4)
    assert float(budget.regulariser().detach()) < 1  # held near orthogonal while it trained
    assert len(set(kept_ranks(model))) > 1  # half of the layers get no gradient to speak of: their ranks go first
    config = config_of("adalora")
    save_adapter(model, tmp_path, config)
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].values()
    assert sum(ranks) == LAYERS * TARGET + sum(r == 1 for r in ranks) - sum(r == 1 for r in kept_ranks(model))
    base, batch = tiny_bert(), tiny_batch(model)
    torch.testing.assert_close(logits(peft_load(base, tmp_path), batch), logits(model, batch), **CLOSE)


def kept_ranks(model: nn.Module) -> list[int]:
    return [int(p.ne(0).sum()) for key, p in adapter_parameters(model).items() if key.endswith("lora_E")]


def test_resumed_budget_is_the_one_that_never_stopped() -> None:
    model, optimizer, _ = budgeted()
    train(model, optimizer, STEPS // 5)  # within the fall
    stopped = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer).items()}
    train(model, optimizer, STEPS // 5)
    again, other, _ = budgeted(stopped)
    train(again, other, STEPS // 5)
    want, have = adapter_parameters(model), adapter_parameters(again)
    assert [key for key in want if not torch.equal(want[key], have[key])] == []


@pytest.mark.parametrize("target_r", [0, R + 1])
def test_target_out_of_range(target_r: int) -> None:
    model = tiny_bert()
    add_adapter(model, config_of("adalora"))
    with pytest.raises(ConfigError, match=f"target_r = {target_r}: must be from 1 to the rank at the start"):
        RankBudget(model, target_r, STEPS)


def test_budget_needs_adalora() -> None:
    model = tiny_bert()
    add_adapter(model, config_of("lora"))
    with pytest.raises(ConfigError, match="has no AdaLoRA update"):
        RankBudget(model, 2, STEPS)
