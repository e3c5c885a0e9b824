"""Greedy decoding of an encoder and decoder with a cache, freely or within a language for each row.

Within languages the output layer computes the logits of the tokens that may come next in some row of the batch, and no
others: of T5's 32,128 rows that is a few hundred at most, and the answer is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.lora.kernels import attend_last, fits, likeliest
from lorakit.tasks.base import IGNORE, Batch, inputs_of, pad
from lorakit.tasks.sequence import SequenceTask
from lorakit.tasks.text2text.entity_format import END, START, Node, Way

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BARE_HEADS = ("t5", "mt5", "umt5", "longt5")  # families whose logits are their output layer's answer


class Written(NamedTuple):
    """One output of the decoder: its tokens, whether it ended by itself, and its mean probability a token."""

    ids: tuple[int, ...]
    ended: bool
    score: float


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an output, special and unknown pieces kept; end and padding left out."""
    silent = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    visible = [i for i in ids if i not in silent]
    text: str = tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


@torch.no_grad()
def greedy(model: nn.Module, batch: Batch, limit: int, languages: Sequence[Language] | None = None) -> list[Written]:
    """The greedy output for each row, of `limit` tokens at most. Probabilities are those among the tokens allowed."""
    decoder = Decoder(model, batch)
    rows = len(batch["input_ids"])
    paths = [language.begin() for language in languages or ()]
    ids: list[list[int]] = [[] for _ in range(rows)]
    log_p = [0.0] * rows
    running = list(range(rows))  # those that have not ended, in the decoder's order
    tokens = [decoder.start] * rows
    for _ in range(limit):
        steps = decoder.step(tokens, [allowed(paths[row]) for row in running] if languages else None)
        for row, (token, value) in zip(running, steps, strict=True):
            ids[row].append(token)
            log_p[row] += value
            if languages:
                paths[row] = languages[row].step(paths[row], token)
        unfinished = [i for i, row in enumerate(running) if ids[row][-1] != decoder.eos]
        if not unfinished:
            running = []
            break
        if len(unfinished) < len(running):
            running = [running[i] for i in unfinished]
            decoder.keep(unfinished)
        tokens = [ids[row][-1] for row in running]
    means = torch.tensor([total / len(row) for total, row in zip(log_p, ids, strict=True)]).exp().tolist()
    return [Written(tuple(row), i not in running, mean) for i, (row, mean) in enumerate(zip(ids, means, strict=True))]


class Encoded(NamedTuple):
    """What an encoder has read, as families ask for it: by name, or as the first of a tuple."""

    last_hidden_state: Tensor
    hidden_states: None = None
    attentions: None = None


class Decoder:
    """A decoder that has read a batch and writes one token a step."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model = model
        config = model.config
        self.start, self.eos = config.decoder_start_token_id, config.eos_token_id
        self.mask = batch["attention_mask"]
        self.encoded = model.get_encoder()(**inputs_of(batch)).last_hidden_state  # (B, T, d)
        self.cache: Any = None
        self.steps = T5Steps(model, self.encoded, self.mask) if is_known(model, self.encoded, self.mask) else None

    def step(self, tokens: Sequence[int], allowed: Sequence[set[int]] | None) -> list[tuple[int, float]]:
        """The likeliest next token of each row behind its last one, and its log-probability among the allowed ones."""
        last = torch.tensor(tokens, device=self.mask.device)[:, None]  # (B, 1)
        if allowed is None:
            logits = self.logits(last, None)
            places, log_p = likeliest(logits) if fits(logits) else logits.float().log_softmax(-1).max(-1)[::-1]
            return list(zip(places.tolist(), log_p.tolist(), strict=True))
        union = sorted(set().union(*allowed))
        column = {token: i for i, token in enumerate(union)}
        barred = torch.ones(len(allowed), len(union), dtype=torch.bool)
        for row, some in enumerate(allowed):
            barred[row, [column[token] for token in some]] = False
        logits = self.logits(last, torch.tensor(union, device=last.device)).float()  # (B, allowed)
        best = logits.masked_fill(barred.to(logits.device), -torch.inf).log_softmax(-1).max(-1)
        return [(union[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        index = torch.tensor(rows, device=self.mask.device)
        if self.steps:
            self.steps.keep(index)
            return
        self.mask, self.encoded = self.mask[index], self.encoded[index]
        self.cache.batch_select_indices(index)

    def after(self, prefix: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Log-probabilities of some tokens among each other, behind an output that begins so. Shapes: (B, tokens)."""
        self.cache = None
        begun = torch.tensor([[self.start, *prefix]] * len(self.mask), device=self.mask.device)
        return self._by_modules(begun, torch.tensor(tokens, device=self.mask.device)).float().log_softmax(-1)

    def logits(self, last: Tensor, rows: Tensor | None) -> Tensor:
        """Logits of the token behind the last ones: all, or of some rows of the output layer. Shapes: (B, 1), (R) -> (B, R)."""
        if not self.steps:
            return self._by_modules(last, rows)
        states = self.steps(last[:, 0])
        if rows is not None and self._has_bare_head():
            return F.linear(states, self.model.get_output_embeddings().weight[rows])
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits if rows is None else logits[:, rows]

    def _by_modules(self, last: Tensor, rows: Tensor | None) -> Tensor:
        """The same as transformers computes it, of several tokens at once too. Shapes: (B, T), (R) -> (B, R)."""
        inputs = {"encoder_outputs": Encoded(self.encoded), "attention_mask": self.mask, "decoder_input_ids": last}
        states: list[Tensor] = []  # what the output layer reads, scaled as the family does it

        def take(read: Tensor) -> Tensor:
            states.append(read[:, -1])
            return read[:, :0]

        bare = rows is not None and self._has_bare_head()
        with output_layer_reads(self.model, take) if bare else nullcontext():
            out = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        if bare:
            return F.linear(states[0], self.model.get_output_embeddings().weight[rows])
        logits: Tensor = out.logits[:, -1]
        return logits if rows is None else logits[:, rows]

    def _has_bare_head(self) -> bool:
        """Whether rows of the output layer can be taken out: it is a plain matrix, neither adapted nor quantised."""
        head = self.model.get_output_embeddings()
        plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.bias is None
        return plain and self.model.config.model_type in BARE_HEADS


# What a decoder may write for one source, as an automaton over tokens made from a format's automaton over texts.
#
# Every output that it lets pass is of the format, has known types and none but the source's words; so nothing is malformed
# or invented. Each text is tokenised by itself, which needs a tokenizer whose pieces do not reach across white space.


Ids = tuple[int, ...]


class Path(NamedTuple):
    """Tokens still to be written, and the place they lead to."""

    ids: Ids
    target: Node


class Language:
    """What may be written for one source: `ways` gives the texts that lead on from a place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ways: Callable[[Node], Iterable[Way]]) -> None:
        self.ways = ways
        self.eos: int = tokenizer.eos_token_id
        self.ids = chunk_ids(tokenizer)
        self._opened: dict[Node, list[Path]] = {}

    def begin(self) -> set[Path]:
        """Every path from the start."""
        return set(self._paths(START))

    def step(self, paths: Iterable[Path], token: int) -> set[Path]:
        """The paths that remain after a token; none at the end."""
        remaining: set[Path] = set()
        for ids, target in paths:
            if ids[0] == token:
                remaining.update([Path(ids[1:], target)] if len(ids) > 1 else self._paths(target))
        return remaining

    def _paths(self, node: Node) -> list[Path]:
        if node not in self._opened:
            ways = self.ways(node) if node != END else ()
            self._opened[node] = [
                Path(self.ids(text, node == START) if text else (self.eos,), target) for text, target in ways
            ]
        return self._opened[node]


def chunk_ids(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, bool], Ids]:
    """A function that gives the tokens of a text at the start of an output, or behind a space."""

    def ids(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    lead = ids("x")

    @cache
    def chunk(text: str, first: bool) -> Ids:
        return ids(text) if first else ids(f"x {text}")[len(lead) :]

    return chunk


def allowed(paths: Iterable[Path]) -> set[int]:
    """The tokens that may come next."""
    return {path.ids[0] for path in paths}


# Targets as tokens, and the loss of a model that writes: what every text-to-text task shares.


def target_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[list[int]]:
    """The tokens to be written, an end token last, at most `limit` of them; a target that is cut has no end."""
    ids: list[list[int]] = tokenizer(text_target=list(texts), verbose=False)["input_ids"]
    return [row[:limit] for row in ids]


@contextmanager
def output_layer_reads(model: Any, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a model that writes compute logits of a part of the states alone; other threads may be inside of the same model."""
    thread = threading.get_ident()

    def chosen(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (choose(inputs[0]),) if threading.get_ident() == thread else None

    hook = model.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class WritingTask(SequenceTask):
    """A task whose answer to a text, or a pair of texts, a model writes."""

    prefix: str = ""

    def source(self, example: Example) -> str:
        return self.prefix + example.text

    def stack(self, targets: Sequence[list[int]]) -> Tensor:
        """Tokens to be written. Shapes: (B, target tokens)."""
        return pad(targets, IGNORE)

    def n_targets(self, labels: Tensor) -> Tensor:
        return (labels != IGNORE).sum(1)  # the end token among them

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """Cross-entropy summed over the tokens to be written, (B,); of what is padding no logits are computed.

        The decoder reads its start token and the tokens before each one, as in prediction; some families shift otherwise.
        """
        labels = batch["labels"]
        is_target = labels != IGNORE
        decoder_input = labels.masked_fill(~is_target, model.config.pad_token_id).roll(1, dims=1)
        decoder_input[:, 0] = model.config.decoder_start_token_id
        inputs = {**inputs_of(batch), "decoder_input_ids": decoder_input, "decoder_attention_mask": is_target.long()}
        with output_layer_reads(model, lambda states: states[is_target]):
            logits = model(**inputs, use_cache=False).logits  # (N, V)
        losses = F.cross_entropy(logits.float(), labels[is_target], reduction="none")  # (N,)
        return losses.new_zeros(labels.shape).masked_scatter(is_target, losses).sum(1)


# A T5's decoder a token at a time, with keys and values in arrays of its own. transformers copies all keys of a row at each
# token, and again where a row ends. Here they are written once and read in place. Everything but attention is computed by the
# model's own modules, adapted or not.


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
        # keys and values of a block, each (B, tokens, heads width): of the text, and of what is written
        self.read = [(each.k(encoded), each.v(encoded)) for each in cross]
        room = encoded.new_empty(len(encoded), FIRST, self.heads * self.width)
        self.written = [(room.clone(), room.clone()) for _ in cross]
        self.n = 0  # tokens written
        self._reserve(FIRST)

    def _reserve(self, room: int) -> None:
        """Room for so many tokens, and what attention adds for the distance of each two."""
        if self.n:
            self.written = [(torch.cat([k, k], 1), torch.cat([v, v], 1)) for k, v in self.written]
        self.bias = self.decoder.block[0].layer[0].SelfAttention.compute_bias(room, room)[0].contiguous()

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows alone, in this order; one that is named twice goes on as two."""
        self.texts, self.rows = self.texts[rows], self.rows[rows]
        if len(self.rows.unique()) < len(self.rows):
            self.written = [(keys[self.rows], values[self.rows]) for keys, values in self.written]
            self.rows = torch.arange(len(rows))

    def __call__(self, tokens: Tensor) -> Tensor:
        """The states that the output layer reads, behind one more token of each row. Shapes: (R,) to (R, d)."""
        if self.n == self.written[0][0].shape[1]:
            self._reserve(2 * self.n)
        x = self.decoder.embed_tokens(tokens[:, None])  # (R, 1, d)
        counts = torch.full_like(self.rows, self.n + 1)
        by_head, by_row = (len(tokens), self.heads, self.width), (len(tokens), 1, -1)
        for block, (keys, values), of_text in zip(self.decoder.block, self.written, self.read, strict=True):
            own, cross, feed_forward = block.layer
            attention, h = own.SelfAttention, own.layer_norm(x)
            keys[:, self.n].index_copy_(0, self.rows, attention.k(h)[:, 0])
            values[:, self.n].index_copy_(0, self.rows, attention.v(h)[:, 0])
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
