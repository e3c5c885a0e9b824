"""The forwards and backwards of a step: neighbours in length of several members go through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.engine.members import Member, Turn
from lorakit.engine.memory import is_out_of_memory
from lorakit.engine.runtime import random_state, set_random_state
from lorakit.lora import hosts, routed
from lorakit.lora.places import BiasHost
from lorakit.tasks.base import Batch, Item

Piece = tuple[int, list[Item]]  # number of the turn, and some of its items


class Crowded(Exception):
    """Memory has no room for a pass of these turns; gradients are incomplete."""

    def __init__(self, turns: Sequence[int]) -> None:
        self.turns = turns


class Pass(NamedTuple):
    """One forward: a batch, and how many of its rows in a row belong to which turn."""

    batch: Batch
    rows: Sequence[tuple[int, int]]  # number of the turn, rows


def cut(turns: Sequence[Turn], most_tokens: int, device: torch.device, lanes: int = 1) -> list[list[Pass]]:
    """The passes of a step, those of each lane. A turn keeps to one lane; the lanes have about as much to do each.

    Members of one task share a pass where it stays within `most_tokens`, padding counted.
    """
    found: list[list[int]] = [[] for _ in range(min(lanes, len(turns)))]
    load = [0] * len(found)
    for number in sorted(range(len(turns)), key=lambda number: -turns[number].tokens):
        lane = load.index(min(load))
        found[lane].append(number)
        load[lane] += turns[number].tokens
    return [_passes(turns, sorted(numbers), most_tokens, device) for numbers in found]


def _passes(turns: Sequence[Turn], numbers: Sequence[int], most_tokens: int, device: torch.device) -> list[Pass]:
    pieces = [(number, piece) for number in numbers for piece in turns[number].pieces()]
    shared = [(number, piece) for number, piece in pieces if not turns[number].member.is_alone]
    packs = [[(number, piece)] for number, piece in pieces if turns[number].member.is_alone]
    by_task: dict[int, list[Piece]] = {}
    for number, piece in shared:
        by_task.setdefault(id(turns[number].member.task), []).append((number, piece))
    for some in by_task.values():
        packs += _packed(some, most_tokens)
    return [_pass(turns, sorted(pack, key=lambda part: part[0]), device) for pack in packs]


def _packed(pieces: Sequence[Piece], most_tokens: int) -> list[list[Piece]]:
    packs: list[list[Piece]] = []
    longest = rows = 0
    for number, piece in sorted(pieces, key=lambda part: -_longest(part[1])):
        if packs and (rows + len(piece)) * longest <= most_tokens:
            packs[-1].append((number, piece))
            rows += len(piece)
        else:
            packs.append([(number, piece)])
            longest, rows = _longest(piece), len(piece)
    return packs


def _longest(items: Sequence[Item]) -> int:
    return max(len(item["input_ids"]) for item in items)


def _pass(turns: Sequence[Turn], pack: Sequence[Piece], device: torch.device) -> Pass:
    batch = turns[pack[0][0]].member.task.collate([item for _, piece in pack for item in piece])
    return Pass(to_device(batch, device), [(number, len(piece)) for number, piece in pack])


def n_targets(lanes: Sequence[Sequence[Pass]], turns: Sequence[Turn]) -> Tensor:
    """The labelled positions of each turn. Shapes: (turns,)."""
    counts = torch.zeros(len(turns), dtype=torch.long)
    for batch, rows in chain.from_iterable(lanes):
        start = 0
        for number, n in rows:
            own = {key: value[start : start + n] for key, value in batch.items()}
            counts[number] += turns[number].member.task.n_targets(own)
            start += n
    return counts


def backward(
    model: nn.Module,
    lanes: Sequence[Sequence[Pass]],
    turns: Sequence[Turn],
    counts: Sequence[int],
    device: torch.device,
) -> Tensor:
    """This rank's part of each turn's mean loss over its `counts` labelled positions, detached, and its gradients.

    Several lanes are walked by a thread each, this one among them, in which torch's operations have one core.

    Shapes: (turns,).

    Raises:
        Crowded: memory had no room.
    """
    totals = torch.zeros(len(turns), device=device)
    if len(lanes) == 1:
        _backward(model, lanes[0], turns, counts, totals)
        return totals
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(lanes) - 1) as pool:
            walks = [pool.submit(_backward, model, passes, turns, counts, totals) for passes in lanes[1:]]
            # here, since each thread has an arena of freed memory of its own
            _backward(model, lanes[0], turns, counts, totals)
            for walk in walks:
                walk.result()
    finally:
        torch.set_num_threads(threads)
    return totals


def _backward(
    model: nn.Module, passes: Sequence[Pass], turns: Sequence[Turn], counts: Sequence[int], totals: Tensor
) -> None:
    """Add the turns' losses to `totals`, which no other lane has to do with."""
    device = totals.device
    for batch, rows in passes:
        members = [turns[number].member for number, _ in rows]
        if members[0].draws:  # and is alone
            set_random_state(members[0].random_state, device)
        try:
            with routed(model, [(member.adapter, n) for member, (_, n) in zip(members, rows, strict=True)]):
                losses = members[0].task.losses(model, batch)  # (B,)
                parts = losses.split([n for _, n in rows])
                means = [part.sum() / counts[number] for part, (number, _) in zip(parts, rows, strict=True)]
                torch.stack(means).sum().backward()
        except (RuntimeError, MemoryError) as err:
            if not is_out_of_memory(err):
                raise
            raise Crowded([number for number, _ in rows]) from err
        for mean, (number, _) in zip(means, rows, strict=True):
            totals[number] += mean.detach()
        if members[0].draws:
            members[0].random_state = random_state(device)


def most_lanes(model: nn.Module, members: Sequence[Member], device: torch.device) -> int:
    """In how many threads the members can go through the model at a time: one a core, where nothing in it is in the way.

    Cores that work on different members need not wait for each other after each operation. Dropout would be drawn from
    one generator by all threads, and a trained bias stands for a while in its module.
    """
    in_the_way = any(member.draws for member in members) or any(isinstance(host, BiasHost) for _, host in hosts(model))
    return 1 if device.type != "cpu" or in_the_way else torch.get_num_threads()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
