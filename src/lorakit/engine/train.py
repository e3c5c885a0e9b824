"""The training loop: a generator that yields after each step. Logging, saving, scoring and stopping are the caller's.

One loop trains one adapter or many: each member of a joint run has its own data, order, optimizer and schedule, and a plain
run is a joint run of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.engine.members import Member, Turn
from lorakit.engine.memory import half
from lorakit.engine.passes import Crowded, backward, cut, most_lanes, n_targets, to_device
from lorakit.engine.plan import lr_factor, set_rate
from lorakit.engine.ranks import ALONE, Ranks
from lorakit.errors import ConfigError

PASS_TOKENS = {"cpu": 1536, "cuda": 32768}  # of several members in one forward; more do not fit a CPU's caches


@dataclass(frozen=True)
class Step:
    """What one optimizer update did. `loss` is the mean over labelled positions, `tokens` counts real ones."""

    number: int  # from 1
    epoch: float  # epochs done after this step
    loss: float
    lr: float
    grad_norm: float  # before clipping
    examples: int
    tokens: int
    micro_batch_size: int  # examples per forward, of each process
    skipped: bool = False  # loss or gradient were not finite, so there was no update
    member: int = 0


def train(model: nn.Module, members: Sequence[Member], *, ranks: Ranks = ALONE) -> Iterator[list[Step]]:
    """Train each member from where it is to its plan's end, or until it is `ended`; a step of each at a time.

    The loss of a step is the mean over the labelled positions of the member's whole batch, so neither it nor its gradient
    depends on how the batch is shared among the ranks, cut into micro-batches and put together with other members'.
    A step whose loss or gradient is not finite changes nothing; what becomes of it is the caller's. Where memory has no
    room for several members at a time they go one by one, and then a member's micro-batch is halved, both for good.

    Raises:
        ConfigError: memory has no room for one example.
    """
    device = members[0].parameters[0].device
    most_tokens, lanes = PASS_TOKENS[device.type], most_lanes(model, members, device)
    model.train()
    while live := [member for member in members if not member.ended]:
        turns = [member.turn(ranks) for member in live]
        passes = cut(turns, most_tokens, device, lanes)
        counts = ranks.sum_(n_targets(passes, turns)).clamp_min(1).tolist()
        states = [member.random_state for member in live]
        while True:
            try:
                losses = backward(model, passes, turns, counts, device)
                break
            except Crowded as crowded:
                for member, state in zip(live, states, strict=True):
                    member.optimizer.zero_grad()
                    member.random_state = state
                if len(crowded.turns) > 1 or len(passes) > 1:
                    most_tokens, lanes = 0, 1
                else:
                    _make_room(turns[crowded.turns[0]])
                passes = cut(turns, most_tokens, device, lanes)
        _answer_with_the_others(model, turns[0], len(passes[0]), ranks, device)
        yield [_update(turn, loss, members.index(turn.member), ranks) for turn, loss in zip(turns, losses, strict=True)]


def _make_room(turn: Turn) -> None:
    """Halve the micro-batches of a member whose rows have no room."""
    member, rows = turn.member, min(turn.member.rows, len(turn.own))
    if rows == 1 or member.plan.config.shard_base:  # whose processes must call the model equally often
        lengths = [member.plan.lengths[i] for i in turn.own]
        raise ConfigError(
            f"step {member.done + 1}: out of memory with {rows} of {len(lengths)} examples at a time, the longest of "
            f"{max(lengths)} tokens: a lower train.micro_batch_size or data.max_length, a smaller model.base or "
            "model.quantize = 'nf4' takes less"
        )
    member.micro_batch_size = half(rows)


def _answer_with_the_others(model: nn.Module, turn: Turn, passes: int, ranks: Ranks, device: torch.device) -> None:
    """Where each process holds a part of the base, call the model as often as the others, who need our part."""
    task, items = turn.member.task, turn.member.items
    if turn.member.plan.config.shard_base:
        blank = to_device(task.collate([items[turn.positions[0]]]), device)
        for _ in range(max(ranks.gather(passes)) - passes):
            (task.losses(model, blank).sum() * 0).backward()


def _update(turn: Turn, loss: Tensor, number: int, ranks: Ranks) -> Step:
    """Sum the gradients over the ranks, clip them and take the step, unless something in them is not finite."""
    member, plan = turn.member, turn.member.plan
    factor = lr_factor(member.done, plan.steps, plan.config)
    set_rate(member.optimizer, factor)
    loss = ranks.sum_gradients(member.parameters, loss)
    grad_norm = nn.utils.clip_grad_norm_(member.parameters, plan.config.max_grad_norm)
    values = torch.stack([loss, grad_norm]).tolist()  # waits for the device
    is_finite = all(map(math.isfinite, values))
    if is_finite:
        member.optimizer.step()
    member.optimizer.zero_grad()
    member.done += 1
    member.ended = member.done == plan.steps
    return Step(
        number=member.done,
        epoch=member.done / plan.steps_per_epoch,
        loss=values[0],
        lr=plan.config.lr * factor,
        grad_norm=values[1],
        examples=len(turn.positions),
        tokens=sum(plan.lengths[i] for i in turn.positions),
        micro_batch_size=member.rows,
        skipped=not is_finite,
        member=number,
    )
