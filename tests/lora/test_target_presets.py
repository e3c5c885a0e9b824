"""Presets: in a tiny model of every family they hit the layers they promise, and peft reads what was saved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lorakit.errors import ConfigError
from lorakit.lora import LoraConfig, add_adapter, load_adapter, save_adapter, select_targets
from lorakit.lora.target_presets import PRESET_NAMES, PRESETS
from lorakit.recipe import make_recipe
from tests.interop.families import LEFT_OUT, OWN, cells, config_of
from tests.lora.oracle import fill, lora_paths, peft_load
from tests.tiny import logits, tiny_batch, tiny_bert

# Families that read and write texts and have no preset, each for a reason that its model shows.
NO_PRESET = {
    **dict.fromkeys(
        ("canine", "funnel", "reformer"), "transformers cannot read a text of every length with it: refused"
    ),
    **dict.fromkeys(("fsmt", "prophetnet"), "its decoder gives other logits token by token: refused"),
    **dict.fromkeys(("nllb-moe", "switch_transformers"), "its experts let answers depend on other texts: refused"),
    "fnet": "it has no attention",
    "ibert": "its layers are QuantLinear, none that LoRA adapts",
    "mistral4": "its attention is latent: no layer gives queries or values by itself",
    "perceiver": "feed-forward layers stand inside of modules named for attention",
    "squeezebert": "its attention is convolutions",
    "xlnet": "its attention multiplies by parameters of its own, not by layers",
}
QUICK = (
    "albert",
    "bart",
    "bert",
    "deberta-v2",
    "eurobert",
    "gpt2",
    "lilt",
    "modernbert",
    "nomic_bert",
    "t5",
    "t5gemma",
)
presets = pytest.mark.parametrize("preset", PRESET_NAMES)


def build(family: str) -> nn.Module:
    """A tiny model of the family, without weights, with the head that it is used with most."""
    config = config_of(family, **OWN.get(family, {}))
    for auto in ("SequenceClassification", "TokenClassification", "Seq2SeqLM"):
        if (
            model_class := getattr(transformers, f"AutoModelFor{auto}")._model_mapping.get(type(config), None)
        ) is not None:
            with torch.device("meta"):
                return (model_class[0] if isinstance(model_class, tuple) else model_class)(config)
    raise AssertionError(f"no model for {family}")


def chosen(model: nn.Module, targets: str) -> set[str]:
    return {target.path for target in select_targets(model, LoraConfig(r=2, target_modules=targets))}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(PRESETS)]
)
def test_presets_hit_the_expected_layers(family: str) -> None:
    """`attention` takes what all-linear does inside of modules that are named for attention, `query-value` some in each."""
    model = build(family)
    attention, query_value = chosen(model, "attention"), chosen(model, "query-value")
    assert attention == {path for path in chosen(model, "all-linear") if re.search("attn|attention", path.lower())}
    assert query_value < attention
    attentions = {path.rpartition(".")[0] for path in query_value}
    for own in (
        sorted(path.rpartition(".")[2] for path in query_value if path.startswith(a + ".")) for a in attentions
    ):
        assert len(own) in (1, 2)
        assert len(own) == 2 or not {"q", "query", "q_proj"} & set(own), "a value layer is missing"


@pytest.mark.slow
def test_every_family_that_reads_or_writes_text_has_a_preset_or_a_reason() -> None:
    """Those of this transformers; a newer one shows here which are missing. Decoders alone may go without."""
    autos = (getattr(transformers, name)._model_mapping for name in ("AutoModelForMaskedLM", "AutoModelForCausalLM"))
    encoders, decoders = ({config.model_type for config in mapping} for mapping in autos)
    wanted = {f for f, kind in cells() if kind == "text2text" or f in encoders or f not in decoders} - LEFT_OUT.keys()
    assert {"bert", "t5", "eurobert", "nomic_bert"} <= wanted
    assert wanted - PRESETS.keys() <= NO_PRESET.keys()
    assert not NO_PRESET.keys() & PRESETS.keys()


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
