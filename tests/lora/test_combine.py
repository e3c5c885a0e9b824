"""Adapters combined, against numpy on dense weights; against peft where peft is right (a plain weighted sum, cut by SVD)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora import (
    LoraConfig,
    adapter_names,
    adapter_parameters,
    add_adapter,
    combine,
    delete_adapter,
    hosts,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from lorakit.lora.combination import METHODS
from lorakit.lora.layers import Layer
from tests.lora.test_weight_layouts import IDS, mixed
from tests.tiny import logits, tiny_batch, tiny_bert, tiny_t5

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora dora": {"init_lora_weights": "olora", "use_dora": True},
    "lora_fa": {"update": "lora_fa"},
    "vera": {"update": "vera"},
    "adalora": {"update": "adalora"},
    "small": {"r": 2, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"query": 7}, "alpha_pattern": {"output.dense": 1.5}},
}
KINDS = ("emb", "padded", "conv", "reflected", "conv2", "fc")
FULL = 32  # the smaller side of every layer of tiny_bert: at this rank nothing is cut
CLOSE = {"rtol": 0, "atol": 2e-6}
Array = np.ndarray[Any, Any]


def in_turn(cases: list[Any], *methods: str) -> list[tuple[Any, str]]:
    """Each case with one method, in turn: what a method does with a layer's difference is the same for all of them."""
    methods = methods or tuple(METHODS)
    return [(case, methods[i % len(methods)]) for i, case in enumerate(cases)]


def small_bert() -> nn.Module:
    """A tiny BERT of one block: every combination takes the singular values of every layer."""
    return tiny_bert(num_hidden_layers=1)


@torch.no_grad()
def fill(model: nn.Module, name: str, seed: int = 0) -> nn.Module:
    """The model with its adapter moved off its start, by so little that DoRA's gains stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def with_adapters(**variants: str) -> nn.Module:
    """A tiny BERT with one trained-looking adapter for each name, of the named variant."""
    model = small_bert()
    for seed, (name, variant) in enumerate(variants.items()):
        settings = {"r": 4, "target_modules": ("query", "dense"), **VARIANTS[variant]}
        add_adapter(model, LoraConfig(modules_to_save=("classifier",), **settings), name, seed=seed)
        fill(model, name, seed=seed + 5)
    return model


def answers(model: nn.Module) -> Tensor:
    return logits(model, tiny_batch(model))


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {path: h.lora(name).delta_weight(h).detach() for path, h in hosts(model, name) if isinstance(h, Layer)}


# the oracle: gain and P of every layer, and what a method makes of them, in numpy


def dense_parts(model: nn.Module, name: str) -> dict[str, tuple[Array, Array]]:
    """path -> (gain (d_out,), P (d_out, d_in)) with dW = (gain - 1) W + P, read off W and the merged W alone."""
    before = {path: h.matrix().numpy().copy() for path, h in hosts(model, name) if isinstance(h, Layer)}
    merge(model, name)
    after = {path: h.matrix().numpy().copy() for path, h in hosts(model, name) if path in before}
    for _, host in hosts(model):
        host.unmerge()
    parts = {}
    for path, host in hosts(model, name):
        if path in before:
            A, B = (t.detach().numpy() for t in host.lora(name).factors())
            product = B @ A * host.lora(name).scaling
            direction = before[path] + product
            is_dora = hasattr(host.lora(name), "magnitude")
            gain = (after[path] * direction).sum(1) / (direction**2).sum(1) if is_dora else np.ones(len(B))
            parts[path] = gain, gain[:, None] * product
    return parts


def numpy_trim(x: Array, density: float) -> Array:
    order = np.argsort(np.abs(x).ravel())[::-1][: int(np.ceil(density * x.size))]
    kept = np.zeros(x.size)
    kept[order] = x.ravel()[order]
    return kept.reshape(x.shape)


def numpy_ties(xs: list[Array], weights: list[float], density: float) -> Array:
    stack = np.stack([w * numpy_trim(x, density) for w, x in zip(weights, xs, strict=True)])
    sign = np.sign(stack.sum(0))
    agreeing = np.ma.masked_where((np.sign(stack) != sign) | (stack == 0), stack)
    return np.asarray(agreeing.mean(0).filled(0.0))


def numpy_prune(xs: list[Array], weights: list[float], density: float) -> Array:
    return sum((w * numpy_trim(x, density) for w, x in zip(weights, xs, strict=True)), np.zeros(xs[0].shape))


ORACLES: Mapping[str, Callable[[list[Array], list[float], float], Array]] = {
    "ties": numpy_ties,
    "magnitude_prune": numpy_prune,
}


# one adapter is itself


@pytest.mark.parametrize(
    ("variant", "method"), [*((v, m) for v in ("plain", "dora") for m in METHODS), *in_turn([*VARIANTS][3:])]
)
def test_combination_of_one_equals_it_and_its_head_bit_for_bit(variant: str, method: str) -> None:
    model = with_adapters(a=variant)
    before = answers(model)
    combine(model, ["a"], [1.0], "b", method=method, density=1.0)
    torch.testing.assert_close(answers(model), before, **CLOSE)
    for a, b in zip(*(model.classifier.adapters[name].parameters() for name in "ab"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("case", "method"), in_turn([(kind, dora) for kind in KINDS for dora in (False, True)]))
def test_combination_of_one_equals_it_in_every_kind_of_layer(case: tuple[str, bool], method: str) -> None:
    kind, dora = case
    model = mixed()
    add_adapter(model, LoraConfig(r=3, target_modules=(kind,), use_dora=dora), "a")
    before = fill(model, "a")(IDS)
    combine(model, ["a"], [1.0], "b", method=method, density=1.0)
    torch.testing.assert_close(model(IDS), before, **CLOSE)


@pytest.mark.parametrize(("method", "second"), [("ties", "dora"), ("dare_ties", "plain")])
def test_sign_election_of_two_equal_adapters_equals_each(method: str, second: str) -> None:
    model = with_adapters(a=second, b=second)
    with torch.no_grad():
        for (_, a), (_, b) in zip(*(adapter_parameters(model, n).items() for n in "ab"), strict=True):
            b.copy_(a)
    before = answers(model)
    combine(model, ["a", "b"], [1.0, 1.0], "c", method=method, density=1.0)
    torch.testing.assert_close(answers(model), before, **CLOSE)


# weighted sums


@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize(("first", "weights"), [("plain", (0.7, -0.4)), ("dora", (1.0, 1.0))])
def test_sum_equals_the_dense_sum(first: str, second: str, weights: tuple[float, float]) -> None:
    model = with_adapters(a=first, b=second)
    a, b = deltas(model, "a"), deltas(model, "b")
    made = combine(model, ["a", "b"], weights, "c")
    assert not any(made.errors.values())
    for path, delta in deltas(model, "c").items():
        torch.testing.assert_close(delta, weights[0] * a[path] + weights[1] * b[path], rtol=0, atol=1e-5)


def test_layer_that_one_adapter_alone_adapts_gets_its_share() -> None:
    model = small_bert()
    for name, targets, dora in (("a", ("query",), True), ("b", ("query", "value"), False)):
        add_adapter(model, LoraConfig(r=2, target_modules=targets, use_dora=dora), name)
        fill(model, name)
    b = deltas(model, "b")
    combine(model, ["a", "b"], [1.0, 0.5], "c")
    made = deltas(model, "c")
    assert made.keys() == b.keys()
    for path in b:
        if path.endswith("value"):
            torch.testing.assert_close(made[path], 0.5 * b[path], **CLOSE)


def test_heads_are_summed_as_differences_from_the_base() -> None:
    model = with_adapters(a="plain", b="dora")
    combine(model, ["a", "b"], [0.7, 0.2], "c")
    host = model.classifier
    parts = {name: host.adapters[name].weight for name in "abc"}
    base = host.base.weight
    torch.testing.assert_close(parts["c"], base + 0.7 * (parts["a"] - base) + 0.2 * (parts["b"] - base))


def test_same_adapter_twice_adds_its_weights() -> None:
    model = with_adapters(a="plain")
    combine(model, ["a", "a"], [0.25, 0.75], "b")
    assert combine(model, ["a"], [1.0], "c").r == len(next(h.lora("b").lora_A for _, h in hosts(model, "b")))
    set_adapter(model, "a")
    before = answers(model)
    set_adapter(model, "b")
    torch.testing.assert_close(answers(model), before, **CLOSE)


def test_cut_rank_is_the_best_one_and_its_error_is_told() -> None:
    model = with_adapters(a="plain", b="rslora")
    a, b = deltas(model, "a"), deltas(model, "b")
    made = combine(model, ["a", "b"], [1.0, 1.0], "c", r=3)
    assert made.r == 3
    for path, delta in deltas(model, "c").items():
        U, S, Vh = np.linalg.svd((a[path] + b[path]).numpy())
        np.testing.assert_allclose(delta, U[:, :3] * S[:3] @ Vh[:3], rtol=0, atol=1e-5)
        assert made.errors[path] == pytest.approx(np.linalg.norm(S[3:]) / np.linalg.norm(S), abs=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.75, 0.5)])
def test_cut_sum_equals_peft_svd(weights: tuple[float, float], tmp_path: Path) -> None:
    model, config = small_bert(), LoraConfig(r=4, target_modules=("query", "dense"))
    for seed, name in enumerate("ab"):
        add_adapter(model, config, name, seed=seed)
        fill(model, name, seed=seed)
        save_adapter(model, tmp_path / name, config, name=name)
    theirs = PeftModel.from_pretrained(small_bert(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.add_weighted_adapter(["a", "b"], list(weights), "c", combination_type="svd", svd_rank=3)
    combine(model, ["a", "b"], weights, "c", r=3)
    for path, delta in deltas(model, "c").items():
        layer = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(delta, layer.get_delta_weight("c").detach(), rtol=0, atol=1e-5)


BIASED: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "dora bias": {"bias": "lora_only", "use_dora": True},
}


def with_biases(**variants: str) -> nn.Module:
    """Two linear layers, the second without a bias, and adapters that train biases or do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=variants.pop("last", "") != "bare"))
    for seed, (name, variant) in enumerate(variants.items()):
        add_adapter(model, LoraConfig(r=2, target_modules=("0", "1"), **BIASED[variant]), name, seed=seed)
        fill(model, name, seed=seed)
    return model


def shifts(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each layer's answer to zeros: the difference of the biases."""
    set_adapter(model, name)
    layers = [(path, h, torch.zeros(1, h.base.in_features)) for path, h in hosts(model) if isinstance(h, Layer)]
    return {path: (layer(zeros) - layer.base(zeros)).detach()[0] for path, layer, zeros in layers}


@pytest.mark.parametrize("last", ["biased", "bare"])
@pytest.mark.parametrize("second", BIASED)
def test_biases_are_summed_with_the_weights(second: str, last: str) -> None:
    model = with_biases(last=last, a="lora_bias", b=second)
    if second == "dora bias" and last == "bare":
        with pytest.raises(ConfigError, match="lora_bias = true cannot be used with DoRA"):
            combine(model, ["a", "b"], [0.7, -0.4], "c")
        assert adapter_names(model) == ["a", "b"]
        return
    combine(model, ["a", "b"], [0.7, -0.4], "c")
    a, b, made = (shifts(model, name) for name in "abc")
    for path, shift in made.items():
        torch.testing.assert_close(shift, 0.7 * a[path] - 0.4 * b[path], **CLOSE)


PLACES: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all"},
    "all biases, dora": {"bias": "all", "use_dora": True},
    "both biases": {"bias": "lora_only", "lora_bias": True},
    "rows": {"trainable_token_indices": (7, 3)},
    "tied rows": {"trainable_token_indices": (7, 3)},
    "attention": {},
}


def in_place(place: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A fresh model on which the settings of PLACES act, and what to ask of it."""
    if place == "attention":
        torch.manual_seed(0)
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
        return model, lambda m: m["attn"](x, x, x)[0].detach()
    if place == "tied rows":
        model = tiny_t5(num_layers=1)
        return model, lambda m: logits(m, tiny_batch(model))
    return small_bert(), answers


def placed(place: str, model: nn.Module, *names: str) -> None:
    targets = {"attention": ("attn",), "tied rows": ("q", "v")}.get(place, ("query", "value"))
    config = LoraConfig(r=2, target_modules=targets, **PLACES[place])
    for seed, name in enumerate(names):
        add_adapter(model, config, name, seed=seed)
        fill(model, name, seed=seed)


@pytest.mark.parametrize(("place", "method"), in_turn([*PLACES]))
def test_combination_of_one_in_other_places_equals_it_and_is_saved(place: str, method: str, tmp_path: Path) -> None:
    model, ask = in_place(place)
    placed(place, model, "a")
    before = ask(model)
    made = combine(model, ["a"], [1.0], "b", method=method, density=1.0)
    torch.testing.assert_close(ask(model), before, **CLOSE)
    save_adapter(model, tmp_path, made.config, name="b")
    again, _ = in_place(place)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(ask(again), before, **CLOSE)


@pytest.mark.parametrize("place", PLACES)
def test_other_places_are_summed_with_the_weights(place: str) -> None:
    model, _ = in_place(place)
    placed(place, model, "a", "b")
    combine(model, ["a", "b"], [0.7, -0.4], "c")
    plain = {key: tensor.clone() for key, tensor in in_place(place)[0].state_dict().items()}
    merged = {}
    for name in "abc":
        merge(model, name)
        state = {k.replace(".base.", "."): v.clone() for k, v in model.state_dict().items() if ".adapters." not in k}
        merged[name] = {key: state[key] for key in plain}
        unmerge(model)
    for key, tensor in plain.items():
        want = tensor + 0.7 * (merged["a"][key] - tensor) - 0.4 * (merged["b"][key] - tensor)
        torch.testing.assert_close(merged["c"][key], want, rtol=0, atol=1e-5)
    assert any(not torch.equal(merged["c"][key], tensor) for key, tensor in plain.items())


def test_rows_that_one_adapter_leaves_alone_get_the_share_of_the_other() -> None:
    model = small_bert()
    for name, rows in (("a", (7, 3)), ("b", (3, 9, 1))):
        add_adapter(model, LoraConfig(r=2, target_modules=("query",), trainable_token_indices=rows), name)
        fill(model, name)
    combine(model, ["a", "b"], [0.5, 2.0], "c")
    host = model.bert.embeddings.word_embeddings
    rows = {
        name: dict(zip(host.trained(name).indices.tolist(), host.trained(name).rows, strict=True)) for name in "abc"
    }
    assert list(rows["c"]) == [7, 3, 9, 1]
    for i, row in rows["c"].items():
        base = host.base.weight[i]
        want = base + 0.5 * (rows["a"].get(i, base) - base) + 2 * (rows["b"].get(i, base) - base)
        torch.testing.assert_close(row, want, **CLOSE)


# TIES and DARE


@pytest.mark.parametrize(
    ("second", "density", "weights"),
    [("plain", 1.0, (1.0, 1.0)), ("small", 0.3, (0.7, -0.4)), ("dora", 0.3, (0.7, -0.4)), ("dora", 1.0, (1.0, 1.0))],
)
@pytest.mark.parametrize("method", ORACLES)
def test_pruned_equals_numpy(method: str, second: str, density: float, weights: tuple[float, float]) -> None:
    model = with_adapters(a="plain", b=second)
    a, b = dense_parts(model, "a"), dense_parts(model, "b")
    made = combine(model, ["a", "b"], weights, "c", method=method, density=density, r=FULL)
    assert all(error < 1e-5 for error in made.errors.values())
    for path, (gain, P) in dense_parts(model, "c").items():
        want_gain, want_P = (
            ORACLES[method]([a[path][i] - 1 + i, b[path][i] - 1 + i], list(weights), density) for i in (0, 1)
        )
        np.testing.assert_allclose(gain, 1 + want_gain, rtol=0, atol=5e-5)
        np.testing.assert_allclose(P, want_P, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", ORACLES)
def test_pruned_heads_equal_numpy(method: str) -> None:
    model = with_adapters(a="plain", b="dora")
    combine(model, ["a", "b"], [1.0, 0.5], "c", method=method, density=0.4)
    host = model.classifier
    base = host.base.weight.detach().numpy()
    a, b, made = (host.adapters[name].weight.detach().numpy() for name in "abc")
    np.testing.assert_allclose(made, base + ORACLES[method]([a - base, b - base], [1.0, 0.5], 0.4), atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_pruned_sum_is_cut_to_the_ranks_together_and_its_error_is_told(method: str) -> None:
    model = with_adapters(a="plain", b="small")
    exact = combine(model, ["a", "b"], [1.0, 1.0], "full", method=method, density=0.5, r=FULL)
    made = combine(model, ["a", "b"], [1.0, 1.0], "c", method=method, density=0.5)
    full, cut = deltas(model, "full"), deltas(model, "c")
    assert (exact.r, made.r) == (FULL, 4 + 2)
    for path, error in made.errors.items():
        assert error == pytest.approx(float((full[path] - cut[path]).norm() / full[path].norm()), abs=1e-4)
        S = np.linalg.svd(full[path].numpy(), compute_uv=False)
        assert error == pytest.approx(np.linalg.norm(S[6:]) / np.linalg.norm(S), abs=1e-4)


def one_layer() -> nn.Module:
    """One linear layer with two adapters, small enough to be combined hundreds of times."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12))
    for seed, name in enumerate("ab"):
        add_adapter(model, LoraConfig(r=2, target_modules=("0",)), name, seed=seed)
        fill(model, name, seed=seed)
    return model


def test_dare_keeps_or_drops_each_entry_and_rescales() -> None:
    model, density = one_layer(), 0.4
    combine(model, ["a"], [1.0], "c", method="dare", density=density, r=10)
    ratio = deltas(model, "c")["0"] / deltas(model, "a")["0"]
    kept = ratio.abs() > 0.5
    torch.testing.assert_close(ratio, kept / density, rtol=0, atol=1e-3)
    assert 0 < kept.float().mean() < 1


def test_dare_is_the_weighted_sum_on_average() -> None:
    model, density, draws, weights = one_layer(), 0.5, 60, (0.7, -0.4)
    a, b = deltas(model, "a")["0"], deltas(model, "b")["0"]
    mean = torch.zeros_like(a)
    for seed in range(draws):
        combine(model, ["a", "b"], weights, "c", method="dare", density=density, r=10, seed=seed)
        mean += deltas(model, "c")["0"] / draws
        delete_adapter(model, "c")
    # an entry x that is kept with probability d and divided by d has the variance x^2 (1 - d) / d
    spread = ((weights[0] * a).square() + (weights[1] * b).square()).sum().mul((1 - density) / density / draws).sqrt()
    off = (mean - weights[0] * a - weights[1] * b).norm()
    assert 0.7 * spread < off < 1.3 * spread


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_draws_depend_on_the_seed_and_not_on_the_order(method: str) -> None:
    model = one_layer()
    how: dict[str, Any] = {"method": method, "density": 0.5, "r": 10}
    combine(model, ["a", "b"], [1.0, 0.5], "first", **how, seed=1)
    combine(model, ["b", "a"], [0.5, 1.0], "turned", **how, seed=1)
    combine(model, ["a", "b"], [1.0, 0.5], "other", **how, seed=2)
    first, turned, other = (deltas(model, name)["0"] for name in ("first", "turned", "other"))
    torch.testing.assert_close(first, turned, **CLOSE)
    assert not torch.allclose(first, other, atol=1e-3)


def test_two_adapters_are_pruned_by_draws_of_their_own() -> None:
    model = one_layer()
    for name, made in (("a", "c"), ("b", "d")):
        combine(model, [name], [1.0], made, method="dare", density=0.5, r=10)
    dropped = [deltas(model, made)["0"].abs() < 1e-6 for made in ("c", "d")]
    assert not torch.equal(*dropped)


# what it leaves


def test_gradients_reach_the_combined_adapter() -> None:
    model = with_adapters(a="plain", b="dora")
    combine(model, ["a", "b"], [0.5, 0.5], "c")
    model(**tiny_batch(model)).logits.sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "c").values())
    assert all(p.grad is None for p in adapter_parameters(model, "a").values())


@pytest.mark.parametrize(("second", "method"), in_turn([*VARIANTS], "linear", "ties"))
def test_combination_is_saved_with_the_settings_it_gives(second: str, method: str, tmp_path: Path) -> None:
    model = with_adapters(a="plain", b=second)
    density = None if method == "linear" else 0.5
    made = combine(model, ["a", "b"], [0.6, 0.5], "c", method=method, density=density)
    save_adapter(model, tmp_path, made.config, name="c")
    again = small_bert()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(answers(again), answers(model), **CLOSE)
    theirs = PeftModel.from_pretrained(small_bert(), tmp_path).eval()
    torch.testing.assert_close(answers(theirs), answers(model), rtol=0, atol=1e-5)


def test_combination_of_other_layers_and_variants_is_saved(tmp_path: Path) -> None:
    """Ranks differ by layer, one layer has DoRA and another not, and a target's path is the end of another's."""
    model = nn.ModuleDict({"fc": nn.Linear(6, 5), "block": nn.ModuleDict({"fc": nn.Linear(7, 8)})})
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = nn.ModuleDict({"fc": nn.Linear(6, 5), "block": nn.ModuleDict({"fc": nn.Linear(7, 8)})})
    other.load_state_dict(plain)
    add_adapter(model, LoraConfig(r=2, target_modules=("fc",), use_dora=True), "a")
    add_adapter(model, LoraConfig(r=3, target_modules=("fc",), exclude_modules=("block.fc",)), "b")
    for name in "ab":
        fill(model, name)
    for names in (["a", "b"], ["b"]):
        made = combine(model, names, [0.5] * len(names), "c")
        save_adapter(model, tmp_path, made.config, name="c")
        load_adapter(other, tmp_path)
        for path, delta in deltas(model, "c").items():
            torch.testing.assert_close(deltas(other, "default")[path], delta, **CLOSE)
        delete_adapter(model, "c")
        delete_adapter(other, "default")


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "numbers differ": ((["a", "b"], [1.0], "c"), {}, "2 adapters but 1 weights"),
    "no adapter": (([], [], "c"), {}, "0 adapters"),
    "not finite": ((["a"], [float("nan")], "c"), {}, "weight of 'a' is nan"),
    "name taken": ((["a"], [1.0], "b"), {}, "'b' exists already"),
    "gain turned": ((["b"], [-50.0], "c"), {}, "DoRA magnitude"),
    "unknown method": ((["a"], [1.0], "c"), {"method": "tise"}, "'tise' is not known; did you mean 'ties'"),
    "no density": ((["a"], [1.0], "c"), {"method": "ties"}, "density = None: method 'ties' needs the share"),
    "density 0": ((["a"], [1.0], "c"), {"method": "dare", "density": 0.0}, "above 0 and at most 1"),
    "density 2": ((["a"], [1.0], "c"), {"method": "dare", "density": 2.0}, "above 0 and at most 1"),
    "density nan": ((["a"], [1.0], "c"), {"method": "dare", "density": float("nan")}, "above 0 and at most 1"),
    "density of a sum": ((["a"], [1.0], "c"), {"density": 0.5}, "has no effect with method 'linear'"),
    "rank 0": ((["a"], [1.0], "c"), {"r": 0}, "r = 0: a rank is a whole number from 1"),
}


@pytest.mark.parametrize(("call", "how", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_combination_changes_nothing(call: tuple[Any, ...], how: dict[str, Any], message: str) -> None:
    model = with_adapters(a="plain", b="dora")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        combine(model, *call, **how)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_unknown_and_merged_adapters_are_refused() -> None:
    model = with_adapters(first="plain")
    with pytest.raises(AdapterError, match="no adapter 'frist' in this model; did you mean 'first'"):
        combine(model, ["frist"], [1.0], "c")
    merge(model, "first")
    with pytest.raises(AdapterError, match="'first' is merged"):
        combine(model, ["first"], [1.0], "c")


def test_heads_of_other_shapes_are_refused() -> None:
    model = with_adapters(a="plain", b="plain")
    model.classifier.adapters["b"] = nn.Linear(model.classifier.base.in_features, 7)
    with pytest.raises(ConfigError, match="different shapes"):
        combine(model, ["a", "b"], [0.5, 0.5], "c")


def test_heads_with_other_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    for name in "ab":
        add_adapter(model, LoraConfig(r=2, target_modules=("0",), modules_to_save=("1",)), name)
    combine(model, ["a", "b"], [0.5, 0.5], "c")
    set_adapter(model, "b")
    model.train()(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ConfigError, match="running_mean differs"):
        combine(model, ["a", "b"], [0.5, 0.5], "d")
