"""AdaLoRA's budget: during training, ranks are assigned to the layers that need them (Zhang et al. 2023, arXiv:2303.10512).

It runs in hooks of the optimizer and keeps its state there, so the training loop needs no code for it, and a checkpoint
of the optimizer includes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.lora.layers import Layer, hosts
from lorakit.lora.updates import AdaLoRA

SENSITIVITY, UNCERTAINTY, KEPT = "sensitivity", "uncertainty", "kept"  # keys in the optimizer's state


class RankBudget:
    """Prunes the singular values of an adapter's AdaLoRA updates to an average of `target_r` per layer.

    The budget falls cubically from all ranks to the target between the first `warmup` and the last `rest` of the steps
    (eq. 12). The triplets of largest importance over all layers are kept: sensitivity times uncertainty,
    each a moving average of |weight * gradient| (eq. 8-11; here the weight just after its update).
    `orthogonality` is the weight of the regulariser (eq. 4).

    >>> targets = add_adapter(model, LoraConfig(r=8, update="adalora", target_modules=("query",)))
    >>> budget = RankBudget(model, target_r=4, steps=100)

    Raises:
        ConfigError: `target_r` is not between 1 and the adapter's rank, or the adapter has no AdaLoRA update.
    """

    def __init__(self, model: nn.Module, target_r: int, steps: int, name: str = "default") -> None:
        updates = [host.lora(name) for _, host in hosts(model, name) if isinstance(host, Layer)]
        self.updates = [update for update in updates if isinstance(update, AdaLoRA)]
        if not self.updates:
            raise ConfigError(f"adapter {name!r} has no AdaLoRA update; its config names another update")
        self.full = sum(len(update.lora_E) for update in self.updates)
        self.target = target_r * len(self.updates)
        if not 0 < self.target <= self.full:
            raise ConfigError(f"target_r = {target_r}: must be from 1 to the rank at the start")
        self.steps = steps
        self.warmup, self.rest, self.every = steps // 10, steps // 4, max(1, steps // 100)
        self.beta1 = self.beta2 = 0.85  # from the paper, as the weight below
        self.orthogonality = 0.1

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the hooks: from now on each optimizer step applies the budget."""
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda stepped, *_: self._after(stepped))

    def size(self, step: int) -> int:
        """The number of triplets over all layers after `step` steps."""
        falling = max(1, self.steps - self.warmup - self.rest)
        done = min(max((step - self.warmup) / falling, 0.0), 1.0)
        return round(self.target + (self.full - self.target) * (1 - done) ** 3)

    def regulariser(self) -> Tensor:
        """The mean over layers of |A A^T - I|^2 + |B^T B - I|^2."""
        terms = [
            (gram - torch.eye(len(gram), device=gram.device)).square().sum()
            for update in self.updates
            for gram in (update.lora_A @ update.lora_A.T, update.lora_B.T @ update.lora_B)
        ]
        total: Tensor = torch.stack(terms).sum()
        return total / len(self.updates)

    def _before(self) -> None:
        with torch.enable_grad():
            (self.orthogonality * self.regulariser()).backward()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        for update in self.updates:
            for weight in (update.lora_A, update.lora_B, update.lora_E):
                self._observe(weight, optimizer.state[weight])
        step = int(optimizer.state[self.updates[0].lora_E]["step"])
        size, is_final = self.size(step), step > self.steps - self.rest
        if size < self.full and not is_final and step % self.every == 0:
            self._choose(optimizer, size)
        for update in self.updates:
            state = optimizer.state[update.lora_E]
            if KEPT in state and (is_final or step % self.every == 0):  # in between, pruned ones may come back
                update.lora_E.mul_(state[KEPT])

    def _observe(self, weight: Tensor, state: dict[str, Any]) -> None:
        assert weight.grad is not None
        now = (weight * weight.grad).abs()
        mean = state.get(SENSITIVITY, torch.zeros_like(now)).lerp(now, 1 - self.beta1)
        spread = state.get(UNCERTAINTY, torch.zeros_like(now)).lerp((now - mean).abs(), 1 - self.beta2)
        state[SENSITIVITY], state[UNCERTAINTY] = mean, spread

    def _choose(self, optimizer: torch.optim.Optimizer, size: int) -> None:
        """Mark the `size` most important triplets of all layers to keep."""
        scores = [self._importance(update, optimizer) for update in self.updates]
        best = torch.zeros(self.full, device=scores[0].device)
        best[torch.cat(scores).topk(size).indices] = 1
        for update, mask in zip(self.updates, best.split([len(score) for score in scores]), strict=True):
            optimizer.state[update.lora_E][KEPT] = mask[:, None]

    def _importance(self, update: AdaLoRA, optimizer: torch.optim.Optimizer) -> Tensor:
        """One number per triplet: that of its singular value, plus the means over its two vectors. Shapes: (r,)."""
        A, B, E = (
            optimizer.state[weight][SENSITIVITY] * optimizer.state[weight][UNCERTAINTY]
            for weight in (update.lora_A, update.lora_B, update.lora_E)
        )
        importance: Tensor = E.flatten() + A.mean(1) + B.mean(0)
        return importance
