"""peft as the oracle: the same answers and gradients, the same layers, the same merge, the same files both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lorakit.lora import (
    BaseInfo,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from tests.lora.oracle import CLOSE, fill, lora_paths, peft_load, peft_model, peft_parameters, peft_save
from tests.tiny import logits, tiny_batch, tiny_bert, tiny_distilbert, tiny_roberta, tiny_t5, tiny_token_bert

Build = Callable[[], PreTrainedModel]

BERT = {
    "plain": LoraConfig(r=4, target_modules=("query", "value")),
    "rslora": LoraConfig(r=4, target_modules=("query", "value"), use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=("query", "dense"), use_dora=True),
    "patterns": LoraConfig(
        r=4,
        target_modules=("query", "value", "output.dense"),
        rank_pattern={r"layer\.0\.attention\.self\.query": 2, "query": 6, "output.dense": 3},
        alpha_pattern={r".*\.2\..*value": 3.0, "value": 5.0},
    ),
    "layers": LoraConfig(r=4, target_modules=("key", "dense"), layers_to_transform=(0, 2)),
    "regex": LoraConfig(r=4, target_modules=r".*layer\.[12]\..*\.(query|key)"),
    "all-linear": LoraConfig(r=4),
    "exclude": LoraConfig(r=4, target_modules=("query", "dense"), exclude_modules=("pooler.dense",)),
    "dora-rslora": LoraConfig(r=4, target_modules=("value",), use_dora=True, use_rslora=True),
}
T5 = {
    "plain": LoraConfig(r=4, target_modules=("q", "v")),
    "rslora": LoraConfig(r=4, target_modules=("q", "wi"), use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=("q", "wo"), use_dora=True),
    "patterns": LoraConfig(
        r=4, target_modules=("q", "v"), rank_pattern={"EncDecAttention.q": 2}, alpha_pattern={"v": 5}
    ),
    "layers": LoraConfig(r=4, target_modules=("q", "v"), layers_to_transform=(1,)),
    "regex": LoraConfig(r=4, target_modules=r"encoder\.block\.[12]\.layer\.0\.SelfAttention\.(q|v)"),
    "all-linear": LoraConfig(r=4),
    "saved": LoraConfig(r=4, target_modules=("q",), modules_to_save=("final_layer_norm",)),
}


def with_head(config: LoraConfig) -> LoraConfig:
    return LoraConfig(**{**vars(config), "modules_to_save": ("classifier",)})


CASES = [
    *(pytest.param(tiny_bert, with_head(config), "SEQ_CLS", id=f"bert-{name}") for name, config in BERT.items()),
    *(pytest.param(tiny_t5, config, "SEQ_2_SEQ_LM", id=f"t5-{name}") for name, config in T5.items()),
    pytest.param(tiny_token_bert, with_head(BERT["plain"]), "TOKEN_CLS", id="token-plain"),
    pytest.param(tiny_token_bert, with_head(BERT["dora"]), "TOKEN_CLS", id="token-dora"),
    pytest.param(tiny_roberta, with_head(BERT["all-linear"]), "SEQ_CLS", id="roberta-all-linear"),
    pytest.param(
        tiny_distilbert,
        LoraConfig(r=4, target_modules=("q_lin", "v_lin"), modules_to_save=("classifier", "pre_classifier")),
        "SEQ_CLS",
        id="distilbert-plain",
    ),
    pytest.param(tiny_bert, with_head(BERT["plain"]), None, id="bert-without-a-task-type"),
]
cases = pytest.mark.parametrize(("build", "config", "task_type"), CASES)


def ours(build: Build, config: LoraConfig) -> PreTrainedModel:
    model = build()
    add_adapter(model, config)
    return fill(model)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The T5 loss, or the cross entropy of arbitrary labels."""
    output = model(**batch)
    if "labels" in batch:
        return output.loss
    flat = output.logits.flatten(0, -2)
    return F.cross_entropy(flat, torch.arange(len(flat)) % flat.shape[1])


@torch.no_grad()
def copied_to_peft(model: PreTrainedModel, build: Build, config: LoraConfig, task_type: str | None) -> nn.Module:
    """peft's own injection into a fresh base, with our tensors written over its own, key by key."""
    theirs = peft_model(build(), config, task_type)
    parameters, wanted = peft_parameters(theirs), adapter_parameters(model)
    assert parameters.keys() == wanted.keys()
    for key, parameter in parameters.items():
        parameter.copy_(wanted[key])
    return theirs


def atol(config: LoraConfig) -> float:
    """Plain LoRA is the same sequence of operations as peft's; DoRA's row norms are computed another way."""
    return 2e-6 if config.use_dora else 1e-6


@cases
def test_layers_outputs_gradients_and_merged_weights_equal_peft(
    build: Build, config: LoraConfig, task_type: str | None
) -> None:
    model = ours(build, config)
    theirs = copied_to_peft(model, build, config, task_type)
    assert lora_paths(model) == lora_paths(theirs)
    batch = tiny_batch(model)
    torch.testing.assert_close(logits(model, batch), logits(theirs, batch), rtol=0, atol=atol(config))
    loss(model, batch).backward()
    loss(theirs, batch).backward()
    have = {key: parameter.grad for key, parameter in adapter_parameters(model).items()}
    want = {key: parameter.grad for key, parameter in peft_parameters(theirs).items()}
    torch.testing.assert_close(have, want, rtol=0, atol=atol(config))
    have, want = merge_and_unload(model).state_dict(), theirs.merge_and_unload().state_dict()
    torch.testing.assert_close(have, want, rtol=0, atol=atol(config))


@cases
def test_our_folder_loads_in_peft(build: Build, config: LoraConfig, task_type: str | None, tmp_path: Path) -> None:
    model = ours(build, config)
    save_adapter(model, tmp_path, config, BaseInfo(task_type=task_type))
    difference = (
        (logits(model, tiny_batch(model)) - logits(peft_load(build(), tmp_path), tiny_batch(model))).abs().max()
    )
    assert difference <= (atol(config) if config.use_dora else 0)


@cases
def test_peft_s_folder_loads_in_ours(build: Build, config: LoraConfig, task_type: str | None, tmp_path: Path) -> None:
    theirs = copied_to_peft(ours(build, config), build, config, task_type)
    peft_save(theirs, tmp_path)
    model = build()
    read = load_adapter(model, tmp_path)
    difference = (logits(model, tiny_batch(model)) - logits(theirs, tiny_batch(model))).abs().max()
    assert difference <= (atol(config) if config.use_dora else 0)
    assert (read.r, read.lora_alpha, read.use_dora) == (config.r, config.lora_alpha, config.use_dora)


@pytest.mark.parametrize("kw", [{}, {"init_lora_weights": "gaussian"}, {"bias": "none"}, {"revision": "main"}], ids=str)
def test_peft_s_folder_with_the_head_it_lists_itself_loads_in_ours(kw: dict[str, Any], tmp_path: Path) -> None:
    """peft adds classifier and score to modules_to_save of its own accord; BERT has no score."""
    theirs = peft_model(tiny_bert(), BERT["plain"], "SEQ_CLS", **kw)
    peft_save(theirs, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    model = tiny_bert(seed=0)
    assert load_adapter(model, tmp_path).modules_to_save == ("classifier",)
    assert torch.equal(logits(model, tiny_batch(model)), logits(theirs, tiny_batch(model)))


def test_peft_s_distilbert_folder_with_pre_classifier_loads_in_ours(tmp_path: Path) -> None:
    """peft's `classifier` takes `pre_classifier` along, without listing it."""
    theirs = peft_model(tiny_distilbert(), LoraConfig(r=4, target_modules=("q_lin",)), "SEQ_CLS")
    theirs.base_model.model.pre_classifier.modules_to_save.default.weight.data.add_(1.0)
    peft_save(theirs, tmp_path)
    model = tiny_distilbert()
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model, tiny_batch(model)), logits(theirs, tiny_batch(model)))


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"query": 3}}], ids=str
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_nonzero_start_loads_in_peft_on_the_unchanged_base(init: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, target_modules=("query", "dense"), init_lora_weights=init, modules_to_save=("classifier",), **settings
    )
    model = ours(tiny_bert, config)
    save_adapter(model, tmp_path, config, BaseInfo(task_type="SEQ_CLS"))
    want = logits(model, tiny_batch(model))
    torch.testing.assert_close(logits(peft_load(tiny_bert(), tmp_path), tiny_batch(model)), want, rtol=0, atol=2e-6)


def test_pattern_with_layers_loads_in_peft(tmp_path: Path) -> None:
    """peft refuses layers_to_transform beside a pattern, so the file names the layers."""
    config = LoraConfig(r=4, target_modules=r".*\.(query|value)", layers_to_transform=(1,))
    model = ours(tiny_bert, config)
    save_adapter(model, tmp_path, config)
    theirs = peft_load(tiny_bert(), tmp_path)
    assert torch.equal(logits(theirs, tiny_batch(model)), logits(model, tiny_batch(model)))


def test_transformers_finds_our_adapter_beside_its_base(tmp_path: Path) -> None:
    """AutoModel.from_pretrained(adapter folder) reads base_model_name_or_path and restores the head."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = tiny_bert(num_labels=3)
    model.save_pretrained(base)
    config = with_head(BERT["plain"])
    add_adapter(model, config)
    fill(model)
    save_adapter(model, folder, config, BaseInfo(str(base), task_type="SEQ_CLS"))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    assert torch.equal(logits(theirs, tiny_batch(model)), logits(model, tiny_batch(model)))


@pytest.mark.parametrize("name", ["plain", "dora", "patterns", "layers", "regex", "saved"])
def test_our_json_equals_the_one_that_peft_writes(name: str, tmp_path: Path) -> None:
    config = T5[name]
    save_adapter(ours(tiny_t5, config), tmp_path / "ours", config, BaseInfo(task_type="SEQ_2_SEQ_LM"))
    peft_save(peft_model(tiny_t5(), config, "SEQ_2_SEQ_LM"), tmp_path / "theirs")
    have, want = (read_json(tmp_path / side) for side in ("ours", "theirs"))
    assert len(have) == 41
    assert have == {**want, "base_model_name_or_path": None}


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_our_tensors_have_the_keys_and_shapes_that_peft_writes(task_type: str | None, tmp_path: Path) -> None:
    config = with_head(BERT["dora"])
    save_adapter(ours(tiny_bert, config), tmp_path / "ours", config, BaseInfo(task_type=task_type))
    peft_save(peft_model(tiny_bert(), config, task_type), tmp_path / "theirs")
    have, want = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in have.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}
    assert metadata(tmp_path / "ours") == metadata(tmp_path / "theirs") == {"format": "pt"}


def test_auto_mapping_without_a_task_type_equals_peft(tmp_path: Path) -> None:
    config = with_head(BERT["plain"])
    save_adapter(ours(tiny_bert, config), tmp_path / "ours", config)
    peft_save(peft_model(tiny_bert(), config), tmp_path / "theirs")
    assert read_json(tmp_path / "ours")["auto_mapping"] == read_json(tmp_path / "theirs")["auto_mapping"]


def read_json(folder: Path) -> dict[str, Any]:
    raw = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(raw["target_modules"], list):
        raw["target_modules"] = sorted(raw["target_modules"])  # peft writes a set in any order
    return raw


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return file.metadata()


def test_three_training_steps_give_the_weights_of_peft() -> None:
    config = with_head(BERT["plain"])
    model = ours(tiny_bert, config)
    theirs = copied_to_peft(model, tiny_bert, config, "SEQ_CLS")
    optimizers = [
        torch.optim.SGD(parameters.values(), lr=0.1)
        for parameters in (adapter_parameters(model), peft_parameters(theirs))
    ]
    for step in range(3):
        for each, optimizer in zip((model, theirs), optimizers, strict=True):
            loss(each, tiny_batch(model, seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(adapter_parameters(model), peft_parameters(theirs), **CLOSE)
