"""An adapter in the words of each consumer: what its own arithmetic makes of the files alone equals our merged weights."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.errors import AdapterError
from lorakit.lora import Layer, LoraConfig, add_adapter, hosts, merge, save_adapter, set_adapter
from lorakit.lora.export_profiles import PROFILES, Conformed, conform, left_behind
from lorakit.lora.inits import truncated
from tests.lora.oracle import CLOSE, assert_same_tensors, fill, peft_load
from tests.tiny import logits, tiny_batch, tiny_bert, tiny_gpt2, tiny_roberta, tiny_t5

PREFIX = "base_model.model."
PLAIN = [name for name, profile in PROFILES.items() if not profile.everything]
HEAD = ("classifier", "pooler.dense")
QV = LoraConfig(r=4, target_modules=("query", "value"), modules_to_save=HEAD)
DORA = LoraConfig(r=4, target_modules=("query", "value"), modules_to_save=HEAD, use_dora=True)
PATTERNS = LoraConfig(
    r=4,
    target_modules=("query", "value", "output.dense"),
    rank_pattern={r"layer\.0\.attention\.self\.query": 2, "output.dense": 3},
    alpha_pattern={r".*\.2\..*value": 3.0, "query": 5.0},
    modules_to_save=HEAD,
)
CASES = {
    "plain": (tiny_bert, QV),
    "patterns with rslora": (tiny_bert, LoraConfig(**{**vars(PATTERNS), "use_rslora": True})),
    "all-linear": (tiny_roberta, LoraConfig(r=4, modules_to_save=("classifier",))),
    "all-linear beside a pooler": (tiny_bert, LoraConfig(r=4, modules_to_save=HEAD)),
    "layers": (tiny_bert, LoraConfig(r=4, target_modules=("key", "dense"), layers_to_transform=(0, 2))),
    "regex": (tiny_t5, LoraConfig(r=4, target_modules=r"encoder\.block\.[12]\.layer\.0\.SelfAttention\.(q|v)")),
    "exclude": (tiny_bert, LoraConfig(r=4, target_modules=("dense",), exclude_modules=("pooler.dense",))),
    "pissa": (tiny_bert, LoraConfig(r=4, target_modules=("query",), init_lora_weights="pissa")),
    "gpt2": (tiny_gpt2, LoraConfig(r=4, target_modules=("c_attn",), alpha_pattern={r"h\.0\.attn\.c_attn": 2})),
}


def trained(build: Any, config: LoraConfig) -> PreTrainedModel:
    model = build()
    add_adapter(model, config)
    return fill(model)


def exported(
    model: nn.Module, config: LoraConfig, consumer: str, folder: Path, rank: int | None = None
) -> tuple[Conformed, dict[str, Any], dict[str, Tensor]]:
    """The conformed adapter, and its two files as another program reads them."""
    conformed = conform(model, config, PROFILES[consumer], rank=rank)
    save_adapter(model, folder, conformed.config, name=conformed.name)
    raw = json.loads((folder / "adapter_config.json").read_text())
    return conformed, raw, load_file(folder / "adapter_model.safetensors")


def consumer_deltas(raw: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each layer's weight gains for a reader that knows A, B and one global alpha / r. Shapes: (d_out, d_in)."""
    deltas = {}
    for key in tensors:
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if key.endswith(a):
                path = key.removeprefix(PREFIX).removesuffix("." + a)
                B = tensors[f"{PREFIX}{path}.{b}"]
                deltas[path] = raw["lora_alpha"] / raw["r"] * B @ tensors[key]
    return deltas


def merged_deltas(model: nn.Module) -> dict[str, Tensor]:
    """What merging adds to each adapted layer's weight. Shapes: (d_out, d_in)."""
    merging = copy.deepcopy(model)
    before = {path: layer.base.weight.clone() for path, layer in hosts(model, "default") if isinstance(layer, Layer)}
    merge(merging)
    deltas = {}
    for path, weight in before.items():
        layer = merging.get_submodule(path)
        delta = layer.base.weight - weight
        deltas[path] = delta if isinstance(layer.base, nn.Linear) else delta.T
    return deltas


def test_llamacpp_reads_what_vllm_does() -> None:
    vllm, llamacpp = PROFILES["vllm"], PROFILES["llamacpp"]
    assert replace(llamacpp, consumer=vllm.consumer, use=vllm.use) == vllm


@pytest.mark.parametrize(("case", "consumer"), [("plain", "peft"), *((case, "vllm") for case in CASES)])
def test_consumer_s_arithmetic_our_merge_and_peft_s_answers_agree(case: str, consumer: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    model = trained(build, config)
    wanted = merged_deltas(model)
    conformed, raw, tensors = exported(model, config, consumer, tmp_path)
    if consumer in PLAIN:
        check_sayings(raw, tensors)
        deltas = consumer_deltas(raw, tensors)
        assert wanted.keys() <= deltas.keys()
        for path, delta in deltas.items():
            torch.testing.assert_close(delta, wanted.get(path, torch.zeros_like(delta)), **CLOSE)
    theirs = peft_load(build(), tmp_path)
    for key, tensor in left_behind(model, conformed).items():  # the head is carried over by hand
        theirs.base_model.model.get_parameter(key).data.copy_(tensor)
    set_adapter(model, "default")
    batch = tiny_batch(model)
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), rtol=0, atol=2e-6)


def check_sayings(raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The files say nothing that a plain consumer would miss."""
    assert [key for key in tensors if not re.search(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$", key)] == []
    assert {len(tensors[key]) for key in tensors if "_A" in key} == {raw["r"]}
    assert isinstance(raw["lora_alpha"], int)
    assert isinstance(raw["target_modules"], list)
    said = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules")
    assert not any(raw[key] for key in (*said, "use_rslora", "use_dora"))


def test_what_is_uniform_already_keeps_its_bytes(tmp_path: Path) -> None:
    model = trained(tiny_bert, LoraConfig(r=4, target_modules=("query",)))
    save_adapter(model, tmp_path / "before", LoraConfig(r=4, target_modules=("query",)))
    conformed, raw, tensors = exported(model, LoraConfig(r=4, target_modules=("query",)), "vllm", tmp_path / "after")
    assert conformed.changes == []
    assert (raw["r"], raw["lora_alpha"], raw["target_modules"]) == (4, 16, ["query"])
    assert_same_tensors(tensors, load_file(tmp_path / "before" / "adapter_model.safetensors"))


def test_peft_gets_the_adapter_itself(tmp_path: Path) -> None:
    model = trained(tiny_bert, DORA)
    assert conform(model, DORA, PROFILES["peft"]) == Conformed("default", DORA, [], {})


def test_changes_say_what_is_different(tmp_path: Path) -> None:
    model = trained(tiny_bert, LoraConfig(**{**vars(PATTERNS), "layers_to_transform": (0, 2)}))
    conformed = conform(model, LoraConfig(**{**vars(PATTERNS), "layers_to_transform": (0, 2)}), PROFILES["vllm"])
    told = "\n".join(conformed.changes)
    assert [line.partition(":")[0] for line in conformed.changes] == ["scaling", "rank", "target_modules"]
    assert "(0.75 to 5.33333) folded into B; lora_alpha = r = 4" in told
    assert "5 of 8 layers padded with zeros to r = 4" in told


def test_head_is_left_behind_whole() -> None:
    model = trained(tiny_bert, QV)
    conformed = conform(model, QV, PROFILES["llamacpp"])
    head = dict(model.classifier.adapters["default"].state_dict())
    pooler = dict(model.bert.pooler.dense.adapters["default"].state_dict())
    wanted = {f"classifier.{key}": value for key, value in head.items()}
    wanted |= {f"bert.pooler.dense.{key}": value for key, value in pooler.items()}
    assert_same_tensors(left_behind(model, conformed), wanted)
    assert left_behind(model, Conformed("default", QV, [], {})) == {}


# What has no such form


@pytest.mark.parametrize("consumer", ["peft", "vllm"])
def test_dora_cut_to_a_rank_is_the_best_of_that_rank(consumer: str, tmp_path: Path) -> None:
    model = trained(tiny_bert, DORA)
    wanted = merged_deltas(model)
    conformed, raw, tensors = exported(model, DORA, consumer, tmp_path, rank=6)
    assert not raw["use_dora"]
    assert "cut by SVD to rank 6" in conformed.changes[0]
    deltas = consumer_deltas(raw, tensors)
    assert conformed.errors.keys() == wanted.keys() == deltas.keys()
    for path, delta in wanted.items():
        S = torch.linalg.svdvals(delta)
        lost = (delta - deltas[path]).norm()
        torch.testing.assert_close(lost, S[6:].norm(), rtol=1e-4, atol=1e-6)  # Eckart-Young
        assert conformed.errors[path] == pytest.approx(float(lost / S.norm()), rel=1e-3)


def test_rank_keeps_whole_modules_where_they_are_read(tmp_path: Path) -> None:
    model = trained(tiny_bert, DORA)
    conformed, _, _ = exported(model, DORA, "peft", tmp_path, rank=32)  # the full rank: nothing is lost
    assert max(conformed.errors.values()) < 1e-6
    theirs = peft_load(tiny_bert(), tmp_path)
    set_adapter(model, "default")
    batch = tiny_batch(model)
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_rank_leaves_smaller_updates_whole(tmp_path: Path) -> None:
    model = trained(tiny_bert, PATTERNS)
    wanted = merged_deltas(model)
    conformed, raw, tensors = exported(model, PATTERNS, "vllm", tmp_path, rank=3)
    cut = {
        path
        for path, layer in hosts(model, "default")
        if isinstance(layer, Layer) and len(layer.lora("default").lora_A) > 3
    }
    assert conformed.errors.keys() == cut
    for path, delta in consumer_deltas(raw, tensors).items():
        if path not in cut:
            torch.testing.assert_close(delta, wanted[path], **CLOSE)


def test_truncated_zero_is_zero() -> None:
    factors, error = truncated(torch.zeros(5, 4), 2)
    assert error == 0
    assert not (factors.B @ factors.A).any()


def test_embedding_goes_along(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=("query", "word_embeddings"), rank_pattern={"query": 2})
    model = trained(tiny_bert, config)
    wanted = merged_deltas(model)
    _, raw, tensors = exported(model, config, "vllm", tmp_path)
    for path, delta in consumer_deltas(raw, tensors).items():
        torch.testing.assert_close(delta, wanted[path], **CLOSE)


def test_adapter_without_factors_is_refused() -> None:
    config = LoraConfig(target_modules=(), modules_to_save=("classifier",))
    with pytest.raises(AdapterError, match="this adapter has none"):
        conform(trained(tiny_bert, config), config, PROFILES["vllm"])


def test_convolution_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=("0",))
    with pytest.raises(AdapterError, match="does not support LoRA over 0, a convolution"):
        conform(trained(lambda: nn.Sequential(nn.Conv1d(4, 6, 3)), config), config, PROFILES["vllm"])


def test_trained_bias_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=("query",), lora_bias=True)
    with pytest.raises(AdapterError, match=r"reads factors A and B only, not '.*lora_B\.bias'"):
        conform(trained(tiny_bert, config), config, PROFILES["vllm"])


def test_dora_is_refused_and_the_model_left_alone() -> None:
    model = trained(tiny_bert, DORA)
    before = [path for path, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=r"does not support DoRA.*--to merged.*--rank N"):
        conform(model, DORA, PROFILES["vllm"])
    assert [path for path, _ in model.named_modules()] == before
