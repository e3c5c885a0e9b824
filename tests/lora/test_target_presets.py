"""Presets: in a tiny model of every family they hit the layers they promise, and peft reads what was saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from lorakit.errors import ConfigError
from lorakit.lora import LoraConfig, add_adapter, load_adapter, save_adapter, select_targets
from lorakit.lora.target_presets import PRESET_NAMES, PRESETS
from lorakit.recipe import make_recipe
from tests.lora.oracle import fill, lora_paths, peft_load
from tests.tiny import VOCABULARY, logits, tiny_batch, tiny_bert

LAYERS = 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 48,
    "num_layers": LAYERS,
    "decoder_start_token_id": 0,
    "local_radius": 4,
}
BART_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


class Family(NamedTuple):
    """A family's sizes, how many attentions its model has, and the adapted layers in each: by query-value and in all."""

    sizes: dict[str, Any]
    attentions: int = LAYERS
    query_value: int = 2
    attention: int = 4


ENCODER = Family(SIZES)
T5 = Family(T5_SIZES, attentions=3 * LAYERS)  # of the encoder, of the decoder, and across
BART = Family(BART_SIZES, attentions=3 * LAYERS)
FUSED = Family(SIZES, query_value=1, attention=2)
FAMILIES = {
    "albert": Family({**SIZES, "embedding_size": 16}, attentions=1),  # all layers share one
    "bart": BART,
    "bert": ENCODER,
    "camembert": ENCODER,
    "deberta": FUSED,
    "deberta-v2": ENCODER,
    "distilbert": Family({"vocab_size": VOCABULARY, "dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48}),
    "electra": Family({**SIZES, "embedding_size": 16}),
    "gemma": Family({**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": Family({"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}, LAYERS, 1, 2),
    "gpt_neox": FUSED,
    "llama": ENCODER,
    "longt5": T5,
    "mbart": BART,
    "mistral": Family({**SIZES, "num_key_value_heads": 2}),
    "modernbert": FUSED,
    "mpnet": ENCODER,
    "mt5": T5,
    "opt": Family({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "pegasus": BART,
    "phi3": FUSED,
    "qwen2": Family({**SIZES, "num_key_value_heads": 2}),
    "qwen3": Family({**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "roberta": ENCODER,
    "t5": T5,
    "umt5": T5,
    "xlm-roberta": ENCODER,
}
presets = pytest.mark.parametrize("preset", PRESET_NAMES)


def build(family: str) -> PreTrainedModel:
    """A tiny model of the family with the head that it is used with most, built from its configuration."""
    config = AutoConfig.for_model(family, **FAMILIES[family].sizes)
    for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            return auto.from_config(config).eval()
    raise AssertionError(f"no model for {family}")


def chosen(model: nn.Module, targets: str) -> set[str]:
    return {target.path for target in select_targets(model, LoraConfig(r=2, target_modules=targets))}


@pytest.mark.parametrize("family", PRESETS)
def test_presets_hit_the_expected_layers(family: str) -> None:
    """`attention` takes what all-linear does inside of modules that are named for attention, `query-value` some of it."""
    model, want = build(family), FAMILIES[family]
    attention, query_value = chosen(model, "attention"), chosen(model, "query-value")
    assert attention == {path for path in chosen(model, "all-linear") if re.search("attn|attention", path.lower())}
    assert query_value <= attention
    assert len(attention) == want.attentions * want.attention
    assert len(query_value) == want.attentions * want.query_value


@presets
def test_every_family_has_every_preset(preset: str) -> None:
    assert [family for family in PRESETS if not PRESETS[family].get(preset)] == []


@presets
def test_saved_adapter_names_the_layers_so_that_peft_loads_it(preset: str, tmp_path: Path) -> None:
    model, config = tiny_bert(), LoraConfig(r=2, target_modules=preset)
    add_adapter(model, config)
    fill(model)
    save_adapter(model, tmp_path, config)
    theirs, again = peft_load(tiny_bert(), tmp_path), tiny_bert()
    assert load_adapter(again, tmp_path).target_modules == tuple(sorted(PRESETS["bert"][preset]))
    assert lora_paths(theirs) == lora_paths(model)
    for other in (theirs, again):
        assert (logits(other, tiny_batch(model)) == logits(model, tiny_batch(model))).all()


def test_preset_can_be_excluded_from_all_linear() -> None:
    """The feed-forward layers, say."""
    paths = [target.path for target in select_targets(tiny_bert(), LoraConfig(r=2, exclude_modules="attention"))]
    assert paths
    assert [path for path in paths if ".attention." in path] == []


@presets
def test_recipe_takes_a_preset(preset: str) -> None:
    recipe = make_recipe({"model": {"base": "minilm"}}, [f"lora.target_modules={preset}"])
    assert recipe.lora.config().target_modules == preset
    assert select_targets(tiny_bert(), recipe.lora.config()) != []


def test_recipe_takes_a_name_like_a_preset_in_a_list() -> None:
    recipe = make_recipe({"model": {"base": "minilm"}, "lora": {"target_modules": ["attention"]}})
    assert recipe.lora.config().target_modules == ("attention",)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_preset_for_an_unknown_family_is_refused(key: str) -> None:
    model = tiny_bert()
    model.config.model_type = "bertish"
    with pytest.raises(
        ConfigError, match=rf"{key} = 'attention' is not known for the family 'bertish'; write 'all-lin"
    ):
        select_targets(model, LoraConfig(r=2, **{key: "attention"}))


def test_preset_for_a_model_without_a_configuration_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ConfigError, match=r"'query-value' is not known for Sequential, .* families with presets: albert"
    ):
        select_targets(model, LoraConfig(r=2, target_modules="query-value"))
