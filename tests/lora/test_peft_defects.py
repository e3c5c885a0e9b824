"""The defects of peft 0.21.2 that touch what this package is for: each with what happens here instead.

| n | in peft | here |
|---|---|---|
| 1 | all-linear for TOKEN_CLS ends in a TypeError | below |
| 2 | without a task type the head stays frozen, and all-linear adapts the random head | below |
| 3 | a pooler that the checkpoint lacked is not saved: other answers after loading | below |
| 4 | the folder does not know its labels: an error unless num_labels is given | below |
| 5 | names, blocks and ranks that match nothing are let pass | test_targets.py: test_refused_injection... |
| 6 | no default targets for ModernBERT, DistilBERT, ALBERT and others | test_target_presets.py: test_presets_hit... |
| 7 | the weighted sum of one adapter is another one; heads and negative weights | test_combine.py: test_combination_of_one... |
| 8 | bias="all" writes the head's bias three times; false warnings when saving | below |
| 9 | merging and unmerging in bf16 changes the base | test_merge.py: test_unmerge_restores_a_bf16_base... |
| 10 | the order of target_modules in the file is that of a hash | test_peft_files.py: test_saving_twice... |
| 11 | it requires transformers and accelerate, and imports them | tests/test_architecture.py |
| 12 | a mixed batch is refused in training and with DoRA | below |

Answers in the order of the inputs, which Trainer.predict with length grouping does not keep: tests/inference/test_predictor.py.
A test marked `of_peft` holds the comparison honest: it is skipped for another version of peft, where it has to be looked at.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.inference.predictor import load
from lorakit.lora import (
    BaseInfo,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    hosts,
    load_adapter,
    save_adapter,
    set_adapter,
)
from lorakit.models import load_base
from tests.lora.oracle import fill, lora_paths, peft_load, peft_save
from tests.tiny import logits, tiny, tiny_batch, tiny_bert, tiny_token_bert

of_peft = pytest.mark.skipif(peft.__version__ != "0.21.2", reason="seen in peft 0.21.2; is it there still?")

WEIGHTS = "adapter_model.safetensors"
QV = ("query", "value")
HEAD = ("classifier",)


def ours(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    add_adapter(model, LoraConfig(**settings))
    return fill(model)


def theirs(model: nn.Module, **settings: Any) -> peft.PeftModel:
    """peft's model with an adapter off its start."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    fill_peft(wrapped)
    return wrapped


@torch.no_grad()
def fill_peft(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.empty_like(parameter).normal_(generator=generator))


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


# 1: all-linear for token classification


def test_1_all_linear_trains_a_token_classifier_and_peft_reads_it(tmp_path: Path) -> None:
    model = ours(tiny_token_bert(), modules_to_save=HEAD)
    save_adapter(model, tmp_path, LoraConfig(modules_to_save=HEAD), BaseInfo(task_type="TOKEN_CLS"))
    loaded = peft_load(tiny_token_bert(), tmp_path)
    assert torch.equal(logits(loaded, tiny_batch(model)), logits(model, tiny_batch(model)))


@of_peft
def test_1_all_linear_for_a_token_classifier_is_a_type_error_in_peft() -> None:
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        theirs(tiny_token_bert(), target_modules="all-linear", task_type="TOKEN_CLS")


# 2: the head without a task type


def test_2_head_of_a_run_is_trained_and_saved_whatever_the_targets(bert: Path) -> None:
    base = load_base(str(bert), "sequence_classification", labels=("a", "b", "c"))
    add_adapter(base.model, LoraConfig(modules_to_save=base.saved_modules))
    assert {"classifier.weight", "classifier.bias"} <= adapter_parameters(base.model).keys()
    assert not [path for path in lora_paths(base.model) if path.startswith("classifier")]


@of_peft
@pytest.mark.parametrize(("targets", "has_lora"), [(list(QV), False), ("all-linear", True)])
def test_2_head_without_a_task_type_is_left_frozen_by_peft(targets: Any, has_lora: bool) -> None:
    model = theirs(tiny_bert(), target_modules=targets)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".classifier." in name]
    assert bool(trained) is has_lora
    assert not [name for name in trained if "lora_" not in name]


# 3: layers that the checkpoint lacked


def test_3_newly_initialised_layers_are_loaded_with_the_adapter(bert: Path, tmp_path: Path) -> None:
    """The checkpoint has no pooler; each loading draws another one."""
    first, second = (load_base(str(bert), "sequence_classification", labels=("a", "b"), seed=seed) for seed in (1, 2))
    batch = tiny_batch(first.model)
    batch["input_ids"] %= first.model.config.vocab_size
    for base in (first, second):
        base.model.eval()
    assert "bert.pooler.dense" in first.saved_modules
    config = LoraConfig(r=2, target_modules=QV, modules_to_save=first.saved_modules)
    save_adapter(ours(first.model, **vars(config)), tmp_path, config)
    load_adapter(second.model, tmp_path)
    assert torch.equal(logits(second.model, batch), logits(first.model, batch))


@of_peft
def test_3_newly_initialised_pooler_is_lost_by_peft(tmp_path: Path) -> None:
    first, second = tiny_bert(), tiny_bert()
    with torch.no_grad():
        second.bert.pooler.dense.weight.normal_(generator=torch.Generator().manual_seed(3))  # as a new loading does
    model = theirs(first, target_modules=list(QV), task_type="SEQ_CLS")
    loaded = peft_load(second, peft_save(model, tmp_path))
    assert largest(logits(loaded, tiny_batch(first)) - logits(model, tiny_batch(first))) > 1e-3


# 4: labels


def test_4_folder_knows_its_labels(tagger_run: Path) -> None:
    loaded = load(tagger_run)
    assert loaded.model.config.num_labels == len(loaded.task.labels) != transformers.PretrainedConfig().num_labels


@of_peft
def test_4_folder_of_peft_does_not_know_its_labels(tmp_path: Path) -> None:
    tiny("BertModel").save_pretrained(tmp_path / "encoder")
    model = theirs(tiny_bert(num_labels=3), target_modules=list(QV), task_type="SEQ_CLS")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "encoder")
    peft_save(model, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*classifier"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


# 5: what matches nothing


@of_peft
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "q_projjj"]},
        {"modules_to_save": ["poooler"]},
        {"layers_to_transform": [0, 7]},
        {"r": 64},  # the layer's smaller side is 32
    ],
    ids=str,
)
def test_5_setting_that_matches_nothing_is_let_pass_by_peft(settings: dict[str, Any]) -> None:
    theirs(tiny_bert(), **{"target_modules": ["query"], **settings})  # nor warned of: warnings are errors here


# 6: default targets


@of_peft
@pytest.mark.parametrize("family", ["ModernBert", "DistilBert", "Albert"])
def test_6_family_has_no_default_targets_in_peft(family: str) -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        theirs(tiny(f"{family}ForTokenClassification"), task_type="TOKEN_CLS")


# 7: combining


@of_peft
@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_7_combination_of_one_is_another_in_peft(settings: dict[str, Any]) -> None:
    model = theirs(tiny_bert(), r=4, target_modules=list(QV), **settings)
    batch = tiny_batch(model.base_model.model)
    before = logits(model, batch)
    model.add_weighted_adapter(["default"], [1.0], "again", combination_type="linear")
    model.set_adapter("again")
    assert largest(logits(model, batch) - before) > 1e-3


@of_peft
def test_7_adapters_with_heads_are_not_combined_by_peft() -> None:
    model = theirs(tiny_bert(), target_modules=list(QV), task_type="SEQ_CLS")
    model.add_adapter("other", peft.LoraConfig(target_modules=list(QV), task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed")


# 8: biases in the file, and false warnings


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_8_each_bias_is_saved_once_and_without_a_warning(settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(target_modules=QV, modules_to_save=HEAD, **settings)
    model = tiny_bert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(model, config, "a")
        save_adapter(model, tmp_path, config, name="a")
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert [key for key in keys if "classifier" in key and key.endswith("bias")] == ["base_model.model.classifier.bias"]


@of_peft
def test_8_peft_saves_the_bias_of_the_head_three_times(tmp_path: Path) -> None:
    model = theirs(tiny_bert(), target_modules=list(QV), task_type="SEQ_CLS", bias="all")
    keys = load_file(peft_save(model, tmp_path) / WEIGHTS).keys()
    assert len([key for key in keys if "classifier" in key and key.endswith("bias")]) == 3


# 9: unmerging


@of_peft
def test_9_unmerging_in_bf16_changes_the_base_in_peft() -> None:
    model = theirs(tiny_bert().to(torch.bfloat16), r=4, target_modules=list(QV))
    weights = [p for path, p in model.named_parameters() if path.endswith("query.base_layer.weight")]
    before = [weight.detach().clone() for weight in weights]
    model.merge_adapter()
    model.unmerge_adapter()
    assert not all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))


# 10: the same bytes


@of_peft
def test_10_names_are_a_set_in_peft() -> None:
    """Written as list(set), whose order is that of hashes, which differ from process to process."""
    assert isinstance(peft.LoraConfig(target_modules=["query", "key"]).target_modules, set)


# 11: what an import takes along


@of_peft
def test_11_peft_requires_transformers_and_accelerate() -> None:
    needed = {
        line.split()[0].split(">")[0] for line in importlib.metadata.requires("peft") or () if "extra" not in line
    }
    assert {"transformers", "accelerate"} <= needed


# 12: a mixed batch in training


@pytest.fixture(params=[{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def two(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """A model in training with two adapters of different rank, both trainable."""
    model = ours(tiny_bert(), r=4, target_modules=QV, modules_to_save=HEAD, **request.param)
    add_adapter(model, LoraConfig(r=2, target_modules=("query", "key"), modules_to_save=HEAD, **request.param), "other")
    fill(model, "other", seed=2)
    yield model.train()


def gradients(model: nn.Module, name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = adapter_parameters(model, name)
    found = torch.autograd.grad(model(**batch).logits.square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def test_12_mixed_batch_trains_each_adapter_as_alone(two: PreTrainedModel) -> None:
    batch = tiny_batch(two)
    rows = {"default": slice(0, 2), "other": slice(2, None)}
    alone = {}
    for name, part in rows.items():
        set_adapter(two, name)
        alone[name] = gradients(two, name, {key: value[part] for key, value in batch.items()})
    for name in rows:
        for parameter in adapter_parameters(two, name).values():
            parameter.requires_grad_()
    hosts(two)[0][1].routing.segments = [("default", 2), ("other", len(batch["input_ids"]) - 2)]
    for name in rows:
        torch.testing.assert_close(gradients(two, name, batch), alone[name], rtol=1e-5, atol=1e-5)


@of_peft
def test_12_mixed_batch_is_refused_by_peft_in_training_and_with_dora() -> None:
    batch = tiny_batch(tiny_bert())
    names = ["default"] * len(batch["input_ids"])
    training = theirs(tiny_bert(), target_modules=list(QV)).train()
    with pytest.raises(ValueError, match=r"adapter_names.*training"):
        training(**batch, adapter_names=names)
    dora = theirs(tiny_bert(), target_modules=list(QV), use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        dora(**batch, adapter_names=names)
