"""Which examples make which batch: a pure function of the lengths, the seed and the epoch."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush

import torch

from lorakit.data.audit import labels_of, same_text
from lorakit.data.example import Example
from lorakit.errors import ConfigError
from lorakit.lora.inits import named_generator

POOL = 50  # batches sorted by length together; large enough for 3 % padding, small enough to keep batches random
ROUNDING = 1e-9  # of shares of whole numbers
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


def paired_batches(
    lengths: Sequence[int], classes: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[array[int]]:
    """The same where an example is compared with others of its class: each comes beside another one of its class.

    Which two, the epoch decides; of a class with an odd number one comes alone. A pair has about its own length in a batch.
    """
    generator = named_generator(seed, f"epoch {epoch}")
    waiting: dict[int, int] = {}
    pairs: list[list[int]] = []
    for i in torch.randperm(len(lengths), generator=generator).tolist():
        if (other := waiting.pop(classes[i], None)) is None:
            waiting[classes[i]] = i
        else:
            pairs.append([other, i])
    *rest, last = [*_cut([*waiting.values()], 2), []]  # the rest by twos too, so that no pair is divided
    if rest and len(rest[-1]) == 1:
        last = rest.pop()
    pairs += rest
    totals, positions = [sum(lengths[i] for i in pair) for pair in pairs], list[int]()
    for pool in torch.randperm(len(pairs), generator=generator).split(POOL * batch_size):
        positions += [i for place in sorted(pool.tolist(), key=totals.__getitem__) for i in pairs[place]]
    batches = [array("q", batch) for batch in _cut(positions + last, batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _cut(positions: Sequence[int], size: int) -> list[list[int]]:
    return [list(positions[i : i + size]) for i in range(0, len(positions), size)]


def sorted_batches(
    lengths: Sequence[int], batch_size: int, most_tokens: int | None = None, *, alike: bool = False
) -> list[list[int]]:
    """Batches for prediction: longest first (so that memory runs out at once or never), hardly any padding.

    A batch has `batch_size` examples, or fewer where so many would have more than `most_tokens` tokens, padding counted;
    with `alike`, those of one length alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        size = batch_size if most_tokens is None else min(batch_size, max(1, most_tokens // longest))
        batch = order[start : start + size]
        if alike:
            batch = [i for i in batch if lengths[i] == lengths[batch[0]]]
        batches.append(batch)
        start += len(batch)
    return batches


def split(
    examples: Sequence[Example], share: float, seed: int, *, by_group: bool = False
) -> tuple[list[Example], list[Example]]:
    """Train and validation examples by seed, both in file order; see `hold_out`."""
    chosen = set(hold_out(examples, share, seed, by_group=by_group))
    parts: tuple[list[Example], list[Example]] = [], []
    for i, example in enumerate(examples):
        parts[i in chosen].append(example)
    return parts


def number_folds(examples: Sequence[Example], folds: int, seed: int, *, by_group: bool = False) -> list[int]:
    """For each example the number (from 0) of the fold that holds it out; each fold is chosen as by `hold_out`.

    There are fewer than `folds` where equal texts, or with `by_group` a group, cannot be divided among them.
    """
    numbers, rest = [0] * len(examples), list(range(len(examples)))
    for number in range(folds - 1):
        of_rest = [examples[i] for i in rest]
        if number and len(_units(of_rest, range(len(rest)), by_group)) < 2:
            break
        chosen = set(hold_out(of_rest, 1 / (folds - number), seed, by_group=by_group))
        rest = [i for place, i in enumerate(rest) if place not in chosen]
        for i in rest:
            numbers[i] = number + 1
    return numbers


def hold_out(examples: Sequence[Example], share: float, seed: int, *, by_group: bool = False) -> list[int]:
    """The positions to hold out by seed, in order: `share` of them, but at least one and not all.

    Each label (of tags: each type of entity) has the same share of its examples in validation, as near as counts allow:
    first by labels that stand together, then by the label that most is missing of (Sechidis et al. 2011). Equal texts are
    on one side, and with `by_group` examples of one group, so that validation may be a little smaller than its share.

    Raises:
        ConfigError: with `by_group` all examples are in one group.
    """
    order = torch.randperm(len(examples), generator=named_generator(seed, "validation split")).tolist()
    units = _units(examples, order, by_group)
    if len(units) < 2 and by_group:
        raise ConfigError("data.group: all examples are in one group, which cannot be split; set data.validation")
    units = units if len(units) > 1 else [[i] for i in order]  # one text over and over
    counts = [Counter(name for i in unit for name in labels_of(examples[i]) or ("",)) for unit in units]
    of_label: dict[str, list[int]] = defaultdict(list)
    for number, count in enumerate(counts):
        for name in count:
            of_label[name].append(number)
    missing = {name: share * sum(counts[number][name] for number in of) for name, of in of_label.items()}
    room = min(len(examples) - 1, max(1, round(len(examples) * share)))
    open_units, chosen = dict.fromkeys(range(len(units))), list[int]()

    def choose(number: int) -> None:
        nonlocal room
        del open_units[number]
        chosen.extend(units[number])
        room -= len(units[number])
        for name, n in counts[number].items():
            missing[name] -= n

    alike: dict[Hashable, list[int]] = defaultdict(list)  # units by the labels that they have together
    for number, count in enumerate(counts):
        alike[frozenset(count)].append(number)
    for of in sorted(alike.values(), key=len):
        left_of_share = share * sum(len(units[number]) for number in of) + ROUNDING
        for number in of:
            if len(units[number]) <= min(left_of_share, room):
                left_of_share -= len(units[number])
                choose(number)
    # then a unit at a time of the label that most is missing of; labels of a single unit, and those that have their share, last
    left = {name: iter(of) for name, of in of_label.items()}
    ranks = {name: rank for rank, name in enumerate(of_label)}

    def urgency(name: str) -> tuple[bool, bool, float, int, str]:
        return missing[name] <= 0, len(of_label[name]) == 1, -missing[name], ranks[name], name

    queue = [urgency(name) for name in of_label]
    heapify(queue)
    while room and queue:
        entry = heappop(queue)
        name = entry[-1]
        if entry == urgency(name):  # else it is out of date
            fitting = next((i for i in left[name] if i in open_units and len(units[i]) <= room), None)
            if fitting is None:
                continue
            choose(fitting)
        heappush(queue, urgency(name))
    if not chosen:  # every group is larger than the share
        choose(min(open_units, key=lambda number: len(units[number])))
    return sorted(chosen)


def _units(examples: Sequence[Example], order: Sequence[int], by_group: bool) -> list[list[int]]:
    """Positions that stay together, in the given order."""
    first: dict[Hashable, int] = {}
    leader = list(range(len(examples)))  # of each position, one that it stays with (union-find)

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for i, example in enumerate(examples):
        for key in (("text", same_text(example)), *([("group", example.group)] if by_group else [])):
            leader[find(i)] = find(first.setdefault(key, i))
    units: dict[int, list[int]] = defaultdict(list)
    for i in order:
        units[find(i)].append(i)
    return list(units.values())
