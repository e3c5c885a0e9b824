"""Every fast part against the plain modules: the same logits, the same gradients, in each supported family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.lora import Layer, LoraConfig, add_adapter, hosts, merge, quantize, routed
from lorakit.lora.fused_linear import Update, adapted_linear
from lorakit.lora.speedups import fuse, read_first_row
from lorakit.lora.updates import UPDATES
from tests.lora.oracle import fill
from tests.tiny import randomized, tiny, tiny_batch

LOGITS, GRADIENTS = 1e-5, 1e-4  # absolute; relative to the largest gradient of a tensor
CLASSIFIERS = ["Bert", "Roberta", "DistilBert", "ModernBert"]
BERT = "BertForSequenceClassification"
PARTS: dict[str, Callable[[nn.Module], object]] = {"fuse": fuse, "read_first_row": read_first_row}


def adapted(architecture: str, **settings: object) -> nn.Module:
    """A tiny model with an adapter on all linear layers whose B is not zero."""
    model = tiny(architecture)
    add_adapter(model, LoraConfig(r=3, lora_alpha=5, **settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def answered(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a batch with padding, and the gradients of a loss that weighs all of them."""
    batch = tiny_batch(model)
    logits: Tensor = model(**batch).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(plain: nn.Module, fast: nn.Module) -> None:
    logits, gradients = answered(plain)
    fast_logits, fast_gradients = answered(fast)
    assert (logits - fast_logits).abs().max() <= LOGITS
    assert gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - fast_gradients[name]).abs().max() <= GRADIENTS * gradient.abs().max(), name


@pytest.mark.parametrize("parts", [("fuse",), ("read_first_row",), ("fuse", "read_first_row")], ids="+".join)
@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_every_part_leaves_logits_and_gradients(architecture: str, parts: tuple[str, ...]) -> None:
    plain = adapted(f"{architecture}ForSequenceClassification")
    fast = copy.deepcopy(plain)
    for part in parts:
        assert PARTS[part](fast)
    assert_same(plain, fast)


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"update": "lora_fa"}], ids=str)
def test_fused_layers_of_t5_answer_as_plain_ones(settings: dict[str, object]) -> None:
    plain = adapted("T5ForConditionalGeneration", **settings)
    fast = copy.deepcopy(plain)
    assert fuse(fast)
    assert_same(plain, fast)


def test_adapted_linear_is_differentiated_right() -> None:
    generator = torch.Generator().manual_seed(0)
    x, W, b, A, B = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for tensor in (x, A, B):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, A, B: adapted_linear(x, W, b, [Update(len(x), A, B, 0.7)]), (x, A, B))
    torch.testing.assert_close(adapted_linear(x, W, b, [Update(len(x), A, B, 0.7)]), x @ (W + 0.7 * B @ A).T + b)


def test_updates_of_neighbours_are_differentiated_right() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    x, W = draw(8, 3, 5), draw(4, 5)
    sizes, ranks, scalings = (2, 2, 1, 2, 1), (2, 2, 2, 3, None), (0.7, 0.7, 0.7, 0.5, 1.0)  # alike are the first two
    factors = [draw(shape) for r in ranks if r for shape in ((r, 5), (4, r))]

    def updates(factors: Sequence[Tensor]) -> list[Update]:
        pairs = [*zip(factors[::2], factors[1::2], strict=True), (None, None)]
        return [Update(n, A, B, s) for n, (A, B), s in zip(sizes, pairs, scalings, strict=True)]

    inputs = [tensor.requires_grad_() for tensor in (x, *factors)]
    assert torch.autograd.gradcheck(lambda x, *factors: adapted_linear(x, W, None, updates(factors)), inputs)
    rows = x.split(sizes)
    dense = [W if A is None else W + s * B @ A for _, A, B, s in updates(factors)]
    wanted = torch.cat([part @ weight.T for part, weight in zip(rows, dense, strict=True)])
    torch.testing.assert_close(adapted_linear(x, W, None, updates(factors)), wanted)


def test_nothing_is_kept_for_factors_that_are_not_trained() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    A, B = torch.randn(2, 5), torch.randn(4, 2, requires_grad=True)
    y = adapted_linear(x, torch.randn(4, 5), None, [Update(len(x), A, B)])
    function = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert [saved.shape for saved in function.saved_tensors if saved is not None] != []  # type: ignore[union-attr]
    assert not any(saved is not None and saved.shape == x.shape for saved in function.saved_tensors)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"bias": "lora_only"}], ids=str
)
def test_what_adds_more_than_a_product_takes_the_plain_way(settings: dict[str, object]) -> None:
    plain = adapted(BERT, **settings).train()
    fast = copy.deepcopy(plain)
    fuse(fast)
    answers = []
    for model in (plain, fast):
        torch.manual_seed(0)  # dropout
        answers.append(answered(model)[0])
    assert torch.equal(*answers)


def test_a_mixed_batch_is_fused_and_the_base_and_a_merged_adapter_are_left_alone() -> None:
    plain = adapted(BERT)
    fast = copy.deepcopy(plain)
    fuse(fast)
    for model in (plain, fast):
        model.eval()
    batch = tiny_batch(plain)
    rows = len(batch["input_ids"])
    for segments in ([("default", 2), (None, rows - 2)], []):
        for model in (plain, fast):
            hosts(model)[0][1].routing.segments = list(segments)
        torch.testing.assert_close(plain(**batch).logits, fast(**batch).logits)
    for model in (plain, fast):
        hosts(model)[0][1].routing.use("default")
        merge(model, "default")
    assert torch.equal(plain(**batch).logits, fast(**batch).logits)


def test_layers_kept_as_codes_are_not_fused() -> None:
    model = tiny(BERT)
    quantize(model, "int8", skip=("classifier",))
    add_adapter(model, LoraConfig(r=2))
    assert fuse(model) == 0


def test_a_family_that_is_not_known_and_a_mean_over_tokens_are_left_alone() -> None:
    assert not read_first_row(tiny("DebertaV2ForSequenceClassification"))
    assert not read_first_row(tiny("ModernBertForSequenceClassification", classifier_pooling="mean"))


def test_the_last_block_computes_one_row() -> None:
    model = tiny(BERT)
    seen: list[int] = []
    for layer in (model.bert.encoder.layer[-2], model.bert.encoder.layer[-1]):  # type: ignore[union-attr]
        layer.intermediate.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    read_first_row(model)
    batch = tiny_batch(model)
    model(**batch)
    assert seen == [batch["input_ids"].shape[1], 1]


def test_every_adapted_linear_layer_is_fused() -> None:
    model = adapted(BERT)
    layers = [host for _, host in hosts(model) if isinstance(host, Layer)]
    assert fuse(model) == len(layers)
    assert all(layer.fused for layer in layers)


class InPlace(nn.Module):
    """Layers of several kinds, what each answers changed in place (as DeBERTa's and Longformer's attention do) or not."""

    in_place = True

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.flat = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.along, self.turned, self.head = nn.Conv1d(8, 6, 3, padding=1), Conv1D(4, 6), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.changed(self.tokens(ids))
        x = self.changed(self.up(x)).view(len(x), -1, 2, 4).permute(0, 2, 1, 3)
        x = self.changed(x).permute(0, 2, 1, 3).flatten(2)
        x = self.changed(self.flat(x.flatten(0, 1))).view_as(x)  # one row an example's token
        x = self.changed(self.along(x.mT)).mT.contiguous()
        return self.changed(self.head(self.changed(self.turned(x))))

    def changed(self, y: Tensor) -> Tensor:
        if not self.in_place:
            return (y + 1) / 2
        y += 1
        y /= 2
        return y


IN_PLACE = {
    **{
        f"{update}, {init}": {"update": update, "init_lora_weights": init}
        for update in UPDATES
        for init in ("kaiming", "pissa")
    },
    "dropout": {"lora_dropout": 0.3},
    "dora, dropout": {"lora_dropout": 0.3, "update": "dora"},
    "biases": {"bias": "all", "lora_bias": True},
    "dora, biases": {"bias": "lora_only", "update": "dora"},
    "a head and rows": {
        "target_modules": ("up", "flat"),
        "modules_to_save": ("head",),
        "trainable_token_indices": {"tokens": (1, 2)},
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", IN_PLACE.values(), ids=IN_PLACE)
def test_answers_may_be_changed_in_place(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Against autograd's own way, where nothing is: loss and gradients, plain and fused, one adapter and several a batch."""
    every = tuple(name for name, _ in InPlace().named_children())
    wanted: list[dict[str, Tensor]] = []
    for in_place, fused in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = randomized(InPlace()).to(dtype)
        for name in ("a", "b"):
            add_adapter(model, LoraConfig(**{"r": 2, "target_modules": every, **settings}), name)
            fill(model, name)
        for _, host in hosts(model):
            host.adapters.requires_grad_(True)
        assert not fused or fuse(model)
        model.in_place = in_place
        ids = torch.tensor([[1, 2, 3, 8], [4, 1, 6, 7]])
        for i, segments in enumerate(([("b", 0)], [("a", 1), ("b", 1)], [(None, 1), ("a", 1)])):
            if segments[-1][1] and "flat" in every:
                ids = ids[:, :1]  # so that a row is an example
            model.zero_grad()
            torch.manual_seed(1)
            with routed(model, segments):
                loss = (model(ids).float() ** 2).sum()
            loss.backward()
            got = {"loss": loss.detach(), **{key: p.grad for key, p in model.named_parameters() if p.grad is not None}}
            if not in_place:
                wanted.append(got)
                continue
            assert got.keys() == wanted[i].keys()
            for key, value in wanted[i].items():
                near = 1e-5 if dtype == torch.float32 else 5e-2
                assert (got[key] - value).abs().max() <= near * value.abs().max().clamp_min(1), key
