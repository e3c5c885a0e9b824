"""The plan of a run: the examples of each step, the learning rate, what is trained and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.data.batches import bucketed_batches, paired_batches
from lorakit.lora import SavedModule, hosts
from lorakit.recipe import ChosenTrain


@dataclass(frozen=True)
class Plan:
    """Which examples each step sees: a pure function of (seed, step), so a resumed run needs no sampler state."""

    lengths: Sequence[int]  # tokens of each example
    config: ChosenTrain
    targets: Sequence[int] = ()  # target tokens of each example, for text to text
    classes: Sequence[int] = ()  # of the examples, where those of a class are drawn in pairs

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

    @property
    def padding(self) -> float:
        """The share of padding among the tokens of the first epoch, 0 to 1."""
        batches = self._epoch(0)
        read = sum(len(batch) * max(self.lengths[i] for i in batch) for batch in batches)
        return 1 - sum(self.lengths) / read

    def batches(self, start: int) -> Iterator[Sequence[int]]:
        """The batches of all steps from `start` (0 is the first) to the end, as positions of examples."""
        for epoch in range(start // self.steps_per_epoch, math.ceil(self.steps / self.steps_per_epoch)):
            batches = self._epoch(epoch)
            begin = epoch * self.steps_per_epoch
            yield from batches[max(start - begin, 0) : self.steps - begin]

    def _epoch(self, epoch: int) -> Sequence[Sequence[int]]:
        size, seed = self.config.batch_size, self.config.seed
        if self.classes:
            return paired_batches(self.lengths, self.classes, size, seed, epoch)
        return bucketed_batches(self.lengths, size, seed, epoch, self.targets)


def lr_factor(step: int, steps: int, config: ChosenTrain) -> float:
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


def trained_parameters(
    model: nn.Module, adapter: str = "default"
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trainable parameters of an adapter by path: LoRA factors, and parameters of modules trained in full.

    The paths are those that it has as the only adapter of a model, named `default`.
    """
    saved_hosts = [path for path, host in hosts(model) if isinstance(host, SavedModule)]
    has_lora = any(True for _ in hosts(model))
    lora: dict[str, nn.Parameter] = {}
    saved: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and (not has_lora or f".adapters.{adapter}." in path):
            whole = not has_lora or any(path.startswith(host + ".") for host in saved_hosts)
            (saved if whole else lora)[as_if_alone(path, adapter)] = parameter
    return lora, saved


def as_if_alone(path: str, adapter: str) -> str:
    """The path of an adapter's tensor in a model that has no other one."""
    return path.replace(f".adapters.{adapter}.", ".adapters.default.")


def make_optimizer(
    lora: Mapping[str, nn.Parameter], saved: Mapping[str, nn.Parameter], config: ChosenTrain
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) with a group for LoRA factors and one for whole modules.

    With a ratio other than 1, B has its own group and a higher rate (LoRA+, Hayou et al. 2024, arXiv:2402.12354).
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
