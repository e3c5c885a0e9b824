"""Source and target texts as items and batches, and the loss of a model that writes: what every text-to-text task shares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.tasks.base import IGNORE, Batch, Item, inputs_of, pad, pad_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def collate(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """A padded batch. Shapes: input_ids, attention_mask (B, T); labels (B, target tokens); source (B, characters)."""
    batch = pad_inputs(items, tokenizer)
    batch["labels"] = pad([item["labels"] for item in items], IGNORE)
    if "source" in items[0]:
        batch["source"] = pad([item["source"] for item in items], 0)
    return batch


def n_targets(batch: Batch) -> int:
    """Tokens to be written, the end token among them."""
    return int((batch["labels"] != IGNORE).sum())


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


def losses_of_rows(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over the tokens to be written, (B,); of what is padding no logits are computed.

    The decoder reads its start token and the tokens before each one, as in prediction; some families shift otherwise.
    """
    labels = batch["labels"]
    wanted = labels != IGNORE
    decoder_input = labels.masked_fill(~wanted, model.config.pad_token_id).roll(1, dims=1)
    decoder_input[:, 0] = model.config.decoder_start_token_id
    with output_layer_reads(model, lambda states: states[wanted]):
        logits = model(**inputs_of(batch), decoder_input_ids=decoder_input, use_cache=False).logits  # (N, V)
    losses = F.cross_entropy(logits.float(), labels[wanted], reduction="none")  # (N,)
    return losses.new_zeros(labels.shape).masked_scatter(wanted, losses).sum(1)
