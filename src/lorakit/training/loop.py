"""The training loop: a generator that yields after each step. The caller logs, saves, scores and stops.

The loop trains one adapter or many. Each member of a joint run has its own examples, order, optimizer and schedule; a
plain run is a joint run of one. A step, in the order of this file:

    next_batch        each member's next batch, this process's share of it, cut into micro-batches
    plan_forwards     micro-batches of members that share a task go through the model together, routed to their adapters
    backward          the loss of each row, divided by its member's number of labelled positions, and its gradient
    update            sum the gradients over processes, clip, step the optimizer; skipped where they are not finite
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.inference.answer import Answered
from lorakit.lora import routed
from lorakit.runtime.device import is_out_of_memory, random_state, set_random_state, to_device
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.events import Step
from lorakit.tasks.base import Batch, Item, Task, inputs_of, rows_of
from lorakit.training.schedule import Plan, lr_factor

# on a CPU or not: the most of several members in one forward; more miss its caches
FORWARD_TOKENS = {True: 1536, False: 32768}
# Over an fp16 base gradients below 6e-8 would be zero. The loss is multiplied by a scale that is halved where they overflow and
# doubled after some steps (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2); a step that overflows is computed again.
LOSS_SCALE, LEAST_SCALE, STEPS_TO_DOUBLE = 2.0**16, 2.0, 2000


@dataclass(eq=False)
class Member:
    """An adapter in training: its examples, their order, its optimizer and its progress."""

    task: Task
    items: Sequence[Any]  # what `rows_of` takes: items, or the items of each example
    optimizer: torch.optim.Optimizer
    plan: Plan
    adapter: str = "default"
    done: int = 0  # steps
    micro_batch_size: int | None = None  # if memory does not fit the plan's
    draws: bool = True  # whether its forwards have dropout
    loss_scale: float = 1.0  # of an fp16 base; 1 for none
    random_state: Mapping[str, Tensor] = field(default_factory=lambda: random_state(torch.device("cpu")))
    best: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # its best parameters, by name
    _batches: Iterator[Sequence[int]] | None = field(default=None, repr=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same, by name."""
        groups = self.optimizer.param_groups
        return {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}

    @property
    def rows(self) -> int:
        """Examples per forward."""
        return self.micro_batch_size or self.plan.micro_batch_size

    def next_batch(self, ranks: Ranks) -> MemberBatch:
        """The batch of the next step, and this process's share of it."""
        if self._batches is None:
            self._batches = self.plan.batches(self.done)
        positions = next(self._batches)
        shares = ranks.share([self.plan.lengths[i] for i in positions])
        return MemberBatch(self, positions, [positions[i] for i in shares])


@dataclass(frozen=True, eq=False)
class MemberBatch:
    """A member's batch in a step, as positions of its items; `own` are those of this process."""

    member: Member
    positions: Sequence[int]
    own: Sequence[int]


class Forward(NamedTuple):
    """Rows that go through the model together, in the order of `parts`: a member's batch and its number of rows."""

    inputs: Batch
    parts: Sequence[tuple[MemberBatch, int]]
    n_targets: Tensor  # (B,), on the CPU: the labelled positions of each row


class OutOfMemory(Exception):
    """A forward of these members ran out of memory; gradients are incomplete."""

    def __init__(self, batches: Sequence[MemberBatch]) -> None:
        self.batches = batches


def train(model: nn.Module, members: list[Member], *, ranks: Ranks = ALONE) -> Iterator[dict[Member, Step]]:
    """Train the members from where they are, one step of each at a time, to the end of each plan.

    The caller stops a member by removing it from `members`.

    The loss of a step is the mean over the labelled positions of the member's whole batch, so neither it nor its gradient
    depends on how the batch is divided among ranks and micro-batches or combined with other members'.
    A step whose loss or gradient is not finite changes nothing; the caller decides what to do. If memory runs out, members
    go through the model one by one from then on, and after that a member's micro-batch is halved.

    Raises:
        ConfigError: a single example does not fit into memory.
    """
    device = next(model.parameters()).device
    most_tokens = FORWARD_TOKENS[device.type == "cpu"]
    model.train()
    while live := [member for member in members if member.done < member.plan.steps]:
        batches = [member.next_batch(ranks) for member in live]
        forwards = plan_forwards(batches, most_tokens, device)
        own = dict.fromkeys(batches, 0)  # labelled positions of each member's batch: this process's
        for _, parts, n_targets in forwards:
            for (batch, _), n in zip(parts, n_targets.split([rows for _, rows in parts]), strict=True):
                own[batch] += int(n.sum())
        totals = ranks.sum_(torch.tensor(list(own.values()))).clamp_min(1).tolist()
        counts = dict(zip(batches, totals, strict=True))
        states = [member.random_state for member in live]
        while True:
            try:
                losses = backward(model, forwards, counts, device)
                if not (overflown := _overflown(batches, losses, ranks)):
                    break
                for member in overflown:
                    member.loss_scale /= 2
            except OutOfMemory as err:
                if len(err.batches) > 1:
                    most_tokens = 0
                else:
                    _halve_micro_batch(err.batches[0])
                forwards = plan_forwards(batches, most_tokens, device)
            for member, state in zip(live, states, strict=True):
                member.optimizer.zero_grad()
                member.random_state = state
        if batches[0].member.plan.config.shard_base:
            _match_forward_count(model, batches[0], len(forwards), ranks, device)
        yield {batch.member: update(batch, losses[batch], ranks) for batch in batches}


def plan_forwards(batches: Sequence[MemberBatch], most_tokens: int, device: torch.device) -> list[Forward]:
    """The forwards of a step.

    Members of one task share a forward of at most `most_tokens`, padding included; micro-batches of similar length go together.
    """
    alone: list[list[tuple[MemberBatch, list[Item]]]] = []
    by_task: dict[int, list[tuple[MemberBatch, list[Item]]]] = {}
    for batch in batches:
        member = batch.member
        # not shared where memory is short, or where dropout must be drawn as in a plain run
        info = member.task.info
        is_alone = member.draws or (member.micro_batch_size or member.plan.config.micro_batch_size) is not None
        is_alone = is_alone or info.contrasts
        size = len(batch.own) if info.contrasts else member.rows  # see `_backward_in_pieces`
        for start in range(0, len(batch.own), size):
            items = rows_of(info, [member.items[i] for i in batch.own[start : start + size]])
            if is_alone:
                alone.append([(batch, items)])
            else:
                by_task.setdefault(id(member.task), []).append((batch, items))
    packed: list[list[tuple[MemberBatch, list[Item]]]] = []
    for parts in by_task.values():
        longest = rows = 0
        for batch, items in sorted(parts, key=lambda part: -_longest(part[1])):
            if rows and (rows + len(items)) * longest <= most_tokens:
                packed[-1].append((batch, items))
                rows += len(items)
            else:
                packed.append([(batch, items)])
                longest, rows = _longest(items), len(items)
    order = {batch: number for number, batch in enumerate(batches)}
    forwards = []
    for parts in (*alone, *packed):
        parts.sort(key=lambda part: order[part[0]])
        inputs = parts[0][0].member.task.collate([item for _, items in parts for item in items])
        n_targets = inputs.pop("n_targets")
        forwards.append(Forward(to_device(inputs, device), [(batch, len(items)) for batch, items in parts], n_targets))
    return forwards


def _longest(items: Sequence[Item]) -> int:
    return max(len(item["input_ids"]) for item in items)


def backward(
    model: nn.Module, forwards: Sequence[Forward], counts: Mapping[MemberBatch, int], device: torch.device
) -> dict[MemberBatch, Tensor]:
    """Accumulate each member's gradient; returns this process's part of its mean loss over `counts` labelled
    positions, detached.

    Raises:
        OutOfMemory: a forward or backward ran out of memory.
    """
    losses = {batch: torch.zeros((), device=device) for batch in counts}
    for inputs, parts, _ in forwards:
        first = parts[0][0].member
        if first.draws:  # then it is alone
            set_random_state(first.random_state, device)
        try:
            with routed(model, [(batch.member.adapter, rows) for batch, rows in parts]):
                batch = parts[0][0]
                pieces = math.ceil(len(batch.own) / first.rows) if first.task.info.contrasts else 1
                if pieces > 1:
                    means = [_backward_in_pieces(model, first, inputs, counts[batch], pieces, device)]
                else:
                    by_row = first.task.losses(model, inputs)  # (B,)
                    shares = zip(parts, by_row.split([rows for _, rows in parts]), strict=True)
                    means = [share.sum() / counts[batch] for (batch, _), share in shares]
                    scaled = [mean * batch.member.loss_scale for mean, (batch, _) in zip(means, parts, strict=True)]
                    torch.stack(scaled).sum().backward()
        except (RuntimeError, MemoryError) as err:
            if not is_out_of_memory(err):
                raise
            raise OutOfMemory([batch for batch, _ in parts]) from err
        for mean, (batch, _) in zip(means, parts, strict=True):
            losses[batch].add_(mean.detach())
        if first.draws:
            first.random_state = random_state(device)
    return losses


def _backward_in_pieces(
    model: nn.Module, member: Member, batch: Batch, n: int, pieces: int, device: torch.device
) -> Tensor:
    """Accumulate the gradient of a loss that compares all rows of a batch, of which only a piece is in memory at a time.

    GradCache (Gao et al. 2021, arXiv:2101.06983): the vectors of all rows without a graph, the gradient of the loss with respect
    to them, then each piece again, from the same random state so that dropout is the same, and its vectors' gradient through the
    model. Loss and gradient are those of one forward over the pieces' dropout. Returns the loss divided by `n`, detached.
    """
    texts = inputs_of(batch)
    order = texts["attention_mask"].sum(1).argsort()  # (B,): texts of similar length together
    cuts = [rows for rows in order.tensor_split(pieces) if len(rows)]

    def vectors_of(rows: Tensor) -> Tensor:
        some = {key: value[rows] for key, value in texts.items()}
        columns = some["attention_mask"].any(0)
        vectors: Tensor = model(**{key: value[:, columns] for key, value in some.items()}).logits
        return vectors.float()

    states, vectors = [], []
    with torch.no_grad():
        for rows in cuts:
            states.append(random_state(device))
            vectors.append(vectors_of(rows))
    whole = torch.cat(vectors)[order.argsort()].requires_grad_()
    mean = member.task.losses(Answered(whole, {}), batch).sum() / n
    (gradient,) = torch.autograd.grad(mean * member.loss_scale, whole)
    for rows, state in zip(cuts, states, strict=True):
        set_random_state(state, device)
        vectors_of(rows).backward(gradient[rows])
    return mean.detach()


def _overflown(batches: Sequence[MemberBatch], losses: Mapping[MemberBatch, Tensor], ranks: Ranks) -> list[Member]:
    """The members whose scaled gradients, of a finite loss, are beyond fp16 on a rank; on all ranks the same."""
    scaled = [batch for batch in batches if batch.member.loss_scale > LEAST_SCALE]
    if not scaled:
        return []
    flags = []
    for batch in scaled:
        grads = [p.grad for p in batch.member.parameters if p.grad is not None]
        flags.append(bool(losses[batch].isfinite()) and not bool(nn.utils.get_total_norm(grads).isfinite()))
    anywhere = ranks.sum_(torch.tensor(flags).long()).tolist()
    return [batch.member for batch, flag in zip(scaled, anywhere, strict=True) if flag]


def _halve_micro_batch(batch: MemberBatch) -> None:
    """Halve the member's micro-batch from now on."""
    member, rows = batch.member, min(batch.member.rows, len(batch.own))
    if rows == 1 or member.plan.config.shard_base:  # all processes must call a sharded model equally often
        lengths = [member.plan.lengths[i] for i in batch.own]
        raise ConfigError(
            f"step {member.done + 1}: out of memory with {rows} of {len(lengths)} examples at a time, the longest of "
            f"{max(lengths)} tokens; lower train.micro_batch_size or data.max_length, or use a smaller model.base or "
            "model.quantize = 'nf4'"
        )
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()  # memory of the failed attempt
    member.micro_batch_size = (rows + 1) // 2


def _match_forward_count(
    model: nn.Module, batch: MemberBatch, forwards: int, ranks: Ranks, device: torch.device
) -> None:
    """Run dummy forwards of a sharded base (FSDP) until every process has made equally many.

    A process with fewer micro-batches than another still has to provide its shard of each layer.
    """
    member = batch.member
    blank = to_device(member.task.collate(rows_of(member.task.info, [member.items[batch.positions[0]]])), device)
    for _ in range(max(ranks.gather(forwards)) - forwards):
        (member.task.losses(model, blank).sum() * 0).backward()


def update(batch: MemberBatch, loss: Tensor, ranks: Ranks) -> Step:
    """Sum the gradients over the ranks, clip them and step the optimizer, unless something is not finite."""
    member, plan = batch.member, batch.member.plan
    factor = lr_factor(member.done, plan.steps, plan.config)
    for group in member.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    loss = ranks.sum_gradients(member.parameters, loss)
    if member.loss_scale != 1:
        for parameter in member.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(member.loss_scale)
    grad_norm = nn.utils.clip_grad_norm_(member.parameters, plan.config.max_grad_norm)
    values = torch.stack([loss, grad_norm]).tolist()  # waits for the device
    is_finite = all(map(math.isfinite, values))
    if is_finite:
        member.optimizer.step()
    member.optimizer.zero_grad()
    member.done += 1
    if member.loss_scale != 1 and member.done % STEPS_TO_DOUBLE == 0:
        member.loss_scale *= 2
    return Step(
        number=member.done,
        epoch=member.done / plan.steps_per_epoch,
        loss=values[0],
        lr=plan.config.lr * factor,
        grad_norm=values[1],
        examples=len(batch.positions),
        tokens=sum(plan.lengths[i] for i in batch.positions),
        micro_batch_size=member.rows,
        skipped=not is_finite,
    )
