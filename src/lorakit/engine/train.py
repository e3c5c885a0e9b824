"""The training loop: a generator that yields after each step. Logging, saving, scoring and stopping are the caller's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lorakit.data.batches import bucketed_batches
from lorakit.engine.memory import half, is_out_of_memory
from lorakit.engine.ranks import ALONE, Ranks
from lorakit.engine.runtime import random_state, set_random_state
from lorakit.errors import ConfigError, NumericsError
from lorakit.recipe import TrainSection
from lorakit.tasks.base import Batch, Item, Task


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


@dataclass(frozen=True)
class Plan:
    """Which examples each step sees: a pure function of (seed, step), so that a resumed run needs no sampler state."""

    lengths: Sequence[int]  # tokens of each example
    config: TrainSection
    targets: Sequence[int] = ()  # tokens to be written for each example, where there are such

    @property
    def micro_batch_size(self) -> int:
        """Examples per forward."""
        return self.config.micro_batch_size or self.config.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.config.batch_size)

    @property
    def steps(self) -> int:
        planned = self.config.epochs * self.steps_per_epoch
        return min(planned, self.config.max_steps or planned)

    def batches(self, start: int) -> Iterator[list[int]]:
        """The batches of all steps from `start` (0 is the first) to the end, as positions of examples."""
        for epoch in range(start // self.steps_per_epoch, math.ceil(self.steps / self.steps_per_epoch)):
            batches = bucketed_batches(self.lengths, self.config.batch_size, self.config.seed, epoch, self.targets)
            begin = epoch * self.steps_per_epoch
            yield from batches[max(start - begin, 0) : self.steps - begin]


def lr_factor(step: int, steps: int, config: TrainSection) -> float:
    """The schedule's value at a step (0 is the first): a linear warm-up to 1, then linear or cosine decay, or none.

    The warm-up reaches 1 at the end of its last step; the decay reaches 0 just after the last step.
    """
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def make_optimizer(
    lora: Mapping[str, nn.Parameter], saved: Mapping[str, nn.Parameter], config: TrainSection
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) with a group for LoRA factors and one for whole modules.

    With a ratio other than 1, B has a group and a higher rate of its own (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
    """
    Bs = {name: p for name, p in lora.items() if config.loraplus_lr_ratio != 1 and name.endswith("lora_B")}
    rates = (
        ({name: p for name, p in lora.items() if name not in Bs}, config.lr),
        (Bs, config.lr * config.loraplus_lr_ratio),
        (saved, config.head_lr or config.lr),
    )
    groups = [
        {"params": list(parameters.values()), "lr": lr, "peak_lr": lr, "names": list(parameters)}
        for parameters, lr in rates
        if parameters
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def train(
    model: nn.Module,
    task: Task,
    items: Sequence[Item],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    start: int = 0,
    *,
    ranks: Ranks = ALONE,
    micro_batch_size: int | None = None,
) -> Iterator[Step]:
    """Train from step `start` (0 is the first) to the plan's end.

    The loss of a step is the mean over the labelled positions of the whole batch, so neither it nor its gradient
    depends on how the batch is shared among the ranks and cut into micro-batches. Where memory has no room for a
    micro-batch it is halved, for the rest of training too; `micro_batch_size` is what an earlier part has found.

    Raises:
        NumericsError: the loss or a gradient is not finite; the parameters are as the step before left them. With
            train.non_finite = skip the step is given with `skipped` instead.
        ConfigError: memory has no room for one example.
    """
    config = plan.config
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    micro = micro_batch_size or plan.micro_batch_size
    model.train()
    for number, positions in enumerate(plan.batches(start), start=start):
        own = [positions[i] for i in ranks.share([plan.lengths[i] for i in positions])]
        cut = partial(micro_batches, task, items, own, device)
        factor = lr_factor(number, plan.steps, config)
        set_rate(optimizer, factor)
        window = list(cut(micro))
        n_targets = max(1, ranks.total(sum(task.n_targets(batch) for batch in window)))
        state = random_state(device)
        while (own_loss := _backward(model, task, window, n_targets, device)) is None:
            optimizer.zero_grad()
            set_random_state(state, device)
            rows = min(micro, len(own))
            if rows == 1 or config.shard_base:  # whose processes must call the model equally often
                raise _no_room(rows, number, [plan.lengths[i] for i in own])
            micro = half(rows)
            window = list(cut(micro))
        if config.shard_base:
            blank = next(micro_batches(task, items, positions[:1], device, micro))
            for _ in range(max(ranks.gather(len(window))) - len(window)):
                (
                    task.losses(model, blank).sum() * 0
                ).backward()  # as often as the other ranks, who need our part of the base
        loss = ranks.sum_gradients(parameters, own_loss)
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        values = torch.stack([loss, grad_norm]).tolist()  # the step's one wait for the device
        is_finite = all(map(math.isfinite, values))
        if is_finite:
            optimizer.step()
        elif config.non_finite == "stop":
            with ranks.together():  # the sums are the same on all of them
                raise _not_finite(number, values[0], values[1], config.lr)
        optimizer.zero_grad()
        yield Step(
            number=number + 1,
            epoch=(number + 1) / plan.steps_per_epoch,
            loss=values[0],
            lr=config.lr * factor,
            grad_norm=values[1],
            examples=len(positions),
            tokens=sum(plan.lengths[i] for i in positions),
            micro_batch_size=micro,
            skipped=not is_finite,
        )


def micro_batches(
    task: Task, items: Sequence[Item], positions: Sequence[int], device: torch.device, micro: int
) -> Iterator[Batch]:
    """The batch of the items at these positions, cut into what one forward takes."""
    for j in range(0, len(positions), micro):
        yield to_device(task.collate([items[i] for i in positions[j : j + micro]]), device)


def _backward(
    model: nn.Module, task: Task, window: Sequence[Batch], n_targets: int, device: torch.device
) -> Tensor | None:
    """This rank's part of the mean loss over the step's labelled positions, detached, and the gradients of that part.

    None where memory had no room for them; the gradients are then incomplete.
    """
    total = torch.zeros((), device=device)
    try:
        for batch in window:
            loss = task.losses(model, batch).sum() / n_targets
            loss.backward()
            total += loss.detach()
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        return None
    return total


def _no_room(rows: int, number: int, lengths: Sequence[int]) -> ConfigError:
    return ConfigError(
        f"step {number + 1}: out of memory with {rows} of {len(lengths)} examples at a time, the longest of "
        f"{max(lengths)} tokens: a lower train.micro_batch_size or data.max_length, a smaller model.base or "
        "model.quantize = 'nf4' takes less"
    )


def _not_finite(number: int, loss: float, grad_norm: float, lr: float) -> NumericsError:
    return NumericsError(
        f"step {number + 1}: the loss is {loss}, the gradient's norm {grad_norm}; "
        f"training stopped before it could do harm; a lower train.lr (now {lr}) is the usual remedy"
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
