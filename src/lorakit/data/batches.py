"""Which examples make which batch: a pure function of the lengths, the seed and the epoch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from lorakit.data.example import Example
from lorakit.lora.variants import named_generator

POOL = 50  # batches sorted by length together; large enough for 3 % padding, small enough to keep batches random
GROUP = 8  # batches of a pool that are sorted by their targets; 5 % more padding of texts for a third of the targets' padding


def bucketed_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, targets: Sequence[int] = ()
) -> list[array[int]]:
    """The batches of one epoch as positions: every example once, texts of similar length together.

    All positions are shuffled and cut into pools of POOL batches; each pool is sorted by length and cut into
    batches; the batches are shuffled. The last batch may be smaller. Where `targets` has the lengths of what is to be
    written, each GROUP of neighbouring batches is sorted by them before it is cut: a text says little of its target's length.
    """
    generator = named_generator(seed, f"epoch {epoch}")
    order = torch.randperm(len(lengths), generator=generator)
    batches: list[array[int]] = []  # a quarter of the memory of lists: there may be many millions of examples
    for pool in order.split(POOL * batch_size):
        for group in _cut(sorted(pool.tolist(), key=lengths.__getitem__), GROUP * batch_size):
            own = sorted(group, key=targets.__getitem__) if targets else group
            batches += [array("q", batch) for batch in _cut(own, batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def _cut(positions: Sequence[int], size: int) -> list[list[int]]:
    return [list(positions[i : i + size]) for i in range(0, len(positions), size)]


def sorted_batches(lengths: Sequence[int], batch_size: int, most_tokens: int | None = None) -> list[list[int]]:
    """Batches for prediction: longest first (so that memory runs out at once or never), hardly any padding.

    A batch has `batch_size` examples, or fewer where so many would have more than `most_tokens` tokens, padding counted.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        size = batch_size if most_tokens is None else min(batch_size, max(1, most_tokens // longest))
        batches.append(order[start : start + size])
        start += size
    return batches


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Train and validation examples by seed, both in file order; validation gets `share`, and each at least one."""
    n = min(len(examples) - 1, max(1, round(len(examples) * share)))
    order = torch.randperm(len(examples), generator=named_generator(seed, "validation split")).tolist()
    chosen = set(order[:n])
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]
