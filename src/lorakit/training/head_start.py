"""Where a new head starts: at the linear probe, the best head over the frozen base.

A head that starts at random sends a random gradient through the adapter until it has learned something, and with few examples
those are most of the steps. Probing first, then training (Kumar et al. 2022, arXiv:2202.10054) spares them; and the probe,
scored before the first step, is what a run has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.inference.answer import Answered, batches_of
from lorakit.models import has_dropout
from lorakit.runtime.device import evaluating, to_device
from lorakit.tasks.base import Batch, Item, Task, inputs_of

EXAMPLES = 2000  # items that are enough to fit a linear layer; of more, every second, third, ... is taken
STRENGTH = 10.0  # of the fit against the penalty, as C of scikit-learn's LogisticRegression
ITERATIONS = 100
# Training starts at the probe times this, which gives the same answers with less confidence: a confident head has a small loss,
# so its gradient teaches the adapter little (docs/LOG.md, 2026-11-29).
SHRINK = 0.2


def probe(model: nn.Module, head: nn.Linear, task: Task, items: Sequence[Item]) -> dict[str, Tensor]:
    """Weight and bias, times SHRINK, of the head that fits these labelled items best over the model, by the task's loss.

    A head for numbers is not shrunk. The states are centred and divided by their root mean square, so that the penalty
    |W|^2 / (2 STRENGTH) means the same over each base, or by what dropout adds to them if that is more: a head that relies on
    differences smaller than dropout's noise would begin with a loss of hundreds. Shapes: weight (C, d), bias (C).
    """
    device = head.weight.device
    step = max(1, len(items) // EXAMPLES)
    some = [items[i] for i in range(0, len(items), step)]
    batches = [
        to_device(task.collate([some[i] for i in batch]), device) for batch in batches_of(model, task, some, device)
    ]
    with evaluating(model):
        states = _states_before(model, head, batches)
    every = torch.cat([state.flatten(0, -2) for state in states])
    mean = every.mean(0)
    size = _rms(every - mean).clamp_min(1e-6)
    if has_dropout(model):
        size = max(size, _dropout_noise(model, head, batches[0], states[0]))
    n = sum(int(batch["n_targets"].sum()) for batch in batches)
    fitted = nn.Linear(head.in_features, head.out_features, device=device)
    nn.init.zeros_(fitted.weight)
    nn.init.zeros_(fitted.bias)
    inputs = [(state - mean) / size for state in states]
    layers = dict(model.named_children())  # a CRF among them
    optimizer = torch.optim.LBFGS(fitted.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = fitted.weight.square().sum() / (2 * STRENGTH)
        pairs = zip(inputs, batches, strict=True)
        loss = loss + torch.stack([task.losses(Answered(fitted(x), layers), batch).sum() for x, batch in pairs]).sum()
        (loss / n).backward()
        return loss.detach() / n

    with torch.enable_grad():
        optimizer.step(closure)
    weight = fitted.weight.detach() / size
    shrink = 1.0 if task.info.wants == "number" else SHRINK
    return {"weight": shrink * weight, "bias": shrink * (fitted.bias.detach() - weight @ mean)}


def _states_before(model: nn.Module, head: nn.Linear, batches: Sequence[Batch]) -> list[Tensor]:
    """What the head reads in the forward of each batch, in the model's mode. Shapes: (B, ..., d)."""
    states: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: states.append(args[0].float()))
    try:
        with torch.inference_mode():
            for batch in batches:
                model(**inputs_of(batch))
    finally:
        hook.remove()
    return [state.clone() for state in states]  # out of inference mode


def _dropout_noise(model: nn.Module, head: nn.Linear, batch: Batch, states: Tensor) -> Tensor:
    """How far dropout moves these states of the batch, as root mean square; the generators are left as they were."""
    was_training = model.training
    with torch.random.fork_rng([states.device] if states.is_cuda else []):
        torch.manual_seed(0)
        try:
            noisy = _states_before(model.train(), head, [batch])[0]
        finally:
            model.train(was_training)
    return _rms(noisy - states)


def _rms(vectors: Tensor) -> Tensor:
    """Root mean square of the lengths of vectors (..., d)."""
    return vectors.square().sum(-1).mean().sqrt()
