"""Names for common targets, by model family: `target_modules = "query-value"` or `"attention"`.

A family is the `model_type` of its configuration, one word beside those that are alike. If q, k and v are one fused layer
(GPT-2, ModernBERT), that layer is used for each of them, as in peft's table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError
from lorakit.lora.config import ALL_LINEAR, LoraConfig

if TYPE_CHECKING:
    from torch import nn

Preset = Mapping[str, tuple[str, ...]]  # name -> suffixes of module paths

# Families that call these layers alike: query-value, attention, and the `model_type` of each.
_ALIKE = (
    (
        "query value",
        "query key value attention.output.dense",
        "bert big_bird camembert data2vec-text electra ernie esm layoutlm markuplm megatron-bert mra nystromformer "
        "rembert roberta roberta-prelayernorm roc_bert roformer tapas xlm-roberta xlm-roberta-xl xmod yoso",
    ),
    (
        "q_proj v_proj",
        "q_proj k_proj v_proj o_proj",
        "apertus arcee cohere_compass_text diffllama esmc eurobert exaone4 gemma gemma2 gemma3_text glm glm4 gpt_oss gte helium "
        "hunyuan_v1_dense hunyuan_v1_moe jina_embeddings_v3 llama ministral ministral3 mistral mixtral nemotron nomic_bert "
        "olmo olmo2 olmo3 openai_privacy_filter phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 "
        "t5gemma ultrabert",
    ),
    (
        "q_proj v_proj",
        "q_proj k_proj v_proj self_attn.out_proj encoder_attn.out_proj",
        "bart blenderbot blenderbot-small m2m_100 marian mbart mvp pegasus pegasus_x plbart",
    ),
    ("q v", "q k v o", "longt5 mt5 t5 umt5"),
    ("q_lin v_lin", "q_lin k_lin v_lin out_lin", "distilbert flaubert xlm"),
    ("c_attn", "c_attn attn.c_proj", "gpt2 gpt_bigcode openai-gpt"),
    ("query_key_value", "query_key_value self_attention.dense", "bloom falcon"),
    ("q_proj v_proj", "q_proj k_proj v_proj self_attn.out_proj", "biogpt opt"),
)
_OWN = {
    "albert": ("query value", "query key value attention.dense"),
    "bigbird_pegasus": (
        "query value q_proj v_proj",
        "query key value self_attn.output q_proj k_proj v_proj self_attn.out_proj encoder_attn.out_proj",
    ),
    "convbert": ("query value", "query key value conv_kernel_layer conv_out_layer attention.output.dense"),
    "ctrl": ("Wq Wv", "Wq Wk Wv multi_head_attention.dense"),
    "deberta": ("in_proj", "in_proj attention.output.dense"),
    "deberta-v2": ("query_proj value_proj", "query_proj key_proj value_proj attention.output.dense"),
    "gpt_neo": ("q_proj v_proj", "q_proj k_proj v_proj attention.out_proj"),
    "gpt_neox": ("query_key_value", "query_key_value attention.dense"),
    "gptj": ("q_proj v_proj", "q_proj k_proj v_proj attn.out_proj"),
    "led": (
        "query value q_proj v_proj",
        "query key value query_global key_global value_global self_attn.output q_proj k_proj v_proj self_attn.out_proj "
        "encoder_attn.out_proj",
    ),
    "lilt": (
        "query value",
        "query key value layout_query layout_key layout_value attention.output.dense attention.layout_output.dense",
    ),
    "longformer": ("query value", "query key value query_global key_global value_global attention.output.dense"),
    "luke": ("query value", "query key value w2e_query e2w_query e2e_query attention.output.dense"),
    "mobilebert": ("query value", "query key value attention.output.dense bottleneck.attention.dense"),
    "modernbert": ("Wqkv", "Wqkv attn.Wo"),
    "modernbert-decoder": ("q_proj v_proj", "q_proj k_proj v_proj attn.Wo"),
    "mpnet": ("q v", "q k v attn.o"),
    "mpt": ("Wqkv", "Wqkv attn.out_proj"),
    "persimmon": ("query_key_value", "query_key_value self_attn.dense"),
    "phi3": ("qkv_proj", "qkv_proj o_proj"),
}
PRESETS: Mapping[str, Preset] = {
    family: {"query-value": tuple(query_value.split()), "attention": tuple(attention.split())}
    for query_value, attention, families in (*_ALIKE, *((*names, family) for family, names in _OWN.items()))
    for family in families.split()
}
PRESET_NAMES = tuple(PRESETS["bert"])


def with_presets(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The settings with concrete names in place of a preset in target_modules or exclude_modules.

    Raises:
        ConfigError: a preset is named and the model's family is not in the table, or the model has no configuration.
    """
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    for key in ("target_modules", "exclude_modules"):
        preset = getattr(config, key)
        if isinstance(preset, str) and preset in PRESET_NAMES:
            if family not in PRESETS:
                who = f"the family {family!r}" if family else f"{type(model).__name__}, which has no config.model_type,"
                raise ConfigError(
                    f"{key} = {preset!r} is not known for {who}; write '{ALL_LINEAR}' or a list of names "
                    f"such as ['query', 'value']; families with presets: {', '.join(sorted(PRESETS))}"
                )
            changes: dict[str, Any] = {key: PRESETS[family][preset]}
            config = dataclasses.replace(config, **changes)
    return config
