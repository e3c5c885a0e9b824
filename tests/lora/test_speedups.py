"""Every fast part against the plain modules: the same logits, the same gradients, in each supported family."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.lora import Layer, LoraConfig, Prefix, add_adapter, frozen_blocks, hosts, merge, quantize, routed
from lorakit.lora.fused_linear import Update, adapted_linear, rescale
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


def answered(model: nn.Module, batch: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a batch with padding, and the gradients of a loss that weighs all of them."""
    logits: Tensor = model(**(batch or tiny_batch(model))).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(plain: nn.Module, fast: nn.Module, batch: dict[str, Tensor] | None = None) -> None:
    logits, gradients = answered(plain, batch)
    fast_logits, fast_gradients = answered(fast, batch)
    assert (logits - fast_logits).abs().max() <= LOGITS
    assert gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - fast_gradients[name]).abs().max() <= GRADIENTS * gradient.abs().max(), name


@pytest.mark.parametrize(
    ("architecture", "parts"),
    [("Bert", ("fuse",)), ("Bert", ("read_first_row",)), *((name, tuple(PARTS)) for name in CLASSIFIERS)],
)
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
    assert not read_first_row(tiny("AlbertForSequenceClassification"))
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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            (name, torch.float32)
            for name in IN_PLACE
            if name not in ("lora_fa, pissa", "vera, pissa", "adalora, pissa")
        ),
        ("dora, kaiming", torch.bfloat16),
    ],
    ids=str,
)
def test_answers_may_be_changed_in_place(name: str, dtype: torch.dtype) -> None:
    """Against autograd's own way, where nothing is: loss and gradients, plain and fused, one adapter and several a batch."""
    settings = IN_PLACE[name]
    every = tuple(name for name, _ in InPlace().named_children())
    wanted: list[dict[str, Tensor]] = []
    for in_place, fused in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = randomized(InPlace()).to(dtype)
        for adapter in ("a", "b"):
            add_adapter(model, LoraConfig(**{"r": 2, "target_modules": every, **settings}), adapter)
            fill(model, adapter)
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


# Blocks below the adapters that are computed once


def upper_half(architecture: str) -> nn.Module:
    """A tiny model whose last block alone is adapted, B not zero."""
    blocks = tiny(f"{architecture}ForSequenceClassification").config.num_hidden_layers
    return adapted(f"{architecture}ForSequenceClassification", layers_to_transform=(blocks - 1,))


def kept(model: nn.Module) -> Prefix:
    """The first blocks of the model, filled with the rows of the tiny batch in two other batches."""
    batch = tiny_batch(model)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, None))]
    prefix = Prefix(model, frozen_blocks(model))
    prefix.fill(parts, int(batch["attention_mask"].sum()))
    return prefix


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_answers_and_gradients_are_those_of_the_whole_model(architecture: str) -> None:
    plain = upper_half(architecture)
    fast = copy.deepcopy(plain)
    fuse(fast)
    read_first_row(fast)
    prefix = kept(fast)
    assert prefix.depth == plain.config.num_hidden_layers - 1  # type: ignore[union-attr, operator]
    calls = counted(frozen_blocks(fast)[0])
    batch = tiny_batch(plain)
    shuffled = {key: value.flip(0) for key, value in batch.items()}
    assert_same(plain, fast, shuffled)
    assert calls == []


def counted(block: nn.Module) -> list[int]:
    """Grows with every time the block's first linear layer computes."""
    calls: list[int] = []
    linear = next(m for m in block.modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_text_that_is_not_kept_is_computed() -> None:
    model = upper_half("Bert")
    plain = copy.deepcopy(model)
    kept(model)
    calls = counted(frozen_blocks(model)[0])
    other = tiny_batch(model, seed=5)
    assert torch.equal(model(**other).logits, plain(**other).logits)
    assert calls == [1]


def test_with_a_head_alone_all_blocks_are_kept_as_one_row() -> None:
    model = tiny("BertForSequenceClassification")
    plain = copy.deepcopy(model)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)  # type: ignore[union-attr, operator]
    read_first_row(model)
    prefix = kept(model)
    batch = tiny_batch(model)
    assert prefix.depth == model.config.num_hidden_layers
    assert prefix._end == len(batch["input_ids"])
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


def test_a_text_of_a_pair_is_told_from_the_same_ids_as_one_text() -> None:
    model = upper_half("Bert")
    plain = copy.deepcopy(model)
    kept(model)
    batch = tiny_batch(model)
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_there_is_no_prefix_below_trained_embeddings_or_the_first_block() -> None:
    model = tiny("BertForSequenceClassification")
    add_adapter(model, LoraConfig(target_modules=("query",)))
    assert frozen_blocks(model) == []
    upper = upper_half("Bert")
    upper.bert.embeddings.word_embeddings.weight.requires_grad_(True)  # type: ignore[union-attr]
    assert frozen_blocks(upper) == []
    assert frozen_blocks(tiny("T5ForConditionalGeneration")) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_a_model_that_looks_up_its_blocks_looks_up_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = upper_half("Bert")
    kept(model)
    batch = tiny_batch(model)
    other = copied(model)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    shorter = {key: value[:, :3] for key, value in batch.items()}  # which is not kept
    assert torch.equal(other(**shorter).logits, model(**shorter).logits)


# Autograd functions of our own: the same gradients as autograd's from the plain formula.


def not_needed() -> Tensor:
    raise AssertionError("computed once more, though the answer is there")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y, gain, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 5), (5,), (5,)))
    return y.to(dtype).requires_grad_(), (1 + 0.1 * gain).to(dtype).requires_grad_(), bias.to(dtype)


def changed_in_place(answer: Tensor) -> Tensor:
    answer += 1
    answer /= 2
    return answer


@pytest.mark.parametrize("with_bias", [True, False])
def test_rescale_has_the_gradients_of_finite_differences(with_bias: bool) -> None:
    y, gain, bias = inputs()
    for after in (lambda answer: answer, changed_in_place):
        assert torch.autograd.gradcheck(
            lambda y, gain: after(rescale(y, gain, bias if with_bias else None, lambda: y.detach())),  # noqa: B023
            (y, gain),
        )


def test_rescale_by_one_is_exact() -> None:
    y, gain, bias = inputs(torch.float32)
    assert torch.equal(rescale(y, torch.ones_like(gain), bias, not_needed), y)


def test_gain_of_zero_gets_a_finite_gradient() -> None:
    y, _, bias = inputs()
    gain = torch.tensor([0.0, 1e-12, 1.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    rescale(y, gain, bias, not_needed).square().sum().backward()
    assert gain.grad is not None
    assert gain.grad[:2].tolist() == [0, 0]
    assert (gain.grad[2:] != 0).all()


def test_what_is_kept_for_the_backward_pass_is_the_answer() -> None:
    kept: list[Tensor] = []
    y, gain, bias = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        answer = rescale(y, gain, bias, not_needed)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() > 5] == [answer.data_ptr()]


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
