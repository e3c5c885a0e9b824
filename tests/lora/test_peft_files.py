"""An adapter on disk: saved and read again unchanged, and refused with a reason when anything is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora import (
    BaseInfo,
    LoraConfig,
    adapter_parameters,
    add_adapter,
    hosts,
    load_adapter,
    merge,
    read_adapter_config,
    save_adapter,
    select_targets,
    set_adapter,
)
from lorakit.lora.peft_files import adapter_tensors, reload_adapter
from tests.lora.oracle import (
    CLOSE,
    assert_same_tensors,
    assert_unchanged,
    fill,
    peft_load,
    peft_model,
    peft_save,
    snapshot,
)
from tests.tiny import logits, tiny_batch, tiny_bert

JSON, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY_A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
QV = LoraConfig(r=4, target_modules=("query", "value"), modules_to_save=("classifier",))
BASE = BaseInfo("some/base", "main", "SEQ_CLS")

CONFIGS = {
    "plain": QV,
    "dora": LoraConfig(r=4, target_modules=("dense",), use_dora=True, modules_to_save=("pooler", "classifier")),
    "rslora": LoraConfig(r=4, use_rslora=True, lora_dropout=0.1),
    "patterns": LoraConfig(target_modules=("query", "key"), rank_pattern={"query": 3}, alpha_pattern={"key": 0.5}),
    "layers": LoraConfig(target_modules=("query",), layers_to_transform=(2, 0), init_lora_weights="gaussian"),
    "regex": LoraConfig(target_modules=r".*\.(query|value)", exclude_modules=(r"layer.0.attention.self.query",)),
    "regex with layers": LoraConfig(target_modules=r".*\.(query|value)", layers_to_transform=(1,)),
    "all-linear without one": LoraConfig(exclude_modules=("pooler.dense",)),
    "head alone": LoraConfig(target_modules=(), modules_to_save=("classifier",)),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules=("query",)),
    "olora with rslora": LoraConfig(r=4, init_lora_weights="olora", use_rslora=True),
    "pissa of more than half rank": LoraConfig(r=20, init_lora_weights="pissa", target_modules=("query",)),
}


def adapted(config: LoraConfig = QV, name: str = "default") -> PreTrainedModel:
    model = tiny_bert()
    add_adapter(model, config, name)
    return fill(model, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapted(), folder, QV, BASE)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A folder of QV, to be edited."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / JSON).read_text())
    (folder / JSON).write_text(json.dumps({**raw, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# there and back


def test_files_have_the_mode_of_new_files(folder: Path) -> None:
    (folder / "new").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_adapter_is_loaded_saved_alike_and_reloaded(config: LoraConfig, tmp_path: Path) -> None:
    model, again, other = adapted(config), tiny_bert(), tiny_bert()
    batch = tiny_batch(model)
    save_adapter(model, tmp_path / "a", config, BASE)
    read = load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=0, atol=2e-6)
    save_adapter(again, tmp_path / "b", read, read_adapter_config(tmp_path / "a")[1])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    add_adapter(other, config)
    save_adapter(other, tmp_path / "other", config, BASE)
    reload_adapter(again, tmp_path / "other")
    reload_adapter(again, tmp_path / "a")
    assert_same_tensors(adapter_tensors(again), load_file(tmp_path / "a" / WEIGHTS))
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=0, atol=2e-6)


def test_reloading_what_is_not_of_the_same_settings_changes_nothing(folder: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    save_adapter(adapted(LoraConfig(r=3)), other, LoraConfig(r=3), BASE)
    model = tiny_bert()
    load_adapter(model, folder)
    before = snapshot(model)
    with pytest.raises(AdapterError, match="lacks 2 of"):
        reload_adapter(model, other)
    assert_unchanged(model, before)


def test_saving_twice_gives_the_same_bytes_whatever_the_order_of_names(folder: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    turned = LoraConfig(r=4, target_modules=("value", "query"), modules_to_save=("classifier",))
    save_adapter(adapted(turned), other, turned, BASE)
    assert contents(folder) == contents(other)


@pytest.mark.parametrize("name", ["query", "classifier", "lora_A"])
def test_second_adapter_named_like_a_module_is_saved_whole(name: str, tmp_path: Path) -> None:
    """peft searches names in strings and loses such adapters."""
    model = adapted()
    add_adapter(model, QV, name)
    save_adapter(model, tmp_path / "first", QV, BASE)
    save_adapter(adapted(), tmp_path / "alone", QV, BASE)
    assert contents(tmp_path / "first") == contents(tmp_path / "alone")


def test_loading_a_second_adapter_leaves_the_first(folder: Path) -> None:
    model = adapted(CONFIGS["patterns"], "first")
    before = logits(model, tiny_batch(model))
    load_adapter(model, folder, "second")
    assert torch.equal(logits(model, tiny_batch(model)), logits(adapted(), tiny_batch(model)))
    set_adapter(model, "first")
    assert torch.equal(logits(model, tiny_batch(model)), before)


def test_adapter_of_a_bf16_base_is_written_in_fp32(tmp_path: Path) -> None:
    model = tiny_bert().bfloat16()
    add_adapter(model, QV)
    save_adapter(fill(model), tmp_path, QV)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    again = tiny_bert().bfloat16()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, tiny_batch(model)), logits(model, tiny_batch(model)))


def test_merged_adapter_is_saved_as_unmerged(folder: Path, tmp_path_factory: Any) -> None:
    model, other = adapted(), tmp_path_factory.mktemp("other")
    merge(model)
    save_adapter(model, other, QV, BASE)
    assert contents(folder) == contents(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tensors_of_any_precision_are_read(dtype: torch.dtype, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({QUERY_A: tensors[QUERY_A].to(dtype)}))
    model = tiny_bert()
    load_adapter(model, folder)
    have = adapter_parameters(model)["bert.encoder.layer.0.attention.self.query.lora_A"]
    assert have.dtype == torch.float32
    assert torch.equal(have, load_file(folder / WEIGHTS)[QUERY_A].float())


def test_name_that_peft_let_pass_unmatched_is_no_obstacle(folder: Path) -> None:
    edit_json(folder, target_modules=["query", "value", "valeu"])
    model = tiny_bert()
    load_adapter(model, folder)
    assert torch.equal(logits(model, tiny_batch(model)), logits(adapted(), tiny_batch(model)))


def test_rank_above_the_smaller_side_is_read_as_peft_wrote_it(tmp_path: Path) -> None:
    theirs = peft_model(tiny_bert(), LoraConfig(r=40, target_modules=("query",)))
    peft_save(theirs, tmp_path)
    load_adapter(tiny_bert(), tmp_path)


# refused

BAD_JSON: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "all"}, "lacks 26 of 40 tensors .*LayerNorm.bias"),
    "unknown bias": ({"bias": "some"}, "bias = .some. is not known"),
    "lora_bias": ({"lora_bias": True}, "lacks 6 of 20 tensors .*query.lora_B.bias"),
    "target_parameters": ({"target_parameters": ["w"]}, r"target_parameters = \['w'\] is not supported"),
    "a variant's settings, all default": ({"kasa_config": {}}, "kasa_config = {} is not supported"),
    "other method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' can be read"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "unconverted pissa": ({"init_lora_weights": "pissa"}, "'pissa' belongs to an edited base model; save it again"),
    "targets of a wrong type": (
        {"target_modules": {"query": 1}},
        r"target_modules = \{'query': 1\} is not a string or a list of strings",
    ),
    "targets of numbers": ({"target_modules": [1]}, r"target_modules = \[1\] is not a string or a list"),
    "saved as a string": ({"modules_to_save": "classifier"}, "modules_to_save = 'classifier' is not a list of strings"),
    "layers as text": (
        {"layers_to_transform": ["0"]},
        r"layers_to_transform = \['0'\] is not a whole number or a list",
    ),
    "rank_pattern as a list": ({"rank_pattern": ["query"]}, r"rank_pattern = \['query'\] is not an object of whole"),
    "rank_pattern as an empty list": ({"rank_pattern": []}, r"rank_pattern = \[\] is not an object"),
    "alpha_pattern of text": ({"alpha_pattern": {"query": "2"}}, "alpha_pattern = {'query': '2'} is not an object of"),
    "no dropout": ({"lora_dropout": None}, "lora_dropout = None is not a number"),
    "no bias": ({"bias": None}, "bias = None is not a string"),
    "a flag as text": ({"use_rslora": "false"}, "use_rslora = 'false' is not true or false"),
    "rows of nothing": (
        {"trainable_token_indices": {"a": None}},
        "trainable_token_indices = {'a': None} is not a list",
    ),
    "base as a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path = 3 is not a string"),
    "alpha beyond any float": ({"lora_alpha": 10**400}, "lora_alpha = 1000.* is not a number"),
    "text that is long": ({"r": "4" * 9000}, r"r = '4{76}\.\.\. is not a whole number"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha = '8' is not a number"),
    "rank as text": ({"r": "4"}, "r = '4' is not a whole number"),
    "other targets": ({"target_modules": ["q"]}, "does not fit this model: target_modules: nothing matches 'q'"),
    "bad pattern": (
        {"target_modules": "(q"},
        "does not fit this model: target_modules: .* is not a regular expression",
    ),
    "more targets": (
        {"target_modules": r".*\.(query|key|value)"},
        "lacks 6 of 20 tensors .*first '.*0.attention.self.key",
    ),
    "fewer targets": (
        {"target_modules": ["query"]},
        "has unexpected 6 of 8 tensors for this model, first '.*value.lora_A",
    ),
    "layers beyond the last": ({"layers_to_transform": [9]}, "no targeted layer lies in block 9"),
    "dora": ({"use_dora": True}, "lacks 6 of 20 tensors .*lora_magnitude_vector"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_config_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit_json(folder, **changes)
    assert_refused(folder, message)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[QUERY_A]


def put(value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({QUERY_A: value})


BAD_TENSORS = {
    "missing": (drop, "lacks 1 of 14 tensors for this model, first 'base_model.*query.lora_A.weight'"),
    "fp64 beyond fp32": (put(torch.full((4, 32), 1e300, dtype=torch.float64)), "holds NaN or infinite values"),
    "other rows under LoRA": (
        lambda t: t.update({QUERY_A.replace("lora_A", "base_layer"): torch.ones(32, 32)}),
        "query.base_layer.weight differs from the model's own",
    ),
    "a key twice, once with a name": (
        lambda t: t.update({QUERY_A.replace(".weight", ".default.weight"): t[QUERY_A].clone()}),
        "holds a tensor twice",
    ),
    "the name of another adapter": (
        lambda t: t.update({QUERY_A.replace(".weight", ".other.weight"): t.pop(QUERY_A)}),
        r"lacks 1 of 14 tensors .*query\.lora_A\.weight",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    edit_tensors(folder, change)
    assert_refused(folder, message)


BAD_FILES = {
    "no config": (JSON, None, f"is not an adapter folder: it has no {JSON}"),
    "no weights": (WEIGHTS, None, f"is not an adapter folder: it has no {WEIGHTS}"),
    "config of a list": (JSON, lambda data: b"[]", f"{JSON}: holds a list, not an object"),
    "config in latin-1": (JSON, lambda data: b'{"a": "\xe9"}', f"{JSON}: not valid UTF-8 at byte 7"),
    "config twice": (JSON, lambda data: b'{"r": 4, "r": 8}', f"{JSON}: the key 'r' appears twice"),
}


@pytest.mark.parametrize(("name", "change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_missing_or_damaged_file_is_refused(
    name: str, change: Callable[[bytes], bytes] | None, message: str, folder: Path
) -> None:
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(data))
    assert_refused(folder, message)


@pytest.mark.parametrize("name", [JSON, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(name: str, kind: str, folder: Path) -> None:
    """A pipe would block for ever, a device never end."""
    path = folder / name
    path.unlink()
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    assert_refused(folder, f"{name}: cannot be read: not a regular file")


def assert_refused(folder: Path, message: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert_unchanged(model, before)
    assert hosts(model) == []


def test_loading_under_a_taken_name_is_refused(folder: Path) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="adapter 'default' exists already"):
        load_adapter(model, folder)
    assert_unchanged(model, before)


def test_saving_an_unknown_adapter_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter 'other' in this model"):
        save_adapter(adapted(), tmp_path / "new", QV, name="other")
    assert not (tmp_path / "new").exists()


def test_patterns_whose_order_counts_survive_the_sorting_of_keys(tmp_path: Path) -> None:
    """The first match wins, but the keys of adapter_config.json are sorted, in peft as here."""
    model = tiny_bert()
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=("query", "value"),
        rank_pattern={r"layer\.1\..*query": 5, "query": 3},
        alpha_pattern={r"layer\.2\..*value": 9, r".*": 6},
    )
    targets = {target.path: (target.r, target.alpha) for target in add_adapter(model, config)}
    fill(model)
    save_adapter(model, tmp_path, config)
    again = tiny_bert()
    loaded = load_adapter(again, tmp_path)
    assert {target.path: (target.r, target.alpha) for target in select_targets(tiny_bert(), loaded)} == targets
    batch = tiny_batch(model)
    assert torch.equal(logits(again, batch), logits(model, batch))
    torch.testing.assert_close(logits(peft_load(tiny_bert(), tmp_path), batch), logits(model, batch), **CLOSE)
