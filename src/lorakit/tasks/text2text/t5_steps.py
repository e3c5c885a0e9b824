"""A T5's decoder a token at a time, with keys and values in arrays of its own.

transformers copies all keys of a row at each token, and again where a row ends. Here they are written once and read in place.
Everything but attention is computed by the model's own modules, adapted or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.lora.kernels import attend_last, fits

FAMILIES = ("t5", "mt5")
FIRST = 16  # tokens that there is room for at first; twice as many each time they are used up


def is_known(model: Any, encoded: Tensor, mask: Tensor) -> bool:
    """Whether a model's decoder can run so: a T5 on a CPU, whose texts are padded behind."""
    is_padded_behind = bool((mask[:, 1:] <= mask[:, :-1]).all())
    is_t5 = model.config.model_type in FAMILIES and hasattr(model, "decoder")  # not the graph of one
    return is_t5 and is_padded_behind and fits(encoded) and encoded.dtype == model.dtype


class T5Steps:
    """The decoder of a T5 that has read a batch, each row at its own next token."""

    def __init__(self, model: Any, encoded: Tensor, mask: Tensor) -> None:
        config, self.decoder = model.config, model.decoder
        self.heads, self.width = config.num_heads, config.d_kv
        self.scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
        self.texts = self.rows = torch.arange(len(encoded))  # of each row that goes on, in `read` and in `written`
        self.counts = mask.sum(1)  # tokens of each text
        cross = [block.layer[1].EncDecAttention for block in self.decoder.block]
        # keys and values of a block, each (B, heads, tokens, width): of the text, and of what is written
        self.read = [(self._split(each.k(encoded)), self._split(each.v(encoded))) for each in cross]
        room = encoded.new_empty(len(encoded), self.heads, FIRST, self.width)
        self.written = [(room.clone(), room.clone()) for _ in cross]
        self.n = 0  # tokens written
        self._reserve(FIRST)

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], self.heads, self.width).transpose(1, 2).contiguous()

    def _reserve(self, room: int) -> None:
        """Room for so many tokens, and what attention adds for the distance of each two."""
        if self.n:
            self.written = [(torch.cat([k, k], 2), torch.cat([v, v], 2)) for k, v in self.written]
        self.bias = self.decoder.block[0].layer[0].SelfAttention.compute_bias(room, room)[0].contiguous()

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows alone, in this order; one that is named twice goes on as two."""
        self.texts, self.rows = self.texts[rows], self.rows[rows]
        if len(self.rows.unique()) < len(self.rows):
            self.written = [(keys[self.rows], values[self.rows]) for keys, values in self.written]
            self.rows = torch.arange(len(rows))

    def __call__(self, tokens: Tensor) -> Tensor:
        """The states that the output layer reads, behind one more token of each row. Shapes: (R,) to (R, d)."""
        if self.n == self.written[0][0].shape[2]:
            self._reserve(2 * self.n)
        x = self.decoder.embed_tokens(tokens[:, None])  # (R, 1, d)
        at, counts = (self.rows, slice(None), self.n), torch.full_like(self.rows, self.n + 1)
        by_head, by_row = (len(tokens), self.heads, self.width), (len(tokens), 1, -1)
        for block, (keys, values), of_text in zip(self.decoder.block, self.written, self.read, strict=True):
            own, cross, feed_forward = block.layer
            attention, h = own.SelfAttention, own.layer_norm(x)
            keys[at], values[at] = attention.k(h).view(by_head), attention.v(h).view(by_head)
            q, bias = attention.q(h).view(by_head), self.bias[:, self.n]
            y = attend_last(q, keys, values, self.rows, counts, bias=bias)
            x = x + attention.o(y.view(by_row))
            attention = cross.EncDecAttention
            q = attention.q(cross.layer_norm(x)).view(by_head)
            y = attend_last(q, *of_text, self.texts, self.counts[self.texts])
            x = feed_forward(x + attention.o(y.view(by_row)))
        self.n += 1
        states: Tensor = self.decoder.final_layer_norm(x)[:, 0] * self.scale
        return states
