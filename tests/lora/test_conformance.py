"""What every variant must hold, over the dicts themselves: a new line in one of them is tested without a line here."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.lora import (
    Data,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merge,
    save_adapter,
    start_from_data,
    unmerge,
)
from lorakit.lora.config import SCALINGS
from lorakit.lora.inits import INITS
from lorakit.lora.inits_from_data import DATA_INITS
from lorakit.lora.updates import UPDATES
from tests.lora.oracle import assert_same_tensors, fill, peft_load
from tests.tiny import logits, tiny_batch, tiny_bert

NEAR = {"rtol": 0.0, "atol": 1e-5}
STARTS = (*INITS, *DATA_INITS)
# Every start and every update with each scaling in turn; each start with each update is for `make faults`.
every = pytest.mark.parametrize(
    ("init", "update", "scaling"),
    [
        pytest.param(
            init,
            update,
            [*SCALINGS][(i + j) % len(SCALINGS)],
            marks=() if (i - j) % len(UPDATES) == 0 or init == "kaiming" else pytest.mark.slow,
        )
        for i, init in enumerate(STARTS)
        for j, update in enumerate(UPDATES)
    ],
)


def adapted(
    init: str, update: str, scaling: str, *, target_modules: tuple[str, ...] = ("query", "dense"), seed: int = 3
) -> tuple[PreTrainedModel, LoraConfig]:
    """A tiny BERT with the variant in it, and the settings to save it with."""
    model = tiny_bert()
    config = LoraConfig(
        r=4, target_modules=target_modules, init_lora_weights=init, update=update, use_rslora=scaling == "rslora"
    )
    factors = {}
    if init in DATA_INITS:
        data = Data([tiny_batch(model)], lambda batch: model(**batch).logits.square().sum())
        config, factors = start_from_data(model, config, data, seed)
    add_adapter(model, config, seed=seed, factors=factors)
    return model, config


def answer(model: PreTrainedModel) -> Tensor:
    return logits(model, tiny_batch(model))


@every
def test_variant_conforms(init: str, update: str, scaling: str, tmp_path: Path) -> None:
    """One adapter through its life: start, the same at a second call, gradients, merge and back, disk, peft."""
    model, config = adapted(init, update, scaling)
    assert_same_tensors(*(adapter_parameters(each) for each in (model, adapted(init, update, scaling)[0])))
    assert torch.equal(answer(model), answer(tiny_bert())), "the first step is the base's, bit for bit"
    model(**tiny_batch(model)).logits.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert [name for name in trained if ".adapters.default." not in name] == []
    fill(model)
    before, weights = answer(model), copy.deepcopy(model.state_dict())
    assert not torch.equal(before, answer(tiny_bert()))
    merge(model)
    torch.testing.assert_close(answer(model), before, **NEAR)
    unmerge(model)
    assert_same_tensors(model.state_dict(), weights)
    save_adapter(model, str(tmp_path), config)
    again = tiny_bert()
    load_adapter(again, str(tmp_path))
    torch.testing.assert_close(answer(again), before, **NEAR)
    torch.testing.assert_close(answer(peft_load(tiny_bert(), tmp_path)), before, **NEAR)


@pytest.mark.parametrize(
    ("init", "update"), [*((init, "lora") for init in INITS), *(("kaiming", update) for update in UPDATES)]
)
def test_factors_do_not_depend_on_what_else_is_injected(init: str, update: str) -> None:
    alone = adapter_parameters(adapted(init, update, "standard", target_modules=("query",))[0])
    among = adapter_parameters(adapted(init, update, "standard")[0])
    assert_same_tensors(alone, {key: among[key] for key in alone})
