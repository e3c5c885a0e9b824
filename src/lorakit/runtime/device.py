"""The machine: device, dtype, memory, random state."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.hashing import proc
from lorakit.lora.inits import named_generator

DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHAPE = (768, 384, 1536)  # rows, d_in, d_out of a MiniLM feed-forward layer over 32 sentences
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # messages of torch's allocators
# How many products, each with its own buffers, oneDNN keeps for matrices of a size that it has met. Its own limit of 1,024 took
# 240 MB more after 120 steps of MiniLM in bf16, at no gain in time (docs/LOG.md, 2026-11-30).
PRODUCTS_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
GAIN = 1.5  # bf16 must be this much faster in matrix products to make up for its casts


def pick_device(name: str = "auto", key: str = "device") -> torch.device:
    """The accelerator that torch has for this machine (under torchrun this process's own one), else the CPU; or the named one.

    Raises:
        ConfigError: this machine has no such device (which `key` asked for), or runs more processes than it has of them.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator is not None else "cpu"
    if name == "cpu" or (name == "auto" and kind == "cpu"):
        os.environ.setdefault(*PRODUCTS_KEPT)  # read by oneDNN at its first product
        return torch.device("cpu")
    if name not in ("auto", kind):
        has = "only the CPU" if kind == "cpu" else f"{kind} and the CPU"
        raise ConfigError(f"{key} = {name!r}: torch {torch.__version__} finds {has} on this machine")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if index >= count:
        raise ConfigError(
            f"process {index + 1} of this machine has no GPU; there are {count}, so start {count} processes"
        )
    if kind != "mps":  # of which there is one
        torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error means that the GPU or the machine is out of memory."""
    if isinstance(err, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(err, RuntimeError) and any(words in str(err).lower() for words in OUT_OF_MEMORY)


def peak_memory(device: torch.device) -> int:
    """The peak memory of this process in bytes: the GPU's if it trains there, else the machine's."""
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cpu_name() -> str:
    """The CPU's model name."""
    return proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def gpu_name(device: torch.device) -> str:
    """The accelerator's name, with a comma behind it; nothing for a CPU."""
    if device.type == "cpu":
        return ""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return f"{name(device) if name else device.type.upper()}, "


def machine_name(device: torch.device) -> str:
    """A description of the machine that trains a run."""
    return f"{gpu_name(device)}{cpu_name()}, {os.cpu_count()} cores, {platform.system()}"


def seed_rank(seed: int, rank: int) -> None:
    """Seed torch's own generator, which dropout uses: on the first rank as in a plain run, on the others differently."""
    torch.manual_seed(named_generator(seed, f"rank {rank}").initial_seed() if rank else seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cpu":
        return states
    return {**states, device.type: torch.get_device_module(device).get_rng_state(*_which(device))}


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states of `random_state`; devices missing in it are left unchanged."""
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What a device's module takes to know which one is meant; MPS has one."""
    return () if device.type == "mps" else (device,)


def pick_dtype(name: DtypeName | Literal["auto"], method: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base: `name`, or for "auto" the faster one: on a CPU by measurement, on a GPU by what it has.

    A GPU that only emulates bf16 (a T4) computes in fp16, MPS in fp32. Full fine-tuning uses fp32: weights of fewer digits
    would round its updates away.
    """
    if method == "full":
        return torch.float32
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        has_bf16 = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        if has_bf16 is None:
            return torch.float32
        return torch.bfloat16 if has_bf16(including_emulation=False) else torch.float16
    return torch.bfloat16 if bf16_gain() >= GAIN else torch.float32


@cache
def bf16_gain() -> float:
    """How many times faster a bf16 matrix product is than an fp32 one on this CPU (a measurement of some 20 ms)."""
    rows, d_in, d_out = SHAPE
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(rows, d_in, dtype=dtype), torch.ones(d_in, d_out, dtype=dtype)
        times = []
        for _ in range(4):  # the first is a warm-up
            start = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / seconds[torch.bfloat16]


def cast_frozen_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters; trained ones stay in fp32."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def shard_frozen_(model: nn.Module) -> None:
    """Shard every frozen layer over the processes, by FSDP2 (Zhao et al. 2023, arXiv:2304.11277).

    The layers are those of the outermost module lists (a transformer's blocks), each gathered when it is computed;
    embeddings, heads and trained parameters are not sharded. From now on every process must call the model
    equally often.
    """
    from torch.distributed.fsdp import fully_shard  # takes seconds to import

    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for block in _blocks(model):
        fully_shard(block, ignored_params=trained)  # moves it to this process's device first


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """With `enabled`, torch uses deterministic algorithms, or fails where it has none."""
    if not enabled or torch.are_deterministic_algorithms_enabled():
        yield  # telling torch even what it does already imports its compiler, which takes a second
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS on first use
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients; the mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
