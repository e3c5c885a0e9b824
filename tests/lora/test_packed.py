"""The encoder over packed tokens against its modules, and each pass over rows against torch's functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.lora import LoraConfig, add_adapter, fuse, hosts, merge, read_first_row, routed
from lorakit.lora.kernels import (
    Dropout,
    Texts,
    add_norm,
    attend,
    dropout,
    gelu,
    library,
    likeliest,
    merge_heads,
    rms_norm,
    split,
)
from lorakit.lora.packed import pack
from lorakit.lora.speedups import changes_of
from tests.lora.test_speedups import BERT, adapted, answered, assert_same
from tests.tiny import tiny, tiny_batch

pytestmark = pytest.mark.skipif(library(torch.float32) is None, reason="no C compiler")
T5 = "T5ForConditionalGeneration"
NONE = Dropout(0.0, 0)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # of the largest value
LENGTHS, HEADS, WIDTH = (5, 1, 8), 2, 12
TEXTS = Texts(torch.tensor([0, *accumulate(LENGTHS)]), len(LENGTHS), max(LENGTHS), sum(LENGTHS) + 2)
FIRST = Texts(torch.arange(len(LENGTHS) + 1), len(LENGTHS), 1, len(LENGTHS))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor], asking: Texts, texts: Texts, heads: int, drop: Dropout
) -> Tensor:
    """As a block does it."""
    pairs = zip((q, k, v), biases, (asking, texts, texts), strict=True)
    q, k, v = (split(x, bias.to(x.dtype), of, heads) for x, bias, of in pairs)
    return merge_heads(attend(q, k, v, texts=texts, scaling=q.shape[-1] ** -0.5, drop=drop), asking)


def attend_by_torch(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor], asking: Texts) -> Tensor:
    """Text by text, in fp32."""
    answers = []
    for i in range(TEXTS.n):
        rows = [x[of.starts[i] : of.starts[i + 1]] for x, of in zip((q, k, v), (asking, TEXTS, TEXTS), strict=True)]
        split = [(x + bias).view(len(x), HEADS, -1).transpose(0, 1) for x, bias in zip(rows, biases, strict=True)]
        answers.append(F.scaled_dot_product_attention(*split).transpose(0, 1).flatten(1))
    return F.pad(torch.cat(answers), (0, 0, 0, asking.rows - int(asking.starts[-1])))


def add_norm_by_torch(x: Tensor, bias: Tensor, residual: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(residual + x + bias, x.shape[1:], gain, shift, 1e-5)


def assert_as_torch(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients, in both types, of what the first computes from inputs rounded to it, the second in fp32."""
    for dtype, tolerance in TOLERANCE.items():
        rounded = [x.to(dtype) for x in inputs]
        found, wanted = ([x.to(of, copy=True).requires_grad_() for x in rounded] for of in (dtype, torch.float32))
        y, expected = ours(*found), theirs(*wanted)
        weights = numbers(*y.shape, seed=9)
        for answer in (y, expected):
            (answer.float() * weights).sum().backward()
        pairs = [(y, expected), *((a.grad, b.grad) for a, b in zip(found, wanted, strict=True))]
        for own, other in pairs:
            assert own is not None
            assert other is not None
            assert (own.float() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("asking", [TEXTS, FIRST], ids=["all", "first"])
def test_attention_is_softmax_attention_of_each_text(asking: Texts) -> None:
    # biases are frozen, so they are no inputs here
    for dtype in TOLERANCE:
        assert library(dtype)
    biases = [numbers(WIDTH, seed=i).bfloat16() for i in range(3)]
    inputs = [numbers(of.rows, WIDTH, seed=i) for i, of in enumerate((asking, TEXTS, TEXTS))]
    assert_as_torch(
        lambda q, k, v: attend_rows(q, k, v, biases, asking, TEXTS, HEADS, NONE),
        lambda q, k, v: attend_by_torch(q, k, v, [b.float() for b in biases], asking),
        *inputs,
    )


def test_sum_and_norm_are_those_of_torch() -> None:
    frozen = [numbers(WIDTH, seed=i).bfloat16() for i in range(3)]
    bias, gain, shift = frozen

    def ours(x: Tensor, residual: Tensor) -> Tensor:
        return add_norm(x, bias.to(x.dtype), residual, gain.to(x.dtype), shift.to(x.dtype), 1e-5, NONE)

    def theirs(x: Tensor, residual: Tensor) -> Tensor:
        return add_norm_by_torch(x, bias.float(), residual, gain.float(), shift.float())

    assert_as_torch(ours, theirs, numbers(7, WIDTH, seed=3), numbers(7, WIDTH, seed=4))


def test_gelu_is_that_of_torch_far_out_as_well() -> None:
    bias = numbers(WIDTH).bfloat16()
    x = numbers(7, WIDTH, seed=1) * torch.tensor([0.1, 1, 3, 10, 100, 1e4, 0])[:, None]
    assert_as_torch(lambda x: gelu(x, bias.to(x.dtype)), lambda x: F.gelu(x + bias.float()), x)


def test_root_mean_square_norm_is_that_of_torch() -> None:
    gain = numbers(WIDTH).bfloat16()
    assert_as_torch(
        lambda x: rms_norm(x, gain.to(x.dtype), 1e-6),
        lambda x: F.rms_norm(x, (WIDTH,), gain.float(), 1e-6),
        numbers(2, 7, WIDTH, seed=1),
    )


def test_bias_and_mask_of_attention_are_those_of_torch() -> None:
    """As T5 has them: a bias for each head, a mask for each text, one of whose rows sees nothing."""
    bias, mask = numbers(1, HEADS, 3, 5, seed=4).bfloat16(), numbers(2, 1, 3, 5, seed=5) > -0.5
    mask[0, 0, 2] = False
    inputs = [numbers(2, HEADS, n, WIDTH, seed=n) for n in (3, 5, 5)]

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probabilities = (q @ k.mT + bias.float()).masked_fill(~mask, -1e30).softmax(-1)
        return probabilities.masked_fill(~mask, 0) @ v

    assert_as_torch(
        lambda q, k, v: attend(q, k, v, bias=bias.to(q.dtype), mask=mask, scaling=1.0, drop=NONE), theirs, *inputs
    )


def test_likeliest_is_the_first_of_the_largest() -> None:
    for dtype in TOLERANCE:
        logits = numbers(5, 70, dtype=dtype) * 4
        logits[0, [3, 9]], logits[1, -1] = 20.0, 30.0
        wanted = logits.float().log_softmax(-1)
        places, log_p = likeliest(logits)
        assert places.tolist() == [3, 69, *wanted[2:].argmax(-1).tolist()]
        torch.testing.assert_close(log_p, wanted.max(-1).values, atol=1e-5, rtol=1e-5)
    assert likeliest(torch.full((1, 9), torch.nan))[1].isnan().all()


def test_what_is_not_a_number_stays_so() -> None:
    """A step whose loss is not finite is skipped, so nothing may hide it."""
    x = torch.full((TEXTS.rows, WIDTH), torch.nan)
    bias = torch.zeros(WIDTH)
    assert gelu(x, bias).isnan().all()
    assert add_norm(x, bias, x, bias, bias, 1e-5, NONE).isnan().all()
    assert attend_rows(x, x, torch.ones_like(x), [bias] * 3, TEXTS, TEXTS, HEADS, NONE)[: sum(LENGTHS)].isnan().all()


def test_dropout_leaves_its_share_and_keeps_the_mean() -> None:
    rate, n = 0.1, 400
    single = Texts(torch.arange(n + 1), n, 1, n)  # of one token each, so that its probability is 1
    zeros, ones, bias = torch.zeros(n, 64), torch.ones(n, 64), torch.zeros(64)
    kept = attend_rows(zeros, zeros, ones, [bias] * 3, single, single, 64, Dropout(rate, 5))
    assert set(kept.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - rate)))}
    assert abs(float((kept == 0).float().mean()) - rate) < 0.01  # five standard errors
    assert set(dropout(ones, Dropout(rate, 5)).unique().tolist()) == set(kept.unique().tolist())
    other = attend_rows(zeros, zeros, ones, [bias] * 3, single, single, 64, Dropout(rate, 6))
    assert abs(float(((kept == 0) & (other == 0)).float().mean()) - rate**2) < 0.005
    assert torch.equal(kept, attend_rows(zeros, zeros, ones, [bias] * 3, single, single, 64, Dropout(rate, 5)))


@pytest.mark.parametrize("name", ["attend", "add_norm", "dropout"])
def test_gradients_with_dropout_are_those_of_differences(name: str) -> None:
    drop, bias, gain = Dropout(0.3, 7), numbers(WIDTH), numbers(WIDTH, seed=1)
    computed = {
        "attend": lambda q, k, v: attend_rows(q, k, v, [bias] * 3, TEXTS, TEXTS, HEADS, drop),
        "dropout": lambda x: dropout(x, drop),
        "add_norm": lambda x, residual: add_norm(x, bias, residual, gain, bias, 1e-5, drop),
    }[name]
    inputs = [
        numbers(TEXTS.rows, WIDTH, seed=i).requires_grad_()
        for i in range({"attend": 3, "add_norm": 2, "dropout": 1}[name])
    ]
    weights = numbers(TEXTS.rows, WIDTH, seed=8)
    (computed(*inputs) * weights).sum().backward()
    for x in inputs:
        direction = numbers(TEXTS.rows, WIDTH, seed=11)
        sides = []
        for step in (-1e-2, 1e-2):
            moved = [other + step * direction if other is x else other for other in inputs]
            sides.append(float((computed(*moved) * weights).double().sum().detach()))
        assert x.grad is not None
        assert (sides[1] - sides[0]) / 2e-2 == pytest.approx(float((x.grad * direction).sum()), rel=2e-2, abs=2e-2)


FAMILIES = [
    f"{name}For{head}" for name in ("Bert", "Roberta", "Camembert", "Electra") for head in ("SequenceClassification",)
] + ["XLMRobertaForTokenClassification", "BertForTokenClassification", T5]


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """A batch with padding, of what a T5 writes too."""
    batch = tiny_batch(model)
    if (written := batch.pop("labels", None)) is not None:
        written_mask = (torch.arange(written.shape[1]) <= torch.arange(len(written))[:, None]).long()
        batch |= {"decoder_input_ids": written, "decoder_attention_mask": written_mask}
    return batch


def mask_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Of the tokens that are answered, 1 where there is one."""
    return batch.get("decoder_attention_mask", batch["attention_mask"])


def read(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits; of a tagger those of real tokens."""
    logits: Tensor = model(**batch).logits
    return logits if logits.dim() == 2 else logits[mask_of(batch) == 1]


def only_real(model: nn.Module) -> nn.Module:
    """A model that answers nothing where there is padding, as its losses and answers do."""

    def answered(module: nn.Module, args: object, inputs: dict[str, Tensor], output: object) -> None:
        logits: Tensor = output.logits  # type: ignore[attr-defined]
        if logits.dim() == 3:
            output.logits = logits * mask_of(inputs)[..., None]  # type: ignore[attr-defined]

    model.register_forward_hook(answered, with_kwargs=True)
    return model


@pytest.mark.parametrize("architecture", FAMILIES)
def test_encoder_is_the_modules_up_to_rounding(architecture: str) -> None:
    plain = only_real(adapted(architecture))
    fast = copy.deepcopy(plain)
    fuse(fast)
    if architecture.endswith("SequenceClassification"):
        assert read_first_row(fast)
    assert pack(fast)
    batch = batch_of(plain)
    assert_same(plain, fast, batch)
    assert_same(plain, fast, {key: value[:1] for key, value in batch.items()})  # one text


@pytest.fixture(params=[BERT])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A model as modules and packed, and a check that the second has run so."""
    plain = adapted(request.param).eval()
    fast = copy.deepcopy(plain)
    assert pack(fast)
    yield plain, fast


@pytest.mark.parametrize("pair", [BERT, T5], indirect=True)
def test_rows_of_a_mixed_batch_get_their_own_adapters(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        add_adapter(model, LoraConfig(r=2, target_modules=".*(query|dense|q|v|wo)"), "other")
        for name, parameter in model.named_parameters():
            if name.endswith("other.lora_B"):
                parameter.data = numbers(*parameter.shape, seed=3)
    batch = batch_of(pair[0])
    segments = [("default", 2), (None, 1), ("other", len(batch["input_ids"]) - 3)]
    answers = []
    for model in pair:
        with routed(model, segments):
            answers.append(read(model, batch))
    torch.testing.assert_close(*answers)
    for model in pair:
        hosts(model)[0][1].routing.use("default")
        merge(model, "default")
    torch.testing.assert_close(*(read(model, batch) for model in pair))


def hooked(model: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    dense = model.get_submodule("bert.encoder.layer.1.intermediate.dense")
    dense.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


@pytest.mark.parametrize(
    "change",
    [
        lambda model: add_adapter(model, LoraConfig(r=2, use_dora=True), "dora"),
        lambda model: model.get_submodule("bert.encoder.layer.0.output.LayerNorm").weight.requires_grad_(),
        hooked,
        lambda model: model.double(),
    ],
    ids=["an update that is not plain", "a norm that is trained", "a hook", "another type"],
)
def test_what_is_not_known_runs_as_modules(
    change: Callable[[nn.Module], object], pair: tuple[nn.Module, nn.Module]
) -> None:
    for model in pair:
        change(model)
        for _, host in hosts(model):
            host.routing.use("dora" if "dora" in host.adapters else "default")
    batch = tiny_batch(pair[0])
    assert torch.equal(*(read(model, batch) for model in pair))


@pytest.mark.parametrize("pair", [T5], indirect=True)
def test_t5_takes_any_update_and_writes_with_a_cache(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        add_adapter(model, LoraConfig(r=2, use_dora=True), "dora")
        hosts(model)[0][1].routing.use("dora")
    assert_same(*map(only_real, pair), batch_of(pair[0]))
    batch = tiny_batch(pair[0])
    del batch["labels"]
    assert torch.equal(*(model.generate(**batch, max_new_tokens=4) for model in pair))  # type: ignore[operator]
    relative = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for model in pair:
        model.get_parameter(relative).requires_grad_()
    gradients = [answered(model, batch_of(model))[1][relative] for model in pair]
    torch.testing.assert_close(*gradients)  # what is trained of it needs the modules


def test_states_of_all_blocks_can_be_asked_for(pair: tuple[nn.Module, nn.Module]) -> None:
    plain, fast = (model(**tiny_batch(model), output_hidden_states=True).hidden_states for model in pair)
    assert len(plain) == len(fast) > 1
    torch.testing.assert_close(plain, fast)


def test_packing_is_undone(pair: tuple[nn.Module, nn.Module]) -> None:
    fast = pair[1]
    assert list(changes_of(fast)) == ["no work on padding"]
    changes_of(fast).remove()
    assert torch.equal(*(read(model, tiny_batch(model)) for model in pair))


def test_other_families_and_other_activations_are_left_alone() -> None:
    assert not pack(tiny("DistilBertForSequenceClassification"))
    assert not pack(tiny(BERT, hidden_act="relu"))


def test_without_a_compiler_the_modules_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    library.cache_clear()
    assert not pack(tiny(BERT))
    monkeypatch.undo()
    library.cache_clear()


def test_a_cache_that_others_could_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (folder := tmp_path / "lorakit" / "kernels").mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    assert library(torch.float32)
    assert not list(folder.iterdir())
    folder.chmod(0o700)
    library.cache_clear()
    assert library(torch.float32)
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    library.cache_clear()
