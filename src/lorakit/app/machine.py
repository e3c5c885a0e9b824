"""What this machine makes of the fast parts: `lorakit inspect --kernels`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.app.printing import Output
from lorakit.lora.fused_linear import Update, adapted_linear
from lorakit.runtime.device import GAIN, SHAPE, bf16_gain, pick_device, pick_dtype

R = 8
ATTENTION = (32, 12, 24, 32)  # texts, heads, tokens, width of a head: MiniLM over short sentences
REPEATS = 5


def inspect_kernels() -> Output:
    """Each fast part beside what it stands in for, measured here in some hundred milliseconds."""
    device = pick_device()
    dtype = str(pick_dtype("auto", "lora", device)).removeprefix("torch.")
    plain, fused = linear_seconds(fused=False), linear_seconds(fused=True)
    narrow, wide = attention_seconds(wide=False), attention_seconds(wide=True)
    facts = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "auto_dtype": dtype,
        "bf16_gain": bf16_gain(),
        "adapted_linear_gain": plain / fused,
        "fp32_attention_gain": narrow / wide,
    }
    rows, d_in, d_out = SHAPE
    lines = [
        f"device: {facts['device']}, {facts['threads']} threads, {facts['cpu']}",
        f"matrix products: in bf16 {facts['bf16_gain']:.2f}x as fast as in fp32; "
        f"model.dtype = 'auto' takes bf16 from {GAIN}x on, here {dtype}",
        f"adapted linear layer, {rows} rows of {d_in} to {d_out}, forward and backward on the CPU: "
        f"in one function {facts['adapted_linear_gain']:.2f}x as fast",
        "attention of a bf16 model, forward and backward on the CPU: "
        f"in fp32 between casts {facts['fp32_attention_gain']:.2f}x as fast",
        "both are used where they can be, so that a recipe gives the same bits each time; model.kernels = 'plain' goes without",
    ]
    return Output(lines, facts)


def linear_seconds(fused: bool) -> float:
    """Seconds of an adapted linear layer, forward and backward."""
    rows, d_in, d_out = SHAPE
    weight, bias = torch.ones(d_out, d_in), torch.ones(d_out)
    x, A, B = (torch.ones(shape, requires_grad=True) for shape in ((rows, d_in), (R, d_in), (d_out, R)))

    def plain() -> Tensor:
        return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B) * 2.0

    return seconds(lambda: adapted_linear(x, weight, bias, [Update(len(x), A, B, 2.0)]) if fused else plain())


def attention_seconds(wide: bool) -> float:
    """Seconds of attention over bf16 inputs, forward and backward."""
    inputs = [torch.ones(ATTENTION, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def attention() -> Tensor:
        q, k, v = (x.float() if wide else x for x in inputs)
        return F.scaled_dot_product_attention(q, k, v).to(torch.bfloat16)

    return seconds(attention)


def seconds(forward: Callable[[], Tensor]) -> float:
    """Of a forward and its backward pass; the best of some."""
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        y = forward()
        y.backward(torch.ones_like(y))
        times.append(time.perf_counter() - start)
    return min(times[1:])
