"""A start for few labels: the adapter first learns to put texts of one label near each other, then the head is fitted anew.

With a few dozen texts cross-entropy teaches the adapter little, since the head fits them almost at once; of pairs there are many
more (SetFit, Tunstall et al. 2022, arXiv:2209.11055). At 8 texts a class this gave 3 points (docs/LOG.md, 2026-11-29).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.lora import SavedModule, hosts, routed
from lorakit.lora.inits import named_generator
from lorakit.runtime.device import to_device
from lorakit.tasks.base import inputs_of
from lorakit.tasks.similarity_losses import has_another, supervised
from lorakit.training.head_start import probe
from lorakit.training.prepare import Prepared, trained_parameters

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
