"""BERT's encoder and T5's stacks over the tokens of a batch one behind the other: no padding, and few passes over the rows.

The modules stay the reference. What they hold is read at each forward, and where anything is not as this file knows it (a
hook, an update of BERT's that is not plain, gradients of the base) the encoder runs as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.lora.fused_linear import Update, adapted_linear
from lorakit.lora.inject import routing_of
from lorakit.lora.kernels import Texts, add_norm, attend, draw, fits, gelu, library, merge_heads, split
from lorakit.lora.layers import Layer
from lorakit.lora.speedups import changes_of, first_row

KINDS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")  # values of config.model_type
STACKS = ("T5Stack", "MT5Stack")  # classes of transformers
# Up to so many rows their number is a multiple of 16, else of 64: oneDNN keeps memory for each number that it meets.
FEW, OF_FEW, OF_MANY = 512, 16, 64


def pack(model: Any) -> bool:
    """Let a model compute its blocks over the tokens of a batch one behind the other, where it can.

    Returns whether the family is known and its passes can be compiled here.

    >>> pack(model)
    True
    """
    config = model.config
    if model.device.type != "cpu" or library(model.dtype) is None:
        return False
    packed = [module for module in model.modules() if type(module).__name__ in STACKS]
    for stack in packed:
        stack.forward = partial(_forward_stack, stack)
    if config.model_type in KINDS and config.hidden_act == "gelu" and not config.is_decoder:
        encoder = next(module for path, module in model.named_modules() if path.rpartition(".")[2] == "encoder")
        encoder.forward = partial(_forward, encoder, config.num_attention_heads)
        packed = [encoder]
    if packed:
        changes_of(model).add("no work on padding", partial(_unpack, packed))
    return bool(packed)


def _unpack(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        del module.forward


class Encoded(NamedTuple):
    """What an encoder gives, by the names that transformers reads."""

    last_hidden_state: Tensor  # (B, T, d); 0 behind a text
    past_key_values: None = None
    cache: None = None  # the same, from transformers 5.24 on
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None


def _forward(
    encoder: Any, heads: int, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Any:
    """Replaces the encoder's forward. Shapes: hidden_states (B, T, d), attention_mask of bool (B, 1, T, T)."""
    blocks = None
    if attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.dim() == 4):
        blocks = _blocks(encoder, hidden_states)
    if blocks is None:
        return type(encoder).forward(encoder, hidden_states, attention_mask=attention_mask, **options)
    n, length, _ = hidden_states.shape
    mask = hidden_states.new_ones(n, length, dtype=torch.bool) if attention_mask is None else attention_mask[:, 0, 0]
    places, texts = _texts(mask)
    x = _take(hidden_states, places, texts)
    for block in blocks:
        x = block(x, texts, heads)
    return Encoded(x[:, None] if blocks[-1].reads_first_row else _put_back(x, places, mask))


def _texts(mask: Tensor) -> tuple[Tensor, Texts]:
    """Where a batch has tokens, and the texts that they make. Shapes: mask (B, T) to (tokens,)."""
    places, counts = mask.flatten().nonzero().flatten(), mask.sum(1).tolist()
    multiple = OF_FEW if len(places) <= FEW else OF_MANY
    n_rows = -(-len(places) // multiple) * multiple
    return places, Texts(torch.tensor([0, *accumulate(counts)]), len(counts), max(counts), n_rows)


def _take(states: Tensor, places: Tensor, texts: Texts) -> Tensor:
    """The states of the tokens, 0 behind them. Shapes: (B, T, d) to (texts.rows, d)."""
    return F.pad(states.flatten(0, 1)[places], (0, 0, 0, texts.rows - len(places)))


def _put_back(x: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """The reverse; 0 where there is no token. Shapes: (texts.rows, d) and mask (B, T) to (B, T, d)."""
    return x.new_zeros(mask.numel(), x.shape[1]).index_copy(0, places, x[: len(places)]).view(*mask.shape, -1)


class Linear(NamedTuple):
    """A frozen linear layer and the updates of the texts' own adapters."""

    weight: Tensor
    bias: Tensor
    updates: Sequence[Update]  # by number of texts; none where no text's adapter has one here

    def __call__(self, x: Tensor, texts: Texts) -> Tensor:
        """W x + s B A x, without the bias. Shapes: (texts.rows, d_in) to (texts.rows, d_out)."""
        if not self.updates:
            return x @ self.weight.T
        ends = texts.starts[torch.tensor([0, *accumulate(update.n for update in self.updates)])].diff().tolist()
        by_rows = [update._replace(n=rows) for update, rows in zip(self.updates, ends, strict=True)]
        return adapted_linear(x, self.weight, None, by_rows)


class Block(NamedTuple):
    """A block of the encoder, as its modules are now."""

    query: Linear
    key: Linear
    value: Linear
    attended: Linear
    attention_norm: nn.LayerNorm
    up: Linear
    down: Linear
    norm: nn.LayerNorm
    attention_dropout: float
    dropout: float
    reads_first_row: bool  # of each text it answers the first token alone

    def __call__(self, x: Tensor, texts: Texts, heads: int) -> Tensor:
        """Shapes: (texts.rows, d) to the same, or to one row a text."""
        queries, rows = texts, x
        if self.reads_first_row:
            queries, rows = Texts(torch.arange(texts.n + 1), texts.n, 1, texts.n), x[texts.starts[:-1]]
        q, k, v = (
            split(linear(own, of), linear.bias, of, heads)
            for linear, own, of in ((self.query, rows, queries), (self.key, x, texts), (self.value, x, texts))
        )
        y = attend(q, k, v, texts=texts, scaling=q.shape[-1] ** -0.5, drop=draw(self.attention_dropout))
        y = self._add_norm(self.attended, merge_heads(y, queries), rows, queries, self.attention_norm)
        hidden = gelu(self.up(y, queries), self.up.bias)
        return self._add_norm(self.down, hidden, y, queries, self.norm)

    def _add_norm(self, linear: Linear, x: Tensor, residual: Tensor, texts: Texts, norm: nn.LayerNorm) -> Tensor:
        drop = draw(self.dropout)
        return add_norm(linear(x, texts), linear.bias, residual, norm.weight, norm.bias, norm.eps, drop)


def _blocks(encoder: Any, hidden: Tensor) -> list[Block] | None:
    """The encoder's blocks as they are now; None if they must run as modules."""
    if not fits(hidden):
        return None
    last = encoder.layer[-1].attention.output
    reads_first_row = list(last._forward_pre_hooks.values()) == [first_row]
    for module in encoder.modules():
        has_hooks = module._forward_hooks or module._backward_hooks
        has_others = module._forward_pre_hooks and not (module is last and reads_first_row)
        if (
            has_hooks
            or has_others
            or ("forward" in module.__dict__ and module is not encoder and type(module) is not nn.Dropout)
        ):
            return None
    blocks = [_block(module, hidden, reads_first_row and module is encoder.layer[-1]) for module in encoder.layer]
    known = [block for block in blocks if block is not None]
    return known if len(known) == len(blocks) else None


def _block(module: Any, hidden: Tensor, reads_first_row: bool) -> Block | None:
    attention, output = module.attention, module.output
    of_attention = (attention.self.query, attention.self.key, attention.self.value, attention.output.dense)
    read = [_linear(each, len(hidden)) for each in (*of_attention, module.intermediate.dense, output.dense)]
    linears = [linear for linear in read if linear is not None]
    norms = attention.output.LayerNorm, output.LayerNorm
    tensors = [t for linear in linears for t in linear[:2]] + [t for norm in norms for t in (norm.weight, norm.bias)]
    if len(linears) < len(read) or any(t is None or t.requires_grad or t.dtype != hidden.dtype for t in tensors):
        return None
    query, key, value, attended, up, down = linears
    return Block(
        query=query, key=key, value=value, attended=attended, attention_norm=norms[0],
        up=up, down=down, norm=norms[1],
        attention_dropout=_rate(attention.self.dropout), dropout=_rate(output.dropout),
        reads_first_row=reads_first_row,
    )  # fmt: skip


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _linear(module: nn.Module, texts: int) -> Linear | None:
    """A linear layer as it is now, frozen and with plain updates; None where it is another."""
    updates: Sequence[Update] | None = ()
    if isinstance(module, Layer):
        updates = () if module.merged else module.plain_updates(texts)
        module = module.base
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or updates is None:
        return None
    return Linear(module.weight, module.bias, updates if any(update.A is not None for update in updates) else ())


# T5: its own modules, adapted or not, to which each token is a text. Attention alone sees texts.


def _forward_stack(
    stack: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Replaces the forward of a T5's encoder or decoder. Shapes: input_ids and masks (B, T), encoder_hidden_states (B, S, d)."""
    bias_of = stack.block[0].layer[0].SelfAttention
    if (
        input_ids is None
        or attention_mask is None
        or attention_mask.dim() != 2
        or (encoder_hidden_states is not None and encoder_attention_mask is not None) != stack.is_decoder
        or any(value is not None and value is not False for value in options.values())  # a cache, states of all blocks
        or any(module._forward_hooks or module._forward_pre_hooks for module in stack.block.modules())
        or any(p.requires_grad for p in bias_of.relative_attention_bias.parameters())
        or not fits(bias_of.q.weight)
    ):
        of_read = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        return type(stack).forward(stack, input_ids, attention_mask, **of_read, **options)
    if encoder_hidden_states is not None and encoder_attention_mask is not None:
        places, read = _texts(encoder_attention_mask)
        states = _take(encoder_hidden_states, places, read)
        with _routed_by_rows(stack, read):
            attentions = [block.layer[1].EncDecAttention for block in stack.block]
            keys_and_values = [(attention.k(states), attention.v(states)) for attention in attentions]
    places, texts = _texts(attention_mask)
    ids = F.pad(input_ids.flatten()[places], (0, texts.rows - len(places)))
    bias = bias_of.compute_bias(texts.longest, texts.longest)
    mask = bias.new_ones(bias.shape[2:], dtype=torch.bool).tril() if stack.is_decoder else None
    with _routed_by_rows(stack, texts):
        x = stack.dropout(stack.embed_tokens(ids))
        for i, block in enumerate(stack.block):
            own, *_, feed_forward = block.layer
            h = own.layer_norm(x)
            k, v = own.SelfAttention.k(h), own.SelfAttention.v(h)
            x = x + own.dropout(_attended(own.SelfAttention, h, k, v, texts, texts, bias=bias, mask=mask))
            if stack.is_decoder:
                cross = block.layer[1]
                y = _attended(cross.EncDecAttention, cross.layer_norm(x), *keys_and_values[i], texts, read)
                x = x + cross.dropout(y)
            x = feed_forward(x)
        x = stack.dropout(stack.final_layer_norm(x))
    return Encoded(_put_back(x, places, attention_mask))


def _attended(
    attention: Any, h: Tensor, k: Tensor, v: Tensor, queries: Texts, texts: Texts, **biases: Tensor | None
) -> Tensor:
    q, k, v = (
        split(rows, None, of, attention.n_heads) for rows, of in ((attention.q(h), queries), (k, texts), (v, texts))
    )
    drop = draw(attention.dropout if attention.training else 0.0)
    y: Tensor = attention.o(merge_heads(attend(q, k, v, texts=texts, scaling=1.0, drop=drop, **biases), queries))
    return y


def _routed_by_rows(stack: nn.Module, texts: Texts) -> AbstractContextManager[None]:
    """Within this block each adapter serves the rows of its texts."""
    routing = routing_of(stack)
    if routing is None or len(routing.segments) < 2:
        return nullcontext()
    ends = texts.starts[torch.tensor([n for _, n in routing.sized(texts.n)]).cumsum(0)].tolist()
    ends[-1] = texts.rows
    rows = [end - start for start, end in pairwise([0, *ends])]
    return routing.routed([(adapter, n) for (adapter, _), n in zip(routing.segments, rows, strict=True)])
