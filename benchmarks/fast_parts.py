"""What each fast part brings to training by itself: CPU time of an epoch, interleaved in one process.

    python benchmarks/fast_parts.py [--data FILE] [--examples 512] [--repeats 5] [--threads 1] [--dtype bf16] [--dropout 0.1]

`minilm`, batches of 32. "passes" has attention, dropout and norms in one pass each, "packed" the blocks over packed tokens.
Three sets of adapted layers: query and value (r 4), all linear layers (r 8), and all linear layers of the upper half (r 8), where
the blocks below are computed once before the first epoch ("kept"; the time of that is printed by itself). Ratios are medians
over epochs, pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import about

from lorakit.data.batches import sorted_batches
from lorakit.data.example import Example
from lorakit.data.read import read
from lorakit.lora import LoraConfig, Prefix, add_adapter, frozen_blocks, fuse, read_first_row
from lorakit.lora.packed import pack
from lorakit.lora.speedups import pass_once
from lorakit.models import attend_in_few_passes, load_base
from lorakit.recipe import TrainSection
from lorakit.runtime.device import DTYPES, cast_frozen_
from lorakit.tasks.base import inputs_of
from lorakit.tasks.sequence import SequenceClassification
from lorakit.training.loop import Member, train
from lorakit.training.schedule import Plan, make_optimizer, trained_parameters

BUNDLED = Path(__file__).parent.parent / "src" / "lorakit" / "demo" / "reviews-train.csv"
SETTINGS: Mapping[str, dict[str, Any]] = {
    "query, value": {"target_modules": ("query", "value"), "r": 4},
    "all linear": {"r": 8},
    "all linear, upper half": {"r": 8, "layers_to_transform": (3, 4, 5)},
}
PARTS = {
    "query, value": ("plain", "fused+row", "fused+row+passes", "fused+row+passes+packed"),
    "all linear": ("plain", "fused+row", "fused+row+passes", "fused+row+passes+packed"),
    "all linear, upper half": ("plain", "fused+row", "fused+row+passes+packed", "fused+row+passes+kept"),
}


def epoch_of(
    parts: Sequence[str], settings: Mapping[str, Any], examples: Sequence[Example], dtype: str, dropout: float
) -> Callable[[], float]:
    """A function that trains an epoch and gives its CPU seconds."""
    labels = tuple(sorted({str(example.label) for example in examples}))
    base = load_base("minilm", "sequence_classification", labels=labels, dropout=dropout)
    add_adapter(base.model, LoraConfig(lora_alpha=16, modules_to_save=base.saved_modules, **settings))
    cast_frozen_(base.model, DTYPES[dtype])
    task = SequenceClassification(base.tokenizer, labels, 128)
    items = [item for of_example in task.encode(examples) for item in of_example]
    section = TrainSection(epochs=1, batch_size=32, lr=1e-3)
    plan = Plan([len(item["input_ids"]) for item in items], section)
    optimizer = make_optimizer(*trained_parameters(base.model), section)
    if "fused" in parts:
        fuse(base.model)
    if "row" in parts:
        read_first_row(base.model)
    if "passes" in parts:
        attend_in_few_passes(base.model)
        pass_once(base.model)
    if "packed" in parts:
        pack(base.model)
    if "kept" in parts:
        start = time.process_time()
        batches = (inputs_of(task.collate([items[i] for i in batch])) for batch in sorted_batches(plan.lengths, 64))
        prefix = Prefix(base.model, frozen_blocks(base.model))
        prefix.fill(batches, sum(plan.lengths))
        print(f"  {prefix}; {time.process_time() - start:.1f} CPU s")

    def epoch() -> float:
        begin = time.process_time()
        for _ in train(base.model, [Member(task, items, optimizer, plan, draws=dropout > 0)]):
            pass
        return time.process_time() - begin

    return epoch


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(BUNDLED))
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the base; what is kept needs 0")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    examples = read(arguments.data).examples[: arguments.examples]
    print(about())
    for name, settings in SETTINGS.items():
        print(f"{name}:")
        of_name = [parts for parts in PARTS[name] if not (arguments.dropout and "kept" in parts)]
        epochs = {
            parts: epoch_of(parts.split("+"), settings, examples, arguments.dtype, arguments.dropout)
            for parts in of_name
        }
        times: dict[str, list[float]] = {parts: [] for parts in epochs}
        for repeat in range(arguments.repeats + 1):
            for parts, epoch in epochs.items():
                taken = epoch()
                if repeat:  # the first one warms up
                    times[parts].append(taken)
        for parts, taken in times.items():
            gain = statistics.median(a / b for a, b in zip(times["plain"], taken, strict=True))
            print(
                f"  {parts:<24} {statistics.median(taken):6.2f} CPU s an epoch   {gain:.2f}x as fast as plain",
                flush=True,
            )


if __name__ == "__main__":
    main()
