"""Where a new head starts: at the linear probe, the best head over the frozen base, or over an adapter that has learned pairs.

A head that starts at random sends a random gradient through the adapter until it has learned something, and with few examples
those are most of the steps. Probing first, then training (Kumar et al. 2022, arXiv:2202.10054) spares them; and the probe,
scored before the first step, is what a run has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorakit.inference.answer import Answered, batches_of
from lorakit.lora import SavedModule, hosts, routed
from lorakit.lora.inits import named_generator
from lorakit.models import has_dropout
from lorakit.runtime.device import evaluating, random_state, set_random_state, to_device
from lorakit.tasks.base import Item, Task, inputs_of
from lorakit.tasks.similarity_losses import has_another, supervised
from lorakit.training.schedule import trained_parameters

if TYPE_CHECKING:
    from lorakit.training.prepare import Prepared

EXAMPLES = 2000  # items that are enough to fit a linear layer; of more, every second, third, ... is taken
STRENGTH = 10.0  # of the fit against the penalty, as C of scikit-learn's LogisticRegression
ITERATIONS = 100
# Training starts at the probe times this, which gives the same answers with less confidence: a confident head has a small loss,
# so its gradient teaches the adapter little (docs/LOG.md, 2026-11-29).
SHRINK = 0.2


States = dict[tuple[int, ...], Tensor]  # what a head reads of a text, by its tokens; (d) or (T, d)


def probe(
    model: nn.Module, head: nn.Linear, task: Task, items: Sequence[Item], known: States | None = None
) -> dict[str, Tensor]:
    """Weight and bias, times SHRINK, of the head that fits these labelled items best over the model, by the task's loss.

    A head for numbers is not shrunk. The states are centred and divided by their root mean square, so that the penalty
    |W|^2 / (2 STRENGTH) means the same over each base, or by what dropout adds to them if that is more: a head that relies on
    differences smaller than dropout's noise would begin with a loss of hundreds. Shapes: weight (C, d), bias (C).

    States that are `known` are not computed; the others are added to them.
    """
    device = head.weight.device
    step = max(1, len(items) // EXAMPLES)
    some = [items[i] for i in range(0, len(items), step)]
    known = {} if known is None else known
    with evaluating(model):
        _add_states(model, head, task, [item for item in some if _tokens(item) not in known], known)
    order = batches_of(model, task, some, device)
    batches = [to_device(task.collate([some[i] for i in batch]), device) for batch in order]
    states = [[known[_tokens(some[i])] for i in batch] for batch in order]
    every = torch.cat([state.view(-1, head.in_features) for batch in states for state in batch])
    mean = every.mean(0)
    size = _rms(every - mean).clamp_min(1e-6)
    if has_dropout(model):
        size = max(size, _dropout_noise(model, head, task, [some[i] for i in order[0]], states[0]))
    n = sum(int(batch["n_targets"].sum()) for batch in batches)
    fitted = nn.Linear(head.in_features, head.out_features, device=device)
    nn.init.zeros_(fitted.weight)
    nn.init.zeros_(fitted.bias)
    inputs = [pad_sequence([(state - mean) / size for state in batch], batch_first=True) for batch in states]
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


def _tokens(item: Item) -> tuple[int, ...]:
    return (*item["input_ids"], *item.get("token_type_ids", ()))


def _add_states(model: nn.Module, head: nn.Linear, task: Task, items: Sequence[Item], known: States) -> None:
    """Add what the head reads of these items in the model's mode, padding left out."""
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0].float()))
    try:
        with torch.inference_mode():
            for batch in batches_of(model, task, items, head.weight.device):
                own = [items[i] for i in batch]
                model(**inputs_of(to_device(task.collate(own), head.weight.device)))
                for item, state in zip(own, read.pop(), strict=True):  # (d) or (T, d)
                    n = len(item["input_ids"])
                    if state.dim() == 2:  # a row a token; Perceiver's one row is of the whole text
                        state = state[0] if len(state) == 1 < n else state[:n]
                    known[_tokens(item)] = state
    finally:
        hook.remove()
    for item in items:  # out of inference mode
        known[_tokens(item)] = known[_tokens(item)].clone()


def _dropout_noise(
    model: nn.Module, head: nn.Linear, task: Task, items: Sequence[Item], states: Sequence[Tensor]
) -> Tensor:
    """How far dropout moves the states of these items, as root mean square; the generators are left as they were."""
    was_training, noisy = model.training, States()
    before = random_state(states[0].device)
    torch.manual_seed(0)
    try:
        _add_states(model.train(), head, task, items, noisy)
    finally:
        model.train(was_training)
        set_random_state(before, states[0].device)
    return _rms(
        torch.cat([noisy[_tokens(item)] - state for item, state in zip(items, states, strict=True)]).view(
            -1, head.in_features
        )
    )


def _rms(vectors: Tensor) -> Tensor:
    """Root mean square of the lengths of vectors (..., d)."""
    return vectors.square().sum(-1).mean().sqrt()


# Few labels: the adapter first learns to put texts of one label near each other, then the head is fitted anew. With a few dozen
# texts cross-entropy teaches the adapter little, since the head fits them almost at once; of pairs there are many more (SetFit,
# Tunstall et al. 2022, arXiv:2209.11055). At 8 texts a class this gave 3 points (docs/LOG.md, 2026-11-29).

STEPS_PER_LABEL = 5  # at least
EXAMPLES_PER_STEP = 3  # at most; two labels need 10 steps of 16 examples, and of 64 some 20 (docs/LOG.md, 2026-11-30)
ROWS = 16  # about, of a step
LR = 4e-4
TEMPERATURE = 0.1
WARMUP = 4  # steps


def warm_up(prepared: Prepared) -> None:
    """Train the adapter by the contrastive loss for some steps of its own, then set its head to the linear probe over it."""
    model, adapter, task, items = prepared.model, prepared.adapter, prepared.task, prepared.parts["train"].flat
    copies = [host.adapters[adapter] for _, host in hosts(model, adapter) if isinstance(host, SavedModule)]
    head = [module for copy in copies for module in copy.modules() if isinstance(module, nn.Linear)][-1]
    labels = torch.as_tensor(task.collate(items)["labels"])  # (n,)
    steps = max(STEPS_PER_LABEL * len(prepared.labels), len(items) // EXAMPLES_PER_STEP)
    lora, _ = trained_parameters(model, adapter)
    optimizer = torch.optim.AdamW(lora.values(), lr=LR, weight_decay=prepared.plan.config.weight_decay)
    states: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: states.append(args[0].float().flatten(1)))
    model.train()
    try:
        with torch.enable_grad(), routed(model, [(adapter, 0)]):
            for step in range(steps):
                rows = balanced(labels, named_generator(prepared.recipe.train.seed, f"contrast {step}"))
                batch = to_device(task.collate([items[i] for i in rows.tolist()]), prepared.device)
                model(**inputs_of(batch))
                losses = supervised(states.pop(), labels[rows].to(prepared.device), TEMPERATURE)
                (losses.sum() / has_another(labels[rows]).sum()).backward()
                nn.utils.clip_grad_norm_(lora.values(), prepared.plan.config.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = LR * min((step + 1) / WARMUP, 1 - step / steps)
                optimizer.step()
                model.zero_grad()
    finally:
        hook.remove()
    with routed(model, [(adapter, 0)]):
        head.load_state_dict(probe(model, head, task, items))
    prepared.ranks.copy_first_([*lora.values(), *head.parameters()])


def balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Positions of about ROWS examples, drawn at random: of some labels, or all, equally many, if possible two at least.

    Shapes: labels (n,).
    """
    every = labels.unique()
    each = max(2, ROWS // len(every))
    some = every[torch.randperm(len(every), generator=generator)[: max(2, ROWS // each)]]
    places = [(labels == label).nonzero()[:, 0] for label in some]
    return torch.cat([of[torch.randperm(len(of), generator=generator)[:each]] for of in places])
