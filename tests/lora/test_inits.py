"""Initialisations: the factors against dense linear algebra in numpy, and against peft's own where it means the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import EvaConfig, LoraGAConfig, get_eva_state_dict, preprocess_loraga
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.errors import ConfigError
from lorakit.lora import Data, LoraConfig, add_adapter, hosts, linear_layers, select_targets, start_from_data
from lorakit.lora.inits import INITS, Factors, find_init, named_generator, randomised_svd
from lorakit.lora.inits_from_data import DATA_INITS, Place, eva
from tests.lora.oracle import CLOSE, assert_same_tensors, assert_unchanged, fill, peft_config, snapshot
from tests.tiny import logits, tiny_batch, tiny_bert, tiny_t5

R = 4
QV = ("query", "value")
Batches = Sequence[dict[str, Tensor]]


def weight(d_out: int = 48, d_in: int = 32, decay: float = 0.8) -> Tensor:
    """A matrix whose singular values fall by `decay`, as those of trained weights do. Shapes: (d_out, d_in)."""
    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.empty(d_out, d_in).normal_(generator=generator)).Q
    V = torch.linalg.qr(torch.empty(d_in, d_in).normal_(generator=generator)).Q
    return U * decay ** torch.arange(d_in) @ V.T


def same_directions(left: Tensor, right: Tensor | np.ndarray, atol: float = 1e-3) -> None:
    """The rows of both are the same directions, in order, up to their sign and length."""
    rows = [torch.as_tensor(np.asarray(each)).float() for each in (left, right)]
    units = [each / each.norm(dim=1, keepdim=True) for each in rows]
    torch.testing.assert_close((units[0] * units[1]).sum(1).abs(), torch.ones(len(left)), rtol=0, atol=atol)


# From the weight


@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_orthogonal_factors_have_no_product(r: int) -> None:
    A, B = INITS["orthogonal"](weight(), r, 2.0, named_generator(0, "layer"))
    assert A.shape == (r, 32)
    assert B.shape == (48, r)
    torch.testing.assert_close(B @ A, torch.zeros(48, 32), **CLOSE)
    assert A.any()
    assert bool(B.any()) == (r > 1)


def test_orthogonal_factors_are_distributed_as_peft_s() -> None:
    layer = nn.Linear(400, 300, bias=False)
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    ours = INITS["orthogonal"](layer.weight, 8, 2.0, named_generator(0, "0"))
    for have, want in zip(ours, (theirs.lora_A.default.weight, theirs.lora_B.default.weight), strict=True):
        assert torch.linalg.matrix_rank(have) == torch.linalg.matrix_rank(want) == 4
        assert abs(have.norm() / want.norm() - 1) < 0.1


def test_randomised_svd_equals_the_dense_one() -> None:
    M = weight()
    U, S, Vh = randomised_svd(M, R, 8, named_generator(0, "layer"))
    _, wanted_S, wanted_Vh = np.linalg.svd(M.double().numpy(), full_matrices=False)
    torch.testing.assert_close(S, torch.tensor(wanted_S[:R]).float(), rtol=1e-4, atol=0)
    same_directions(Vh, wanted_Vh[:R])
    torch.testing.assert_close(U * S @ Vh, M @ Vh.T @ Vh, **CLOSE)


def test_randomised_svd_gives_no_more_than_there_is() -> None:
    U, S, Vh = randomised_svd(weight()[:3], 8, 2, named_generator(0, "layer"))
    assert (U.shape, S.shape, Vh.shape) == ((3, 3), (3,), (3, 32))


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_start_from_a_decomposition_is_that_part_of_the_weight(name: str) -> None:
    """s B A is the best part of rank r (PiSSA), or the first r columns of Q by rows of R (OLoRA)."""
    W, scaling = weight(), 2.0
    A, B = INITS[name](W, R, scaling, named_generator(0, "layer"))
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    Q, right = (U * S, Vh) if name == "pissa" else np.linalg.qr(W.double().numpy())
    torch.testing.assert_close(scaling * (B @ A).double(), torch.tensor(Q[:, :R] @ right[:R]), rtol=0, atol=2e-6)
    if name == "pissa":
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def test_fast_pissa_equals_pissa_after_many_iterations() -> None:
    fast = find_init("pissa_niter_40")
    assert fast is not None
    A, B = INITS["pissa"](weight(), R, 2.0, named_generator(0, "layer"))
    have = fast(weight(), R, 2.0, named_generator(0, "layer"))
    torch.testing.assert_close(have.B @ have.A, B @ A, **CLOSE)


@pytest.mark.parametrize("name", ["pissa_niter_", "pissa_niter_x", "pissa_niter_-1", "olora_niter_4", "evaa"])
def test_unknown_initialisation_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"init_lora_weights = '{name}' is not known; "):
        LoraConfig(init_lora_weights=name)


# From data


def classes(model: nn.Module, batches: Batches) -> Data:
    """The batches, and the cross entropy of arbitrary classes."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        scores = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)) % 2)

    return Data(batches, loss)


def batches_for(model: nn.Module, n: int = 3) -> Batches:
    return [tiny_batch(model, seed=seed) for seed in range(n)]


def seen_inputs(model: nn.Module, batches: Batches, path: str) -> np.ndarray:
    """Every input row of one layer, padding left out, in float64; the pooler has one a sentence. Shapes: (n, d_in)."""
    rows = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    for batch in batches:
        model(**batch)
    hook.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    real = [x[mask] if x.dim() == 3 else x for x, mask in zip(rows, masks, strict=True)]
    return torch.cat(real).double().numpy()


def whole_rank_factors(model: nn.Module, batches: Batches, target_modules: tuple[str, ...] = QV) -> dict[str, Factors]:
    """EVA's factors without redistribution."""
    config = LoraConfig(r=R, target_modules=target_modules)
    layers = linear_layers(model)
    places = [Place(target.path, layers[target.path], target.r) for target in select_targets(model, config)]
    return eva(places, classes(model, batches), seed=0, rho=1.0)


def test_eva_takes_the_main_directions_of_all_inputs() -> None:
    model = tiny_bert()
    batches = batches_for(model)
    for path, (A, B) in whole_rank_factors(model, batches).items():
        X = seen_inputs(model, batches, path)
        S = np.linalg.svd(X - X.mean(0), compute_uv=False)
        explained = np.square((X - X.mean(0)) @ A.double().numpy().T).sum()
        assert explained > 0.99 * np.square(S[:R]).sum()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
        assert not B.any()


def test_eva_of_one_batch_equals_the_dense_svd() -> None:
    model = tiny_bert()
    batches = batches_for(model, 1)
    for path, (A, _) in whole_rank_factors(model, batches).items():
        X = seen_inputs(model, batches, path)
        same_directions(A, np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:R])


def test_eva_leaves_padding_out() -> None:
    model = tiny_bert()
    (batch,) = batches_for(model, 1)
    mask = batch["attention_mask"].bool()
    other = {**batch, "input_ids": torch.where(mask, batch["input_ids"], 7)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    path = "bert.encoder.layer.0.attention.self.query"
    starts = [whole_rank_factors(model, [each])[path].A for each in (batch, other)]
    torch.testing.assert_close(starts[0], starts[1], **CLOSE)


def eva_start(model: nn.Module, **settings: Any) -> Any:
    config = LoraConfig(**{"r": R, "target_modules": ("query", "dense"), "init_lora_weights": "eva", **settings})
    return config, start_from_data(model, config, classes(model, batches_for(model, 1)))


def test_eva_gives_the_ranks_to_the_layers_that_explain_most() -> None:
    model = tiny_bert()
    batches = batches_for(model, 1)
    config, (found, factors) = eva_start(model)
    shares = []
    for target in select_targets(model, config):
        X = seen_inputs(model, batches, target.path)
        S2 = np.square(np.linalg.svd(X - X.mean(0), compute_uv=False))
        shares += [(share, target.path) for share in (S2 / S2.sum())[: 2 * R]]
    budget = R * len(select_targets(model, config))
    chosen = [path for _, path in sorted(shares, reverse=True)[:budget]]
    assert {path: len(A) for path, (A, _) in factors.items()} == {path: chosen.count(path) for path in set(chosen)}
    assert {t.path: t.r for t in select_targets(model, found)} == {path: len(A) for path, (A, _) in factors.items()}
    assert len({len(A) for A, _ in factors.values()}) > 1


@pytest.mark.parametrize("rslora", [False, True])
def test_redistributed_ranks_keep_the_scaling(rslora: bool) -> None:
    model = tiny_bert()
    config, start = eva_start(model, use_rslora=rslora, lora_alpha=6)
    add_adapter(model, start.config, factors=start.factors)
    power = 0.5 if rslora else 1.0
    scalings = {host.lora("default").scaling for _, host in hosts(model)}
    assert {round(s, 6) for s in scalings} == {round(config.lora_alpha / R**power, 6)}


def test_eva_equals_peft() -> None:
    """Over one batch seen again and again, on which peft's early stop has no effect."""
    model = tiny_bert()
    batches = batches_for(model, 1) * 4
    config = LoraConfig(r=R, target_modules=("query", "output.dense"), init_lora_weights="eva")
    theirs = get_eva_state_dict(
        copy.deepcopy(model),
        batches,
        peft_config(config, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)),
        show_progress_bar=False,
    )
    factors = start_from_data(model, config, classes(model, batches)).factors
    assert {p: len(A) for p, (A, _) in factors.items()} == {p: len(A) for p, A in theirs.items() if len(A)}
    for path, (A, _) in factors.items():
        same_directions(A, theirs[path], atol=1e-2)


def test_lora_ga_takes_the_singular_vectors_of_the_gradient() -> None:
    model = tiny_bert()
    data = classes(model, batches_for(model))
    config = LoraConfig(r=R, target_modules=QV, init_lora_weights="lora_ga")
    factors = start_from_data(model, config, data).factors
    sum(data.loss(batch) for batch in data.batches).backward()
    for path, (A, B) in factors.items():
        G = model.get_submodule(path).weight.grad
        U, _, Vh = np.linalg.svd(G.double().numpy())
        same_directions(A, Vh[:R])
        same_directions(B.T, U.T[R : 2 * R])
        torch.testing.assert_close(A @ A.T, torch.eye(R) * 32**0.5 / 16, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B.T @ B, torch.eye(R) * 32**0.5 / 16, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_lora_ga_has_the_directions_of_peft() -> None:
    """peft lets the gradient's size into B, against the paper, so lengths are not compared."""
    model = tiny_bert()
    data = classes(model, batches_for(model))
    config = LoraConfig(r=R, target_modules=QV, init_lora_weights="lora_ga")
    theirs = copy.deepcopy(model)
    settings = peft_config(config, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(theirs, settings, lambda: sum(map(classes(theirs, ()).loss, data.batches)).backward())
    adapted = peft.get_peft_model(theirs, settings).base_model.model
    for path, (A, B) in start_from_data(model, config, data).factors.items():
        layer = adapted.get_submodule(path)
        same_directions(A, layer.lora_A.default.weight.detach())
        same_directions(B.T, layer.lora_B.default.weight.detach().T)


def test_lora_ga_with_little_room_takes_the_last_directions_for_b() -> None:
    model = tiny_bert()
    config = LoraConfig(r=20, target_modules=("query",), init_lora_weights="lora_ga")
    for A, B in start_from_data(model, config, classes(model, batches_for(model))).factors.values():
        assert A.shape == (20, 32)
        assert B.shape == (32, 20)


@pytest.mark.parametrize("init", DATA_INITS)
@pytest.mark.parametrize("build", [tiny_bert, tiny_t5])
def test_looking_at_data_leaves_the_model_alone(build: Any, init: str) -> None:
    model: PreTrainedModel = build().train()
    before = snapshot(model)
    batches = [tiny_batch(model)]
    config = LoraConfig(r=2, init_lora_weights=init)
    start = start_from_data(model, config, Data(batches, lambda batch: model(**batch).logits.square().sum()))
    assert start.factors
    assert_unchanged(model, before)
    assert [p for p in model.parameters() if p.grad is not None] == []


@pytest.mark.parametrize("init", DATA_INITS)
def test_same_data_and_seed_give_the_same_factors(init: str) -> None:
    """Whatever the global generator does, and whatever other adapters are active."""
    model = tiny_bert()
    config = LoraConfig(r=R, target_modules=QV, init_lora_weights=init)
    first = start_from_data(model, config, classes(model, batches_for(model)), seed=5)
    torch.rand(1)
    add_adapter(model, LoraConfig(r=2, target_modules=("query",)), "other")
    fill(model, "other")
    again = start_from_data(model, config, classes(model, batches_for(model)), seed=5)
    assert again.config == first.config
    for part in (0, 1):
        assert_same_tensors(*({p: f[part] for p, f in start.factors.items()} for start in (first, again)))


# Mistakes


@pytest.mark.parametrize("init", DATA_INITS)
def test_initialisation_from_data_without_data_is_refused(init: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=rf"'{init}' is computed from data: pass the factors of start_from"):
        add_adapter(model, LoraConfig(init_lora_weights=init))
    assert_unchanged(model, before)


MISTAKES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no batch, eva": ({"init_lora_weights": "eva"}, 0, "no input reached bert"),
    "no batch, lora_ga": ({"init_lora_weights": "lora_ga"}, 0, "no gradient reached bert"),
    "embedding": (
        {"init_lora_weights": "eva", "target_modules": ("word_embeddings",)},
        1,
        "'eva': .*word_embeddings is not a linear layer but Embedding; exclude it",
    ),
    "no data needed": ({"init_lora_weights": "pissa"}, 1, "'pissa' needs no data; 'eva' and 'lora_ga' do"),
}


@pytest.mark.parametrize(("settings", "n_batches", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_computed_from_the_batches_is_refused(
    settings: dict[str, Any], n_batches: int, message: str
) -> None:
    model = tiny_bert()
    with pytest.raises(ConfigError, match=message):
        start_from_data(model, LoraConfig(**{"r": R, **settings}), classes(model, batches_for(model, n_batches)))


def test_layer_that_the_batches_do_not_reach_or_that_has_no_gradient_is_named() -> None:
    model = tiny_bert()
    data = Data([tiny_batch(model)], lambda batch: model.bert.embeddings(batch["input_ids"]).sum().requires_grad_())
    query = r"bert\.encoder\.layer\.0\.attention\.self\.query"
    with pytest.raises(ConfigError, match=f"no gradient reached {query}"):
        start_from_data(model, LoraConfig(r=R, init_lora_weights="lora_ga"), data)
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=f"{query} is quantised and has no gradient"):
        start_from_data(model, LoraConfig(r=R, init_lora_weights="lora_ga"), data)


def test_lora_ga_of_an_embedding_starts_at_the_base() -> None:
    model = tiny_bert()
    before = logits(model, tiny_batch(model))
    config = LoraConfig(r=R, target_modules=("word_embeddings",), init_lora_weights="lora_ga")
    start = start_from_data(model, config, classes(model, batches_for(model)))
    add_adapter(model, start.config, factors=start.factors)
    assert torch.equal(logits(model, tiny_batch(model)), before)


def test_factors_of_another_rank_are_refused() -> None:
    model = tiny_bert()
    before = snapshot(model)
    config = LoraConfig(r=R, target_modules=QV, init_lora_weights="lora_ga")
    factors = start_from_data(model, config, classes(model, batches_for(model))).factors
    with pytest.raises(ConfigError, match=r"have shapes \(\(4, 32\), \(32, 4\)\); its rank is 2"):
        add_adapter(model, LoraConfig(r=2, target_modules=QV), factors=factors)
    assert_unchanged(model, before)
