"""What DoRA costs beside plain LoRA: time and memory of a training step, ours and peft's, on a random BERT-base.

    python benchmarks/dora_cost.py                                  # query and value
    python benchmarks/dora_cost.py --targets query key value dense --repeats 5

A step is forward, backward and AdamW on random tokens. All models live in one process and take their steps in turn
(A B C D A B C D ...), since machines drift; ratios are taken turn by turn, and their median is printed. Memory is the highest
number of bytes that tensors held during a step, counted by torch's profiler in a step of its own: `step` leaves out what
was there before it (weights, optimizer state), `all` has the lot.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from machine import about
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

R, ALPHA, LR = 8, 16, 1e-3
MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Contender(NamedTuple):
    """A model with an adapter in it, ready to take steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def base(layers: int, dtype: str) -> nn.Module:
    """BERT-base with random weights and no dropout of its own."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).to(DTYPES[dtype])


def ours(model: nn.Module, targets: list[str], dora: bool, dropout: float) -> nn.Module:
    """The model with lorakit's adapter."""
    from lorakit.lora import LoraConfig, add_adapter

    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=tuple(targets), use_dora=dora, lora_dropout=dropout)
    add_adapter(model, config)
    return model


def theirs(model: nn.Module, targets: list[str], dora: bool, dropout: float) -> nn.Module:
    """The model with peft's adapter."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, use_dora=dora, lora_dropout=dropout)
    return peft.get_peft_model(model, config)


BUILD: dict[str, tuple[Callable[..., nn.Module], bool]] = {
    "lorakit lora": (ours, False),
    "lorakit dora": (ours, True),
    "peft lora": (theirs, False),
    "peft dora": (theirs, True),
}


def contender(name: str, arguments: argparse.Namespace) -> Contender:
    """One of the four, in training mode, with an optimizer over what it trains."""
    build, dora = BUILD[name]
    model = build(base(arguments.layers, arguments.dtype), arguments.targets, dora, arguments.dropout).train()
    return Contender(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR))


def take_step(contender: Contender, batch: dict[str, Tensor]) -> None:
    """Forward, backward, AdamW."""
    contender.model(**batch).loss.backward()
    contender.optimizer.step()
    contender.optimizer.zero_grad()


def seconds(contender: Contender, batch: dict[str, Tensor]) -> float:
    """The time of one step."""
    start = time.perf_counter()
    take_step(contender, batch)
    return time.perf_counter() - start


def peak_bytes(contender: Contender, batch: dict[str, Tensor]) -> tuple[int, int]:
    """The most that tensors held during a step: above what there was before it, and in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        take_step(contender, batch)
    raw = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in raw if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        most = max(most, held)
    tensors = [*contender.model.parameters(), *contender.model.buffers()]
    tensors += [value for state in contender.optimizer.state.values() for value in state.values()]
    return most, most + sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["query", "value"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(about())
    print(
        f"{arguments.layers} layers of 768, {arguments.dtype}, {arguments.rows} x {arguments.tokens} tokens, r {R}, "
        f"dropout {arguments.dropout}, on {' '.join(arguments.targets)}"
    )
    ids = torch.randint(1000, 30_000, (arguments.rows, arguments.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    contenders = {name: contender(name, arguments) for name in BUILD}
    for one in contenders.values():
        take_step(one, batch)  # makes the optimizer's state
    memory = {name: peak_bytes(one, batch) for name, one in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in BUILD}
    for _ in range(arguments.repeats):
        for name, one in contenders.items():
            times[name].append(seconds(one, batch))
    for name in BUILD:
        plain = name.replace("dora", "lora")
        ratio = statistics.median(a / b for a, b in zip(times[name], times[plain], strict=True))
        (step, everything), (plain_step, plain_everything) = memory[name], memory[plain]
        print(
            f"{name:<12} {statistics.median(times[name]) * 1000:7.0f} ms "
            f"({min(times[name]) * 1000:.0f} to {max(times[name]) * 1000:.0f})  "
            f"step {step / MIB:6.0f} MiB  all {everything / MIB:6.0f} MiB   "
            f"time {ratio:.2f}x, step {step / plain_step:.2f}x, all {everything / plain_everything:.2f}x of plain"
        )


if __name__ == "__main__":
    main()
