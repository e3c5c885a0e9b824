"""Names for common targets, by model family: `target_modules = "query-value"` or `"attention"`.

A family is one line, under the `model_type` of its configuration. If q, k and v are one fused layer (GPT-2, ModernBERT),
that layer is used for each of them, as in peft's table.
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


def _preset(query_value: str, attention: str) -> Preset:
    return {"query-value": tuple(query_value.split()), "attention": tuple(attention.split())}


_BERT = _preset("query value", "query key value attention.output.dense")
_T5 = _preset("q v", "q k v o")
_BART = _preset("q_proj v_proj", "q_proj k_proj v_proj self_attn.out_proj encoder_attn.out_proj")
_LLAMA = _preset("q_proj v_proj", "q_proj k_proj v_proj o_proj")

PRESETS: Mapping[str, Preset] = {
    "albert": _preset("query value", "query key value attention.dense"),
    "bart": _BART,
    "bert": _BERT,
    "camembert": _BERT,
    "deberta": _preset("in_proj", "in_proj attention.output.dense"),
    "deberta-v2": _preset("query_proj value_proj", "query_proj key_proj value_proj attention.output.dense"),
    "distilbert": _preset("q_lin v_lin", "q_lin k_lin v_lin out_lin"),
    "electra": _BERT,
    "gemma": _LLAMA,
    "gpt2": _preset("c_attn", "c_attn attn.c_proj"),
    "gpt_neox": _preset("query_key_value", "query_key_value attention.dense"),
    "llama": _LLAMA,
    "longt5": _T5,
    "mbart": _BART,
    "mistral": _LLAMA,
    "modernbert": _preset("Wqkv", "Wqkv attn.Wo"),
    "mpnet": _preset("q v", "q k v attn.o"),
    "mt5": _T5,
    "opt": _preset("q_proj v_proj", "q_proj k_proj v_proj self_attn.out_proj"),
    "pegasus": _BART,
    "phi3": _preset("qkv_proj", "qkv_proj o_proj"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "t5": _T5,
    "umt5": _T5,
    "xlm-roberta": _BERT,
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
                    f"such as ['query', 'value']; families with presets: {', '.join(PRESETS)}"
                )
            changes: dict[str, Any] = {key: PRESETS[family][preset]}
            config = dataclasses.replace(config, **changes)
    return config
