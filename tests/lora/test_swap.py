"""An adapter renamed, and one replaced in a model that serves: against a model into which it was loaded afresh."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora import (
    LoraConfig,
    Routing,
    adapter_names,
    adapter_parameters,
    add_adapter,
    delete_adapter,
    disabled,
    hosts,
    load_adapter,
    merge,
    rename_adapter,
    save_adapter,
    set_adapter,
    swap_adapter,
)
from tests.lora.oracle import assert_same_tensors, assert_unchanged, fill, snapshot
from tests.tiny import logits, tiny_batch, tiny_roberta

QV = LoraConfig(r=4, target_modules=("query", "value"), modules_to_save=("classifier",))
# Everything in which two adapters over one RoBERTa may differ; its head is a module of two linear layers.
CONFIGS: dict[str, LoraConfig] = {
    "same": QV,
    "other rank": LoraConfig(r=2, lora_alpha=3, target_modules=("query", "value"), modules_to_save=("classifier",)),
    "other targets": LoraConfig(r=4, target_modules=("key", "output.dense"), modules_to_save=("classifier",)),
    "dora": LoraConfig(r=4, target_modules=("query",), use_dora=True, modules_to_save=("classifier",)),
    "rslora and patterns": LoraConfig(target_modules=("query", "key"), use_rslora=True, rank_pattern={"key": 3}),
    "pissa": LoraConfig(r=4, target_modules=("query", "value"), init_lora_weights="pissa"),
    "no head": LoraConfig(r=4, target_modules=("query", "value")),
    "head alone": LoraConfig(target_modules=(), modules_to_save=("classifier",)),
    "head adapted": LoraConfig(r=2, target_modules=("classifier.dense", "query")),
    "all biases": LoraConfig(r=2, target_modules=("value",), bias="all", modules_to_save=("classifier",)),
    "lora_bias": LoraConfig(r=2, target_modules=("value",), lora_bias=True),
    "embedding": LoraConfig(r=2, target_modules=("word_embeddings", "query")),
    "rows": LoraConfig(r=2, target_modules=("query",), trainable_token_indices=(7, 3)),
    "other rows": LoraConfig(r=2, target_modules=("query",), trainable_token_indices=(9, 4)),
}


def saved(folder: Path, config: LoraConfig, seed: int) -> Path:
    model = tiny_roberta()
    add_adapter(model, config, seed=seed)
    save_adapter(fill(model, seed=seed), folder, config)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each of CONFIGS."""
    return {
        name: saved(tmp_path_factory.mktemp("adapter"), config, seed=10 + i)
        for i, (name, config) in enumerate(CONFIGS.items())
    }


def serving(folder: Path, name: str = "default") -> PreTrainedModel:
    model = tiny_roberta()
    load_adapter(model, folder, name)
    return model


def answer(model: nn.Module) -> torch.Tensor:
    return logits(model, tiny_batch(model))


def routing(model: nn.Module) -> Routing:
    return hosts(model)[0][1].routing


def structure(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules()]


# swapped


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *(("same", new) for new in CONFIGS),
        *(("dora", "same"), ("rows", "other rows"), ("head adapted", "head alone"), ("all biases", "head adapted")),
    ],
)
def test_swapped_model_equals_one_with_the_adapter_loaded_afresh(old: str, new: str, folders: dict[str, Path]) -> None:
    model, fresh = serving(folders[old]), tiny_roberta()
    config = swap_adapter(model, folders[new])
    assert config == load_adapter(fresh, folders[new])
    assert torch.equal(answer(model), answer(fresh))
    assert sorted(structure(model), key=str) == sorted(structure(fresh), key=str)
    assert_same_tensors(model.state_dict(), fresh.state_dict())
    assert len({id(host.routing) for _, host in hosts(model)}) == 1
    delete_adapter(model, "default")
    assert torch.equal(answer(model), answer(tiny_roberta()))


@pytest.mark.parametrize("new", ["same", "other targets"])
def test_swap_beside_another_adapter_leaves_it_and_the_order(new: str, folders: dict[str, Path]) -> None:
    model = serving(folders["same"], "first")
    load_adapter(model, folders["dora"], "second")
    load_adapter(model, folders["head alone"], "third")
    before = answer_of(model, "second"), answer_of(model, "third")
    set_adapter(model, "first")
    swap_adapter(model, folders[new], "first")
    assert torch.equal(answer(model), answer(serving(folders[new])))
    assert all(map(torch.equal, (answer_of(model, "second"), answer_of(model, "third")), before))
    assert set(adapter_names(model)) == {"first", "second", "third"}
    if new != "other targets":  # the order is that of the first layer they share
        assert adapter_names(model)[0] == "first"


def answer_of(model: nn.Module, adapter: str) -> torch.Tensor:
    set_adapter(model, adapter)
    return answer(model)


def test_layers_that_both_adapt_keep_their_wrappers(folders: dict[str, Path]) -> None:
    model = serving(folders["same"])
    before = dict(hosts(model))
    swap_adapter(model, folders["other rank"])
    assert dict(hosts(model)).keys() == before.keys()
    assert all(host is before[path] for path, host in hosts(model))


@pytest.mark.parametrize("active", ["default", "other", None])
def test_what_serves_and_what_is_trained_stay(active: str | None, folders: dict[str, Path]) -> None:
    model = serving(folders["same"])
    load_adapter(model, folders["dora"], "other")
    if active is not None:
        set_adapter(model, active)
    else:
        model.requires_grad_(False)
        routing(model).segments = [("default", 2), (None, 1), ("other", 3)]
    before, path = routing(model), routing(model).segments
    swap_adapter(model, folders["other targets"])
    assert routing(model) is before
    assert before.segments == path
    for name in ("default", "other"):
        assert {p.requires_grad for p in adapter_parameters(model, name).values()} == {name == active}


def test_swap_while_disabled_serves_the_base_until_enabled_again(folders: dict[str, Path]) -> None:
    model = serving(folders["same"])
    with disabled(model):
        swap_adapter(model, folders["dora"])
        assert torch.equal(answer(model), answer(tiny_roberta()))
    assert torch.equal(answer(model), answer(serving(folders["dora"])))


# refused


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def other_head(folder: Path) -> None:
    """The adapter of a model with another number of labels."""
    model = tiny_roberta(num_labels=5)
    add_adapter(model, QV)
    save_adapter(model, folder, QV)


def other_model(folder: Path) -> None:
    model, config = nn.ModuleDict({"query": nn.Linear(3, 3)}), LoraConfig(r=2, target_modules=("query",))
    add_adapter(model, config)
    save_adapter(model, folder, config)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (cut, "damaged"),
    "other rank than the file": (edit(r=7), "has shape"),
    "head of another size": (other_head, r"classifier.out_proj.weight has shape \(5, 32\)"),
    "other model": (other_model, "does not fit|lacks"),
    "no folder": (lambda folder: (folder / "adapter_config.json").unlink(), "not an adapter folder"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_wrong_folder_leaves_the_model_bit_for_bit(
    spoil: Callable[[Path], None], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = serving(folders["all biases"])
    saved(tmp_path, QV, seed=1)
    spoil(tmp_path)
    before, order, wrappers, segments = snapshot(model), adapter_names(model), hosts(model), routing(model).segments
    with pytest.raises(AdapterError, match=message):
        swap_adapter(model, tmp_path)
    assert_unchanged(model, before)
    assert adapter_names(model) == order
    assert all(new is old for (_, new), (_, old) in zip(hosts(model), wrappers, strict=True))
    assert routing(model).segments == segments


def test_failure_in_the_middle_of_loading_leaves_the_model_bit_for_bit(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out, with the new adapter inserted and its weights not there yet."""
    model = serving(folders["same"])
    load_adapter(model, folders["dora"], "second")
    before = snapshot(model)

    def fail(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("lorakit.lora.peft_files._assign", fail)
    with pytest.raises(MemoryError):
        swap_adapter(model, folders["other targets"])
    assert_unchanged(model, before)
    assert routing(model).segments == [("second", 0)]


def test_swap_of_an_unknown_or_merged_adapter_is_refused(folders: dict[str, Path]) -> None:
    model = serving(folders["same"], "first")
    with pytest.raises(AdapterError, match="no adapter 'frist' in this model; did you mean 'first'"):
        swap_adapter(model, folders["dora"], "frist")
    merge(model, "first")
    before = snapshot(model)
    with pytest.raises(AdapterError, match="'first' is merged"):
        swap_adapter(model, folders["dora"], "first")
    assert_unchanged(model, before)


# renamed


def test_renamed_adapter_keeps_its_place_its_weights_and_its_rows(folders: dict[str, Path]) -> None:
    model = serving(folders["same"], "a")
    for name in ("b", "c"):
        load_adapter(model, folders["same"], name)
    routing(model).segments = [("a", 2), ("b", 1), (None, 1), ("b", 2)]
    before, weights = answer(model), adapter_parameters(model, "b")
    rename_adapter(model, "b", "better")
    assert adapter_names(model) == ["a", "better", "c"]
    assert routing(model).segments == [("a", 2), ("better", 1), (None, 1), ("better", 2)]
    assert torch.equal(answer(model), before)
    after = adapter_parameters(model, "better")
    assert all(after[key.replace(".b.", ".better.")] is parameter for key, parameter in weights.items())


REFUSED: dict[str, tuple[tuple[str, str], type[Exception], str]] = {
    "unknown": (("frist", "new"), AdapterError, "no adapter 'frist' in this model; did you mean 'first'"),
    "taken": (("first", "second"), ConfigError, "'second' exists already"),
    "itself": (("first", "first"), ConfigError, "'first' exists already"),
    "bad name": (("first", "a.b"), ConfigError, "use letters, digits"),
    "torch's name": (("first", "keys"), ConfigError, "attribute of every torch module"),
}


@pytest.mark.parametrize(("names", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_rename_changes_nothing(
    names: tuple[str, str], kind: type[Exception], message: str, folders: dict[str, Path]
) -> None:
    model = serving(folders["same"], "first")
    load_adapter(model, folders["dora"], "second")
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        rename_adapter(model, *names)
    assert_unchanged(model, before)


def test_merged_adapter_is_not_renamed(folders: dict[str, Path]) -> None:
    model = serving(folders["same"])
    merge(model)
    with pytest.raises(AdapterError, match="'default' is merged"):
        rename_adapter(model, "default", "new")
