"""Quantised linear layers: the codes are right, a layer acts as the dense one they stand for, and LoRA over it is LoRA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.stats import norm
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.errors import ConfigError, ModelError
from lorakit.lora import (
    LoraConfig,
    LoRALinear,
    adapter_parameters,
    add_adapter,
    count_parameters,
    dequantize,
    hosts,
    load_adapter,
    loftq,
    merge,
    merge_and_unload,
    quantize,
    save_adapter,
    unmerge,
)
from lorakit.lora.quantization import FORMATS, NF4_BLOCK, NF4_LEVELS, QuantizedTensor
from tests.lora.oracle import CLOSE, assert_same_tensors, fill
from tests.tiny import logits, tiny, tiny_batch, tiny_bert, tiny_distilbert, tiny_gpt2, tiny_roberta, tiny_t5

SHAPES = [(1, 1), (8, NF4_BLOCK), (32, 48), (7, 3 * NF4_BLOCK + 2)]
formats = pytest.mark.parametrize("format", FORMATS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def codes(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is kept of the quantised weights."""
    kept = {}
    for name, weight in quantized_weights(model).items():
        kept |= {f"{name}.codes": weight.codes.clone(), f"{name}.scales": weight.scales.clone()}
    return kept


# The codes


@shapes
def test_int8_is_within_half_a_step_of_each_value(shape: tuple[int, int]) -> None:
    weight = QuantizedTensor.of(matrix(shape), "int8")
    rounding = torch.finfo(torch.float32).eps * matrix(shape).abs().max()
    assert ((weight.dequantize() - matrix(shape)).abs() <= weight.scales / 2 + rounding).all()
    assert torch.equal(weight.scales, matrix(shape).abs().amax(1, keepdim=True) / 127)
    assert torch.equal(weight.codes.abs().amax(1), torch.full((shape[0],), 127, dtype=torch.int8))


@shapes
def test_nf4_takes_the_nearest_level_of_each_value(shape: tuple[int, int]) -> None:
    values = matrix(shape).flatten()
    scales = torch.cat([block.abs().max().expand(len(block)) for block in values.split(NF4_BLOCK)])
    nearest = torch.tensor(NF4_LEVELS)[((values / scales)[:, None] - torch.tensor(NF4_LEVELS)).abs().argmin(1)]
    have = QuantizedTensor.of(matrix(shape), "nf4").dequantize()
    torch.testing.assert_close(have, (nearest * scales).view(shape), rtol=0, atol=0)


def test_nf4_levels_are_the_quantiles_of_the_normal_distribution() -> None:
    """Quantiles evenly spaced in probability, eight above zero and seven below, between which zero stands."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above = norm.ppf([outermost + (0.5 - outermost) * i / 8 for i in range(8)])
    below = norm.ppf([outermost + (0.5 - outermost) * i / 7 for i in range(7)])
    want = [*(-below / above[0]), 0.0, *reversed(above / above[0])]
    assert pytest.approx(want, abs=1e-6) == NF4_LEVELS


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, at import
@shapes
def test_nf4_equals_bitsandbytes(shape: tuple[int, int]) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes, an oracle alone, is not installed")
    packed, state = theirs.quantize_4bit(matrix(shape), blocksize=NF4_BLOCK, quant_type="nf4")
    ours = QuantizedTensor.of(matrix(shape), "nf4")
    assert torch.equal(ours.codes.flatten()[: packed.numel()], packed.flatten())
    assert torch.equal(ours.scales.flatten(), state.absmax.flatten())
    if shape[1] % NF4_BLOCK == 0:  # for rows of 48, its kernel for CPUs (0.50.2) takes scales from the wrong blocks
        torch.testing.assert_close(ours.dequantize(), theirs.dequantize_4bit(packed, state), **CLOSE)


@formats
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e30])
def test_rows_of_zeros_and_of_extreme_values_stay_finite(format: str, value: float) -> None:
    weight = torch.full((2, NF4_BLOCK), value)
    weight[1] = matrix((NF4_BLOCK,))
    back = QuantizedTensor.of(weight, format).dequantize()
    assert back.isfinite().all()
    torch.testing.assert_close(back[0], weight[0], rtol=1e-6, atol=1e-38)


# A layer over them

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(48, 32),
    "linear without bias": lambda: nn.Linear(48, 32, bias=False),
    "gpt2's conv1d": lambda: Conv1D(32, 48),
}
layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def pair(build: Callable[[], nn.Module], format: str) -> tuple[nn.Module, nn.Module]:
    """A model of one layer in codes, and the plain layer whose weight is what the codes stand for."""
    torch.manual_seed(0)
    model = nn.Sequential(build())
    if isinstance(getattr(model[0], "bias", None), nn.Parameter):
        nn.init.normal_(model[0].bias)
    quantize(model, format)
    dense = build().requires_grad_(False)
    dense.weight.copy_(model[0].weight.dequantize())
    if getattr(dense, "bias", None) is not None:
        dense.bias.copy_(model[0].bias.detach())
    return model[0], dense


@formats
@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_equals_the_dense_one_forward_and_backward_and_keeps_its_codes_alone(
    build: Callable[[], nn.Module], format: str, dtype: torch.dtype
) -> None:
    layer, dense = (module.to(dtype) for module in pair(build, format))
    for rows in [(5,), (2, 3, 5)] if isinstance(dense, Conv1D) else [(), (5,), (2, 3, 5)]:
        x = matrix((*rows, 48)).to(dtype).requires_grad_()
        want, saved = dense(x), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            have = layer(x)
        assert type(have) is Tensor
        assert torch.equal(have, want)
        upstream = matrix(tuple(want.shape), seed=1).to(dtype)
        assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (have, want)))
        with torch.inference_mode():
            assert torch.equal(layer(x), want)
        assert [type(tensor) for tensor in saved] == [QuantizedTensor]
        assert saved[0].codes.data_ptr() == layer.weight.codes.data_ptr()


@formats
def test_weight_stays_quantised_where_models_are_moved_and_copied(format: str) -> None:
    layer, dense = pair(LAYERS["linear"], format)
    for changed in (
        copy.deepcopy(layer),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).double(),
        copy.deepcopy(layer).to("meta"),
    ):
        weight = changed.weight
        assert isinstance(weight, QuantizedTensor) and isinstance(weight, nn.Parameter)
        assert not weight.requires_grad
        assert (weight.dtype, weight.device) == (changed.bias.dtype, changed.bias.device)
        assert weight.codes.dtype == layer.weight.codes.dtype
        assert weight.scales.dtype == torch.float32
        if weight.device.type != "meta":
            assert torch.equal(weight.dequantize(), dense.weight.to(weight.dtype))
            assert weight.codes.data_ptr() != layer.weight.codes.data_ptr()


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_can_be_looked_at_in_inference_mode(format: str, dtype: torch.dtype) -> None:
    layer, _ = pair(LAYERS["linear"], format)
    layer.to(dtype)
    want = layer.weight.dequantize().float().sum(1)
    with torch.inference_mode():
        have = layer.weight.detach().float().sum(1)
        assert torch.equal(layer.weight.T.clone().float().sum(0), have)
    close = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]  # cast back, it is what it was before it was cast
    torch.testing.assert_close(have, want, rtol=0, atol=close)


@formats
@layers
def test_every_other_operation_sees_the_dense_matrix(build: Callable[[], nn.Module], format: str) -> None:
    layer, dense = pair(build, format)
    weight, want = layer.weight, dense.weight
    assert weight.shape == want.shape and weight.numel() == want.numel()
    for operation in (
        lambda w: w + 1,
        lambda w: w.T,
        lambda w: w.T.T,
        lambda w: w.permute(-2, -1),
        lambda w: w.mT @ w,
        lambda w: w[1:3].sum(0),
        lambda w: w.int(),
        lambda w: w.double() * 2,
        torch.linalg.svdvals,
        lambda w: F.embedding(torch.tensor([1, 2]), w),
    ):
        have = operation(weight)
        have = have.dequantize() if isinstance(have, QuantizedTensor) else have
        torch.testing.assert_close(have, operation(want))
    assert format in repr(weight)


@formats
def test_writing_into_a_quantised_weight_is_refused(format: str, tmp_path: Path) -> None:
    layer, dense = pair(LAYERS["linear"], format)
    for write in (lambda w: w.zero_(), lambda w: w.add_(1), lambda w: w.copy_(dense.weight)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="a quantised weight is frozen"):
            write(layer.weight)
    with pytest.raises((RuntimeError, UserWarning)):  # there is no storage to write to a file
        save_file({"weight": layer.weight}, tmp_path / "model.safetensors")


# A model of them


def tiny_albert() -> PreTrainedModel:
    """ALBERT, whose blocks are one module."""
    return tiny("AlbertForSequenceClassification")


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...]]] = {
    "bert": (tiny_bert, ("classifier",)),
    "roberta": (tiny_roberta, ("classifier",)),
    "distilbert": (tiny_distilbert, ("pre_classifier", "classifier")),
    "t5": (tiny_t5, ()),
    "albert": (tiny_albert, ("classifier",)),
    "gpt2": (tiny_gpt2, ()),
}


@pytest.mark.parametrize(
    ("family", "format"), [*((family, "int8") for family in MODELS), ("bert", "nf4"), ("gpt2", "nf4")]
)
def test_quantize_takes_the_linear_layers_that_stay_frozen(family: str, format: str) -> None:
    build, head = MODELS[family]
    model, plain = build(), build()
    paths = quantize(model, format, skip=head)
    linear = {path for path, module in plain.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    heads = {path for path in linear if path.split(".")[0] in (*head, "lm_head")}
    assert {*paths} >= linear - heads
    assert quantized_weights(model).keys() == {f"{path}.weight" for path in linear - heads}
    for name, weight in plain.named_parameters():
        if name not in quantized_weights(model):
            assert torch.equal(model.get_parameter(name), weight), name
    batch = tiny_batch(model)
    have = logits(model, batch)
    assert torch.equal(have, logits(dequantize(model), batch))
    assert quantized_weights(model) == {}
    if format == "int8":
        torch.testing.assert_close(have, logits(plain, batch), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: quantize(m, "int9"), ConfigError, "quantize = 'int9' is not known; did you mean 'int8'"),
        (lambda m: quantize(m, "nf4", skip=["clasifier"]), ConfigError, "nothing matches 'clasifier'; did you mean"),
        (lambda m: quantize(m, "nf4", skip=["bert"]), ConfigError, "no layer is left"),
        (lambda m: (quantize(m, "nf4"), quantize(m, "int8")), ConfigError, r"query is quantised already; load"),
        (lambda m: (add_adapter(m, LoraConfig()), quantize(m, "nf4")), ConfigError, "has adapters already"),
        (
            lambda m: (quantize(m, "nf4"), add_adapter(m, LoraConfig(modules_to_save=("pooler",)))),
            ConfigError,
            "bert.pooler is quantised, so it cannot be trained; name it in quantize's skip",
        ),
    ],
)
def test_quantize_refuses_what_cannot_be_done(spoil: Callable[[nn.Module], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        spoil(tiny_bert())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_before_any_is_quantised(value: float) -> None:
    model = tiny_bert()
    last = model.bert.encoder.layer[-1].output.dense
    last.weight.data[0, 0] = value
    with pytest.raises(ModelError, match=r"layer\.2\.output\.dense\.weight holds NaN or infinite"):
        quantize(model, "int8")
    assert quantized_weights(model) == {}


# LoRA over it

variants = pytest.mark.parametrize(
    ("format", "settings"),
    [("nf4", {}), ("int8", {"use_dora": True}), ("nf4", {"init_lora_weights": "pissa"})],
    ids=str,
)


def quantized_and_dense(format: str, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A quantised BERT, and a plain one whose weights are what the codes stand for; each with the same adapter."""
    config = LoraConfig(**{"r": 4, "modules_to_save": ("classifier",), **settings})
    model, dense = tiny_bert(), tiny_bert()
    for each in (model, dense):
        quantize(each, format, skip=("classifier",))
    dequantize(dense)
    for each in (model, dense):
        add_adapter(each, config)
    return model, dense


@variants
def test_adapter_is_the_one_over_the_dense_base(format: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Its start, its gradients and its files; and it is read back over codes."""
    model, dense = quantized_and_dense(format, **settings)
    assert_same_tensors(adapter_parameters(model), adapter_parameters(dense))
    assert count_parameters(model) == count_parameters(dense)
    plain, batch = tiny_bert(), tiny_batch(model)
    quantize(plain, format, skip=("classifier",))
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), **CLOSE)
    found = []
    config = LoraConfig(r=4, modules_to_save=("classifier",), **settings)
    for name, each in (("quantised", model), ("dense", dense)):
        each(**batch, labels=torch.tensor([0, 1] * 3)).loss.backward()
        found.append({name: p.grad for name, p in fill(each).named_parameters() if p.grad is not None})
        save_adapter(each, tmp_path / name, config)
    assert found[0].keys() == found[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "quantised" / file).read_bytes() == (tmp_path / "dense" / file).read_bytes()
    load_adapter(plain, tmp_path / "quantised")
    torch.testing.assert_close(logits(plain, batch), logits(model, batch), **CLOSE)


@pytest.mark.parametrize(("format", "dora"), [("nf4", False), ("int8", True)])
def test_training_lowers_the_loss_and_leaves_the_codes(format: str, dora: bool) -> None:
    model = tiny_bert()
    quantize(model, format, skip=("classifier",))
    add_adapter(model, LoraConfig(r=4, modules_to_save=("classifier",), use_dora=dora))
    model.train()
    before, batch, labels = codes(model), tiny_batch(model), torch.tensor([0, 1] * 3)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=4e-3)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(**batch).logits, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert before
    assert_same_tensors(codes(model), before)
    assert all(weight.grad is None for weight in quantized_weights(model).values())


@variants
def test_merge_makes_the_dense_sum_and_unmerge_brings_the_codes_back(
    format: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, _ = quantized_and_dense(format, **settings)
    fill(model)
    weights, before = quantized_weights(model), logits(model, tiny_batch(model))
    wanted = {
        path: (host.base.weight.dequantize() + host.lora("default").delta_weight(host)).detach()
        for path, host in hosts(model)
        if isinstance(host, LoRALinear)
    }
    merge(model)
    assert quantized_weights(model) == {}
    have = {path: host.base.weight.detach() for path, host in hosts(model) if isinstance(host, LoRALinear)}
    torch.testing.assert_close(have, wanted, **CLOSE)
    torch.testing.assert_close(logits(model, tiny_batch(model)), before, rtol=0, atol=2e-6)
    unmerge(model)
    after = quantized_weights(model)
    assert after.keys() == weights.keys()
    assert all(after[name] is weight for name, weight in weights.items())
    assert torch.equal(logits(model, tiny_batch(model)), before)
    merge_and_unload(model).save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain, tiny_batch(plain)), before, rtol=0, atol=2e-6)


@formats
def test_codes_take_the_bytes_they_promise(format: str) -> None:
    """One byte a value and 4 a row for int8; half a byte, and 4 for 64 values, for NF4."""
    d_out, d_in = 16, 4 * NF4_BLOCK
    weight = QuantizedTensor.of(matrix((d_out, d_in)), format)
    want = {"int8": d_out * d_in + 4 * d_out, "nf4": d_out * d_in // 2 + 4 * d_out * d_in // NF4_BLOCK}
    assert weight.codes.nbytes + weight.scales.nbytes == want[format]


# LoftQ


def started_by_loftq(
    build: Callable[[], PreTrainedModel] = tiny_bert, format: str = "nf4", **settings: Any
) -> PreTrainedModel:
    model = build()
    original = model.state_dict()
    quantize(model, format)
    add_adapter(model, LoraConfig(**{"r": 4, **settings}))
    loftq(model, original)
    return model


@pytest.mark.parametrize(
    ("build", "format", "settings"),
    [
        (tiny_bert, "nf4", {}),
        (tiny_bert, "int8", {"use_dora": True}),
        (tiny_gpt2, "nf4", {"use_rslora": True}),
        (tiny_gpt2, "int8", {}),
    ],
)
def test_loftq_starts_at_the_best_approximation_of_what_was_lost(
    build: Callable[[], PreTrainedModel], format: str, settings: dict[str, Any]
) -> None:
    """Eckart-Young: what the best update of rank r leaves of a matrix are its other singular values."""
    plain, model = build(), started_by_loftq(build, format, **settings)
    for path, host in hosts(model):
        original = host.geometry.matrix(plain.get_submodule(path)).detach()
        rest = torch.linalg.svdvals(original - host.matrix().dequantize())[4:]
        left = original - host.matrix() - host.lora("default").delta_weight(host)
        torch.testing.assert_close(left.norm(), rest.norm(), rtol=1e-4, atol=0)


def test_loftq_adapter_is_read_back_over_the_quantised_base(tmp_path: Path) -> None:
    model = fill(started_by_loftq())
    save_adapter(model, tmp_path, LoraConfig(r=4))
    again = tiny_bert()
    quantize(again, "nf4")
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again, tiny_batch(again)), logits(model, tiny_batch(model)), **CLOSE)


def test_loftq_needs_a_quantised_base_and_its_original_weights() -> None:
    model = tiny_bert()
    original = model.state_dict()
    add_adapter(model, LoraConfig(r=4))
    with pytest.raises(ConfigError, match="'default' has no layer with a quantised weight; quantize the model first"):
        loftq(model, original)
    with pytest.raises(ConfigError, match="needs update = 'lora' or 'dora' and init_lora_weights = 'kaiming'"):
        started_by_loftq(init_lora_weights="pissa")
    with pytest.raises(ConfigError, match=r"no original weight '.*query\.weight'; did you mean"):
        started = started_by_loftq()
        loftq(started, {f"model.{name}": weight for name, weight in original.items()})
