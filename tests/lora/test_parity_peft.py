"""peft as the oracle: the same answers and gradients, the same layers, the same merge, the same files both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.errors import AdapterError
from lorakit.lora import (
    BaseInfo,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from lorakit.lora.target_presets import PRESETS
from tests.lora.oracle import CLOSE, fill, lora_paths, peft_load, peft_model, peft_parameters, peft_save
from tests.tiny import logits, tiny, tiny_batch, tiny_bert, tiny_distilbert, tiny_roberta, tiny_t5, tiny_token_bert

Build = Callable[[], PreTrainedModel]

BERT = {
    "plain": LoraConfig(r=4, target_modules=("query", "value")),
    "patterns": LoraConfig(
        r=4,
        target_modules=("query", "value", "output.dense"),
        rank_pattern={r"layer\.0\.attention\.self\.query": 2, "query": 6, "output.dense": 3},
        alpha_pattern={r".*\.2\..*value": 3.0, "value": 5.0},
    ),
    "layers": LoraConfig(r=4, target_modules=("key", "dense"), layers_to_transform=(0, 2)),
    "regex": LoraConfig(r=4, target_modules=r".*layer\.[12]\..*\.(query|key)"),
    "rslora but for a layer": LoraConfig(
        r=4, target_modules=("query", "dense"), exclude_modules=("pooler.dense",), use_rslora=True
    ),
    "dora-rslora": LoraConfig(r=4, target_modules=("query", "dense"), use_dora=True, use_rslora=True),
}
T5 = {  # what it has apart from BERT: two stacks, no biases, a tied output
    "dora": LoraConfig(r=4, target_modules=("q", "wo"), use_dora=True),
    "patterns in one layer of each": LoraConfig(
        r=4,
        target_modules=("q", "v"),
        rank_pattern={"EncDecAttention.q": 2},
        alpha_pattern={"v": 5},
        layers_to_transform=(0,),
    ),
    "all-linear": LoraConfig(r=4),
    "saved": LoraConfig(r=4, target_modules=("q",), modules_to_save=("final_layer_norm",)),
}


def with_head(config: LoraConfig) -> LoraConfig:
    return LoraConfig(**{**vars(config), "modules_to_save": ("classifier",)})


CASES = [
    *(
        pytest.param(tiny_bert, with_head(config), "SEQ_CLS", id=f"bert-{name}")
        for name, config in BERT.items()
        if name != "layers"
    ),
    *(pytest.param(tiny_t5, config, "SEQ_2_SEQ_LM", id=f"t5-{name}") for name, config in T5.items()),
    pytest.param(tiny_token_bert, with_head(BERT["layers"]), "TOKEN_CLS", id="token-layers"),
    pytest.param(tiny_roberta, with_head(LoraConfig(r=4)), "SEQ_CLS", id="roberta-all-linear"),
    pytest.param(
        tiny_distilbert,
        LoraConfig(r=4, target_modules=("q_lin", "v_lin"), modules_to_save=("classifier", "pre_classifier")),
        "SEQ_CLS",
        id="distilbert-plain",
    ),
    pytest.param(tiny_bert, with_head(BERT["plain"]), None, id="bert-without-a-task-type"),
]


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


@pytest.mark.parametrize(("build", "config", "task_type"), CASES)
def test_layers_outputs_files_gradients_and_merged_weights_equal_peft(
    build: Build, config: LoraConfig, task_type: str | None, tmp_path: Path
) -> None:
    model = ours(build, config)
    theirs = copied_to_peft(model, build, config, task_type)
    assert lora_paths(model) == lora_paths(theirs)
    batch = tiny_batch(model)
    answer = logits(model, batch)
    torch.testing.assert_close(answer, logits(theirs, batch), rtol=0, atol=atol(config))
    save_adapter(model, tmp_path / "ours", config, BaseInfo(task_type=task_type))
    exact = {"rtol": 0.0, "atol": atol(config) if config.use_dora else 0.0}
    torch.testing.assert_close(logits(peft_load(build(), tmp_path / "ours"), batch), answer, **exact)
    again = build()
    read = load_adapter(again, peft_save(theirs, tmp_path / "theirs"))
    torch.testing.assert_close(logits(again, batch), logits(theirs, batch), **exact)
    assert (read.r, read.lora_alpha, read.use_dora) == (config.r, config.lora_alpha, config.use_dora)
    loss(model, batch).backward()
    loss(theirs, batch).backward()
    have = {key: parameter.grad for key, parameter in adapter_parameters(model).items()}
    want = {key: parameter.grad for key, parameter in peft_parameters(theirs).items()}
    torch.testing.assert_close(have, want, rtol=0, atol=atol(config))
    have, want = merge_and_unload(model).state_dict(), theirs.merge_and_unload().state_dict()
    torch.testing.assert_close(have, want, rtol=0, atol=atol(config))


def test_peft_s_folder_with_the_head_it_lists_itself_loads_in_ours(tmp_path: Path) -> None:
    """peft adds classifier and score to modules_to_save of its own accord; BERT has no score."""
    theirs = peft_model(tiny_bert(), BERT["plain"], "SEQ_CLS")
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


def test_pattern_with_layers_loads_in_peft(tmp_path: Path) -> None:
    """peft refuses layers_to_transform beside a pattern, so the file names the layers."""
    config = LoraConfig(r=4, target_modules=r".*\.(query|value)", layers_to_transform=(1,))
    model = ours(tiny_bert, config)
    save_adapter(model, tmp_path, config)
    theirs = peft_load(tiny_bert(), tmp_path)
    assert torch.equal(logits(theirs, tiny_batch(model)), logits(model, tiny_batch(model)))


# Folders that peft reads: with the same answers here, or refused with the key that is at fault


class Foreign(NamedTuple):
    """A folder as peft or somebody else wrote it, and what becomes of it here."""

    build: Build = tiny_bert
    settings: Mapping[str, Any] = MappingProxyType({"target_modules": ["query", "value"]})  # of peft
    task_type: str | None = None
    json: Mapping[str, Any] = MappingProxyType({})  # changed in adapter_config.json; a value of DROPPED goes
    key: Callable[[str], str] = str  # of a key in the other file
    tensor: Callable[[Tensor], Tensor] = torch.clone
    refused: str = ""


DROPPED = object()
LORA_KEY = re.compile(r"(lora_[AB]|lora_magnitude_vector)(\.weight|)$")
CLS = {"task_type": "SEQ_CLS"}


def grown() -> PreTrainedModel:
    model = tiny_bert()
    torch.manual_seed(3)
    model.resize_token_embeddings(64, mean_resizing=False)
    return model


def tied_t5() -> PreTrainedModel:
    return tiny_t5(tie_word_embeddings=True)


def only(*names: str, **kw: Any) -> dict[str, Any]:
    return {"target_modules": [*names], **kw}


def whole_names(key: str) -> str:
    return LORA_KEY.sub(r"\1.default.weight", key)


FOREIGN = {
    "excluded head": Foreign(settings=only("query", "dense", exclude_modules=["classifier"]), **CLS),
    "saved nothing": Foreign(settings=only("query", modules_to_save=["lm_head"])),
    "excluded nothing by a pattern": Foreign(settings=only("query", exclude_modules=".*lm_head")),
    "excluded by a pattern": Foreign(settings=only("query", "value", exclude_modules=r".*\.1\..*")),
    "rank of nothing": Foreign(settings=only("query", rank_pattern={"lm_head": 4, "query": 3})),
    "alpha of what is not adapted": Foreign(settings=only("query", alpha_pattern={"key": 4, "layer.1.*query": 7})),
    "no layers": Foreign(settings=only("query", layers_to_transform=[])),
    "a layer": Foreign(settings=only("query", layers_to_transform=1)),
    "a layer beyond the last": Foreign(settings=only("query", layers_to_transform=[1, 40])),
    "layers of one stack": Foreign(tiny_t5, only("q", "v", layers_to_transform=[0], layers_pattern="decoder.block")),
    "layers of two stacks": Foreign(
        tiny_t5, only("q", layers_to_transform=[0, 2], layers_pattern=["decoder.block", "encoder.block"])
    ),
    "rows of the base": Foreign(tied_t5, only("q", "embed_tokens")),
    "output layer": Foreign(tied_t5, only("q", "lm_head")),
    "saved and tied": Foreign(
        lambda: tiny("GPT2LMHeadModel"), only("c_attn", modules_to_save=["wte"], ensure_weight_tying=True)
    ),
    "all biases of a T5": Foreign(tiny_t5, only("q", bias="all")),
    "fp16, and its name in the keys": Foreign(tensor=torch.Tensor.half, key=whole_names),
    "name in the keys of DoRA": Foreign(settings=only("query", use_dora=True), key=whole_names),
    "keys that say nothing here": Foreign(
        json={
            "trainable_token_indices": {},
            "modules_to_save": [],
            "loftq_config": None,
            "unsloth_fixed": True,
            "my_notes": {"a": [1]},
            "enable_lora": None,
            "peft_version": "0.9.0",
            "eva_config": {"rho": 2.0},
            "corda_config": {"corda_method": "ipm"},
            "runtime_config": {"a": 1},
        }
    ),
    **{f"init {init}": Foreign(json={"init_lora_weights": init}) for init in (None, "Gaussian", "mica")},
    "what peft documents": Foreign(
        settings=only("query", "value", lora_alpha=8, r=8),
        json=dict.fromkeys(peft.LoraConfig().to_dict(), DROPPED)
        | {"peft_type": "LORA", "target_modules": ["query", "value"]},
    ),
    "peft's default targets": Foreign(json={"target_modules": None}),
    "peft's default targets of a T5": Foreign(tiny_t5, only("q", "v"), json={"target_modules": None}),
    "all-linear": Foreign(settings={"target_modules": "all-linear"}, json={"target_modules": "all-linear"}, **CLS),
    "a pattern": Foreign(settings={"target_modules": r".*layer\.(0|2).*\.(query|key)"}),
    "head, not listed": Foreign(json={"modules_to_save": None}, **CLS),
    "head of a module, not listed": Foreign(tiny_roberta, json={"modules_to_save": None}, **CLS),
    "head without a task": Foreign(json={"modules_to_save": None, "task_type": None}, **CLS),
    "answers in a text": Foreign(
        lambda: tiny("BertForQuestionAnswering"), task_type="QUESTION_ANS", json={"modules_to_save": None}
    ),
    "the embedding that is not called": Foreign(tied_t5, only("q", "shared"), refused="the model never calls shared"),
    "another adapter's name": Foreign(
        key=lambda key: key.replace(".weight", ".other.weight"), refused=r"lacks .*query\.lora_A\.weight"
    ),
    "tied updates": Foreign(lambda: tiny("GPT2LMHeadModel"), only("c_attn", "wte", ensure_weight_tying=True)),
    "updates on both ends of a tie": Foreign(
        lambda: tiny("GPT2LMHeadModel"),
        only("c_attn", "transformer.wte", "lm_head", ensure_weight_tying=True),
        refused=r"lm_head\.lora_A",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of peft, about most of these
@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_foreign_folder_is_read_as_peft_reads_it_or_refused(foreign: Foreign, tmp_path: Path) -> None:
    settings = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **foreign.settings}, task_type=foreign.task_type)
    written = peft.get_peft_model(foreign.build(), settings)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in written.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    written.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = {**json.loads(path.read_text()), **foreign.json}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not DROPPED}))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({foreign.key(key): foreign.tensor(value) for key, value in load_file(weights).items()}, weights)
    model = foreign.build()
    if foreign.refused:
        with pytest.raises(AdapterError, match=foreign.refused):
            load_adapter(model, tmp_path)
        return
    batch = tiny_batch(model)
    theirs = peft_load(model, tmp_path)
    plain = logits_of(model, batch)
    assert not torch.allclose(logits_of(theirs, batch), plain, atol=1e-3)
    config = load_adapter(model, tmp_path)
    torch.testing.assert_close(logits_of(model, batch), logits_of(theirs, batch), **CLOSE)
    save_adapter(model, tmp_path / "again", config)
    again = foreign.build()
    load_adapter(again, tmp_path / "again")
    torch.testing.assert_close(logits_of(again, batch), logits_of(theirs, batch), **CLOSE)


@torch.no_grad()
def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    answer = model(**batch)
    found: Tensor = answer.logits if "logits" in answer else answer.start_logits
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("same", [True, False], ids=["the same rows", "other rows"])
def test_rows_that_peft_writes_after_new_tokens_are_compared(same: bool, tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    written = peft.get_peft_model(grown(), settings).eval()
    written.save_pretrained(tmp_path, save_embedding_layers=True)
    model = grown()
    batch = tiny_batch(model)
    if not same:  # not tied here, so that they are the adapter's own
        with torch.no_grad():
            model.get_input_embeddings().weight[60:] = 0
    assert ("word_embeddings" in str(load_adapter(model, tmp_path).modules_to_save)) is not same
    torch.testing.assert_close(logits(model, batch), logits(written, batch), **CLOSE)


def test_rows_of_a_tied_embedding_that_differ_are_refused(tmp_path: Path) -> None:
    model, config = tied_t5(), LoraConfig(r=2, target_modules=("q",))
    add_adapter(model, config)
    save_adapter(model, tmp_path, config)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(weights), "base_model.model.shared.weight": torch.ones(60, 32)}, weights)
    with pytest.raises(AdapterError, match=r"shared\.weight differs from the model's own"):
        load_adapter(tied_t5(), tmp_path)


def test_default_targets_of_peft_are_those_of_our_preset() -> None:
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {name: theirs[name] for name in PRESETS if name in theirs} == {
        name: [*PRESETS[name]["query-value"]] for name in PRESETS if name in theirs
    }
