"""Where an adapter acts besides a low-rank product on an input: biases, rows of an embedding, fused attention.

The oracle is peft: the same files, the same outputs, the same gradients. Where peft cannot, dense arithmetic.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora import (
    LoraConfig,
    adapter_parameters,
    add_adapter,
    count_parameters,
    delete_adapter,
    disabled,
    hosts,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    unmerge,
)
from tests.lora.oracle import (
    CLOSE,
    assert_same_tensors,
    assert_unchanged,
    fill,
    filled_and_saved,
    peft_load,
    peft_save,
    snapshot,
)
from tests.tiny import logits, randomized, tiny, tiny_batch, tiny_bert, tiny_t5

WIDTH, HEADS = 32, 4
PLACES: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True},
    "both kinds of bias": {"bias": "lora_only", "lora_bias": True},
    "all biases with DoRA": {"bias": "all", "use_dora": True},
    "token rows": {"trainable_token_indices": (7, 3, 11)},
    "rows of two embeddings": {"trainable_token_indices": {"position_embeddings": (1,), "word_embeddings": (6, 5)}},
}
place = pytest.mark.parametrize("settings", PLACES.values(), ids=PLACES)


def config_of(settings: dict[str, Any], **kw: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=("query", "value"), **{**settings, **kw})


def peft_of(model: nn.Module, config: LoraConfig, **kw: Any) -> peft.PeftModel:
    """peft's model of the same settings, moved off its start."""
    rows = config.trainable_token_indices
    made = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(
            r=config.r,
            lora_alpha=int(config.lora_alpha),
            target_modules=list(config.target_modules),
            bias=config.bias,
            lora_bias=config.lora_bias,
            use_dora=config.use_dora,
            trainable_token_indices={k: list(v) for k, v in rows.items()}
            if isinstance(rows, dict)
            else list(rows) or None,
            **kw,
        ),
    ).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.empty_like(parameter).normal_(generator=generator))
    return made


@place
def test_adapter_starts_is_merged_and_taken_out(settings: dict[str, Any]) -> None:
    model = tiny_bert()
    plain = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    batch = tiny_batch(model)
    base = logits(model, batch)
    add_adapter(model, config_of(settings))
    assert torch.equal(logits(model, batch), base)
    counts = count_parameters(model)
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.total >= sum(tensor.numel() for tensor in plain.values())
    fill(model)
    adapted = logits(model, batch)
    merge(model)
    torch.testing.assert_close(logits(model, batch), adapted, **CLOSE)
    unmerge(model)
    assert torch.equal(logits(model, batch), adapted)
    unloaded = merge_and_unload(copy.deepcopy(model))
    assert list(unloaded.state_dict()) == list(plain)
    torch.testing.assert_close(logits(unloaded, batch), adapted, **CLOSE)
    with disabled(model):
        assert torch.equal(logits(model, batch), base)
    delete_adapter(model, "default")
    assert_same_tensors(model.state_dict(), plain)


@place
def test_ours_reads_peft_s_with_the_same_answers_gradients_and_tensors(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_bert()
    theirs = peft_of(model, config_of(settings), task_type="SEQ_CLS")
    peft_save(theirs, tmp_path / "theirs")
    config = load_adapter(model, tmp_path / "theirs")
    batch = tiny_batch(model)
    torch.testing.assert_close(logits(model, batch), logits(theirs, batch), **CLOSE)
    save_adapter(model, tmp_path / "ours", config)
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert_same_tensors(
        ours, {key: stored[key] for key in stored if ".original_module." not in key and ".modules_to_save." not in key}
    )
    for each in (model, theirs):
        each(**batch).logits.square().sum().backward()
    found = sorted(float(p.grad.norm()) for p in adapter_parameters(model).values() if p.grad is not None)
    want = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.requires_grad and p.grad is not None)
    assert found == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert len(found) == len(adapter_parameters(model))


def test_two_adapters_with_other_places_keep_apart() -> None:
    model = tiny_bert()
    batch = tiny_batch(model)
    base = logits(model, batch)
    add_adapter(model, config_of({"bias": "all"}), "a")
    fill(model, "a")
    a = logits(model, batch)
    add_adapter(model, config_of({"trainable_token_indices": (7, 8)}), "b")
    assert torch.equal(logits(model, batch), base)
    fill(model, "b")
    b = logits(model, batch)
    routing = hosts(model)[0][1].routing
    routing.segments = [("a", 2), (None, 1), ("b", 3)]
    torch.testing.assert_close(logits(model, batch), torch.cat([a[:2], base[2:3], b[3:]]), **CLOSE)


def test_rows_of_a_tied_embedding_are_read_and_written_alike() -> None:
    """T5 reads tokens in the encoder and the decoder and writes them with the same matrix."""
    model = tiny_t5(tie_word_embeddings=True)
    rows = (6, 9, 20)
    dense = copy.deepcopy(model)
    add_adapter(model, LoraConfig(target_modules=("q",), trainable_token_indices=rows))
    trained = fill_rows(model)
    with torch.no_grad():
        dense.get_input_embeddings().weight[list(rows)] = trained
    dense.tie_weights()
    batch = tiny_batch(model)
    batch["input_ids"][:, 0] = 9
    torch.testing.assert_close(logits(model, batch), logits(dense, batch), **CLOSE)
    merge_and_unload(model)
    torch.testing.assert_close(logits(model, batch), logits(dense, batch), **CLOSE)


@torch.no_grad()
def fill_rows(model: nn.Module) -> Tensor:
    """The trained rows, moved off their start."""
    (rows,) = (p for key, p in adapter_parameters(model).items() if key.endswith(".rows"))
    return rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))


TIED: dict[str, dict[str, Any]] = {
    "shared": {"target_modules": ("q", "q_proj", "shared")},
    "shared with DoRA, by a pattern": {"target_modules": r".*(\.q|\.q_proj|shared)", "use_dora": True},
    "what is called, of another rank": {
        "target_modules": ("embed_tokens",),
        "rank_pattern": {"decoder.embed_tokens": 3},
    },
    "shared but for the decoder": {"target_modules": ("shared",), "exclude_modules": ("decoder.embed_tokens",)},
    "shared and the output layer": {"target_modules": ("shared", "lm_head")},
    "rows": {"target_modules": ("q", "q_proj"), "trainable_token_indices": (7, 9)},
    "rows of shared": {"target_modules": ("q", "q_proj"), "trainable_token_indices": {"shared": (7, 9)}},
    "rows by another name": {"target_modules": ("q", "q_proj"), "trainable_token_indices": {"embed_tokens": (7, 9)}},
    "whole": {"target_modules": ("q", "q_proj"), "modules_to_save": ("embed_tokens", "lm_head")},
    "the output layer": {"target_modules": ("lm_head",)},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")  # of peft, about merging
@pytest.mark.parametrize(
    ("family", "name"),
    [*(("T5", name) for name in TIED), ("Bart", "shared")],
)
def test_what_is_tied_acts_where_it_is_called_here_and_in_peft(family: str, name: str, tmp_path: Path) -> None:
    """T5's and BART's encoder and decoder have embeddings of their own, tied to `shared`, which nothing calls."""
    model, settings = tiny(f"{family}ForConditionalGeneration", tie_word_embeddings=True), TIED[name]
    known = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if isinstance(settings["target_modules"], tuple):
        settings = {**settings, "target_modules": tuple(known.intersection(settings["target_modules"]))}
    config = LoraConfig(r=2, lora_alpha=4, **settings)
    base = filled_and_saved(model, config, tmp_path / "a")
    batch = tiny_batch(model)
    answer = logits(model, batch)
    model(**batch).logits.square().sum().backward()
    assert [key for key, parameter in adapter_parameters(model).items() if parameter.grad is None] == []
    torch.testing.assert_close(logits(peft_load(base, tmp_path / "a"), batch), answer, **CLOSE)
    again = copy.deepcopy(base)
    save_adapter(again, tmp_path / "b", load_adapter(again, tmp_path / "a"))
    torch.testing.assert_close(logits(again, batch), answer, **CLOSE)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    merge(model)
    save_adapter(model, tmp_path / "merged", config)
    assert (tmp_path / "merged/adapter_config.json").read_bytes() == (tmp_path / "a/adapter_config.json").read_bytes()
    torch.testing.assert_close(logits(model, batch), answer, **CLOSE)
    unmerge(model)
    delete_adapter(model, "default")
    assert torch.equal(logits(model, batch), logits(base, batch))
    assert model.get_input_embeddings().weight is model.lm_head.weight


class Encoder(nn.Module):
    """A model around PyTorch's own attention."""

    def __init__(self, whole_layer: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, WIDTH)
        if whole_layer:
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
        else:
            self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.layer(x) if hasattr(self, "layer") else self.mha(x, x, x)[0]
        return self.head(x)


IDS = torch.randint(0, 60, (5, 7), generator=torch.Generator().manual_seed(2))
MHA = LoraConfig(r=3, lora_alpha=6, target_modules=("mha",))


def with_deltas(model: Encoder, tensors: dict[str, Tensor], times_out: float = 1) -> Encoder:
    """A dense model: W + s B A in both projections, the output's update `times_out` times."""
    dense, prefix, scaling = copy.deepcopy(model), "base_model.model.mha.", MHA.lora_alpha / MHA.r
    with torch.no_grad():
        for weight, inner, times in (
            (dense.mha.in_proj_weight, "", 1),
            (dense.mha.out_proj.weight, "base_layer.out_proj.", times_out),
        ):
            A, B = (tensors[f"{prefix}{inner}lora_{factor}.weight"] for factor in "AB")
            weight += times * scaling * B @ A
    return dense


def test_attention_is_its_dense_oracle_and_round_trips_through_peft(tmp_path: Path) -> None:
    model = randomized(Encoder())
    base = copy.deepcopy(model)
    assert [target.path for target in add_adapter(model, MHA)] == ["mha", "mha.base.out_proj"]
    with torch.no_grad():
        assert torch.equal(model(IDS), base(IDS))
    fill(model)
    save_adapter(model, tmp_path, MHA)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(model(IDS), with_deltas(base, ours)(IDS), **CLOSE)
    theirs = peft_load(base, tmp_path)
    if peft.__version__ == "0.21.2":  # adds the output projection's update twice, as weight and again by merging
        torch.testing.assert_close(theirs(IDS), with_deltas(base, ours, times_out=2)(IDS), **CLOSE)
    peft_save(theirs, tmp_path / "theirs")
    assert_same_tensors(ours, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_attention_merges_trains_and_is_taken_out(settings: dict[str, Any]) -> None:
    model = randomized(Encoder())
    before = snapshot(model)
    config = LoraConfig(r=3, target_modules=("mha",), **settings)
    add_adapter(model, config)
    fill(model)
    model(IDS).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter_parameters(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    adapted = model(IDS).detach()
    merge(model)
    torch.testing.assert_close(model(IDS), adapted, **CLOSE)
    unmerge(model)
    delete_adapter(model, "default")
    model.requires_grad_(True)
    assert_unchanged(model, before)


@pytest.mark.parametrize("target", ["self_attn", "linear1"])
def test_pytorch_s_fast_path_does_not_pass_the_adapter_by(target: str) -> None:
    """In eval mode nn.TransformerEncoderLayer hands its weights to one fused kernel; peft's adapter is ignored there."""
    model = randomized(Encoder(whole_layer=True))
    add_adapter(model, LoraConfig(r=3, target_modules=(target,)))
    fill(model)
    with torch.no_grad():
        fast = model(IDS)
    torch.testing.assert_close(fast, model.train()(IDS).detach(), **CLOSE)
    if peft.__version__ == "0.21.2" and target == "linear1":
        plain = randomized(Encoder(whole_layer=True))
        settings = peft.LoraConfig(r=3, target_modules=[target], init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(plain), settings).eval()
        with torch.no_grad():
            assert torch.equal(theirs(IDS), plain(IDS))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "row twice": ({"trainable_token_indices": (3, 3)}, "trainable_token_indices = [3, 3]: must be different"),
    "row below 0": ({"trainable_token_indices": (-1,)}, "whole numbers from 0"),
    "row too high": (
        {"trainable_token_indices": (60,)},
        "60 is not in bert.embeddings.word_embeddings, which has 60 rows",
    ),
    "no such embedding": ({"trainable_token_indices": {"wte": (1,)}}, "nothing matches 'wte'"),
    "unknown bias": ({"bias": "al"}, "bias = 'al' is not known; did you mean 'all'?"),
    "lora_bias with DoRA": ({"lora_bias": True, "use_dora": True}, "cannot be used with DoRA"),
    "two ways at once": (
        {"target_modules": ("word_embeddings",), "trainable_token_indices": (1,)},
        "word_embeddings is already adapted or saved as a whole",
    ),
    "unknown update": ({"update": "dorra"}, "update = 'dorra' is not known; did you mean 'dora' or 'lora'"),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line_and_change_nothing(settings: dict[str, Any], message: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError) as caught:
        add_adapter(model, LoraConfig(**{"target_modules": ("query",), **settings}))
    assert message in str(caught.value)
    assert_unchanged(model, before)


def test_a_bias_where_the_layer_has_none_is_not_merged() -> None:
    model = tiny_t5()
    add_adapter(model, LoraConfig(target_modules=("q",), lora_bias=True))
    with pytest.raises(AdapterError, match="trains a bias where the layer has none"):
        merge(model)
    assert all(host.merged is None for _, host in hosts(model))


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ("inner.again",)}, {"target_modules": ("other",), "modules_to_save": ("first",)}],
    ids=["target", "saved"],
)
def test_a_module_with_several_names_is_refused(settings: dict[str, Any]) -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleDict({"first": layer, "inner": nn.ModuleDict({"again": layer, "other": other})})
    before = snapshot(model)
    with pytest.raises(
        ConfigError, match=r"first is also inner\.again, and an adapter file stores each module under one name"
    ):
        add_adapter(model, LoraConfig(r=2, **settings))
    assert_unchanged(model, before)


def test_rows_of_embeddings_that_are_tied_are_the_same_rows() -> None:
    rows = {"encoder.embed_tokens": (1, 2), "shared": (3,)}
    with pytest.raises(ConfigError, match="shared and the embeddings tied to it must have the same rows"):
        add_adapter(tiny_t5(), LoraConfig(target_modules=("q",), trainable_token_indices=rows))


def test_a_module_that_is_never_called_is_not_saved() -> None:
    with pytest.raises(
        ConfigError, match=r"never calls shared, .* encoder\.embed_tokens and decoder\.embed_tokens; name"
    ):
        add_adapter(tiny_t5(), LoraConfig(target_modules=("q",), modules_to_save=("shared",)))
