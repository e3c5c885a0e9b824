"""BERT's encoder over the tokens of a batch one behind the other: no padding, and few passes over the rows.

The modules stay the reference. What they hold is read at each forward, and where anything is not as this file knows it (a
hook, an update that is not plain, gradients of the base) the encoder runs as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.lora.fused_linear import Update, adapted_linear
from lorakit.lora.kernels import Texts, add_norm, attend, draw, fits, gelu, library, merge_heads, split
from lorakit.lora.layers import Layer
from lorakit.lora.speedups import changes_of, first_row

KINDS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")  # values of config.model_type
MULTIPLE = 64  # the number of rows is one of it: oneDNN keeps memory for each number that it meets


def pack(model: Any) -> bool:
    """Let a model's encoder compute its blocks over the tokens of a batch one behind the other, where it can.

    Returns whether the family is known and its passes can be compiled here.

    >>> pack(model)
    True
    """
    config = model.config
    if config.model_type not in KINDS or config.hidden_act != "gelu" or config.is_decoder:
        return False
    if model.device.type != "cpu" or library(model.dtype) is None:
        return False
    encoder = next(module for path, module in model.named_modules() if path.rpartition(".")[2] == "encoder")
    encoder.forward = partial(_forward, encoder, config.num_attention_heads)
    changes_of(model).add("no work on padding", partial(_unpack, encoder))
    return True


def _unpack(encoder: nn.Module) -> None:
    del encoder.forward


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
    n, length, d = hidden_states.shape
    mask = hidden_states.new_ones(n, length, dtype=torch.bool) if attention_mask is None else attention_mask[:, 0, 0]
    places = mask.flatten().nonzero().flatten()
    counts = mask.sum(1).tolist()
    n_rows = -(-len(places) // MULTIPLE) * MULTIPLE
    texts = Texts(torch.tensor([0, *accumulate(counts)]), n, max(counts), n_rows)
    x = F.pad(hidden_states.reshape(-1, d)[places], (0, 0, 0, n_rows - len(places)))
    for block in blocks:
        x = block(x, texts, heads)
    if blocks[-1].reads_first_row:
        return Encoded(x[:, None])
    return Encoded(x.new_zeros(n * length, d).index_copy(0, places, x[: len(places)]).view(n, length, d))


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
        asking, rows = texts, x
        if self.reads_first_row:
            asking, rows = Texts(torch.arange(texts.n + 1), texts.n, 1, texts.n), x[texts.starts[:-1]]
        q, k, v = (
            split(linear(own, of), linear.bias, of, heads)
            for linear, own, of in ((self.query, rows, asking), (self.key, x, texts), (self.value, x, texts))
        )
        y = attend(q, k, v, texts=texts, scaling=q.shape[-1] ** -0.5, drop=draw(self.attention_dropout))
        y = self._add_norm(self.attended, merge_heads(y, asking), rows, asking, self.attention_norm)
        hidden = gelu(self.up(y, asking), self.up.bias)
        return self._add_norm(self.down, hidden, y, asking, self.norm)

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
