"""Memory, speed and error of LoRA over a base in fp32, bf16, int8 and NF4, on models of BERT-base's and t5-small's shape.

    python benchmarks/quantized_base.py                      # both shapes, 3 rounds
    python benchmarks/quantized_base.py --model t5-small --rounds 1

Every measurement is a process of its own, since peaks of memory cannot be told apart inside of one; the kinds of base are
interleaved (fp32, bf16, int8, nf4, fp32, ...), and medians of the rounds are printed. Weights are random, as each model's own
initialisation draws them, so the errors compare formats and say little of a trained model. int8 and nf4 compute in
fp32 here and leave the embeddings in fp32; with model.dtype = "bf16" a recipe halves those too.

Columns: MB that the base's parameters take; MB of the process above what the interpreter and libraries took, before the
first step (with adapter and optimizer) and at the peak of the steps; seconds of a step, by CPU time; the error of the last
hidden states relative to fp32; and of its gradient with respect to the first adapter's B.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("fp32", "bf16", "int8", "nf4")
MODELS = ("bert-base", "t5-small")
ROWS, TOKENS, R, STEPS, SEED = 8, 32, 8, 3, 0
MB = 2**20


def build(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """A random encoder (or encoder-decoder) of that shape, and the layers to adapt."""
    import transformers

    torch.manual_seed(SEED)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "bert-base":
        return transformers.BertModel(transformers.BertConfig(**still), add_pooling_layer=False), ("query", "value")
    config = transformers.T5Config(dropout_rate=0.0, decoder_start_token_id=0)  # the defaults are t5-small's
    return transformers.T5Model(config), ("q", "v")


def measure(name: str, kind: str) -> dict[str, Any]:
    """One row of the table, in this process, and what the errors are computed from."""
    from lorakit.lora import LoraConfig, adapter_parameters, add_adapter, quantize
    from lorakit.runtime.device import cast_frozen_

    model, targets = build(name)
    model.train()
    if kind in ("int8", "nf4"):
        quantize(model, kind)
    add_adapter(model, LoraConfig(r=R, target_modules=targets))
    cast_frozen_(model, torch.bfloat16 if kind == "bf16" else torch.float32)
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    trim()
    before = status("VmRSS")
    hidden, gradient = step(model, optimizer, next(p for n, p in parameters.items() if n.endswith("lora_B")))
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, without what the start-up took
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        step(model, optimizer)
        seconds.append(time.process_time() - start)
    return {
        "base": sum(map(kept_bytes, (p for p in model.parameters() if not p.requires_grad))) / MB,
        "before": before,
        "peak": status("VmHWM"),
        "seconds": statistics.median(seconds),
        "hidden": hidden.flatten()[:20000].tolist(),
        "gradient": gradient.flatten().tolist(),
    }


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, watched: nn.Parameter | None = None
) -> tuple[Tensor, Tensor]:
    """One training step over random tokens; the hidden states, and the gradient of one parameter."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1000, 20000, (ROWS, TOKENS), generator=generator)
    more = {"decoder_input_ids": ids[:, :8]} if model.config.is_encoder_decoder else {}
    hidden = model(input_ids=ids, **more).last_hidden_state.float()
    (hidden * torch.randn(hidden.shape, generator=generator)).mean().backward()
    gradient = torch.empty(0) if watched is None else watched.grad.clone()
    optimizer.step()
    optimizer.zero_grad()
    return hidden.detach(), gradient


def kept_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter takes, quantised or not."""
    from lorakit.lora.quantization import QuantizedTensor

    if isinstance(parameter, QuantizedTensor):
        return parameter.codes.nbytes + parameter.scales.nbytes
    return parameter.nbytes


def trim() -> None:
    """Give freed memory back to the system, so that what is resident is what is used."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def status(key: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def libraries() -> float:
    """MB of a process that has built a model of a few bytes and done a step: interpreter, torch, transformers."""
    import transformers

    import lorakit.lora  # noqa: F401

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20000, **sizes))
    step(model, torch.optim.AdamW(model.parameters()))
    trim()
    return status("VmRSS")


def child(*words: str) -> Any:
    """The JSON that this script prints when it is called with these words."""
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def away(have: list[float], want: list[float]) -> float:
    """|have - want| / |want|."""
    left, right = torch.tensor(have), torch.tensor(want)
    return float((left - right).norm() / right.norm())


def report(name: str, rounds: int) -> None:
    """Measure and print the table of one model."""
    empty = child("--libraries")
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            found[kind].append(child("--one", kind, "--model", name))
    print(
        f"{name}: {ROWS} x {TOKENS} tokens, r {R}, {rounds} rounds of {STEPS} steps, {torch.get_num_threads()} threads"
    )
    print(f"{'base':6} {'base MB':>8} {'before MB':>10} {'peak MB':>8} {'step s':>7} {'hidden':>8} {'gradient':>8}")
    exact = found["fp32"][0]
    for kind, rows in found.items():
        base, before, peak, seconds = (
            statistics.median(row[key] for row in rows) for key in ("base", "before", "peak", "seconds")
        )
        errors = [away(rows[0][key], exact[key]) for key in ("hidden", "gradient")]
        print(
            f"{kind:6} {base:8.1f} {before - empty:10.1f} {peak - empty:8.1f} {seconds:7.2f} "
            f"{errors[0]:8.2%} {errors[1]:8.2%}",
            flush=True,
        )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--libraries", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.libraries:
        print(json.dumps(libraries()))
    elif args.one:
        print(json.dumps(measure(args.model, args.one)))
    else:
        for name in [args.model] if args.model else MODELS:
            report(name, args.rounds)


if __name__ == "__main__":
    main()
