"""The passes over rows between a transformer block's matrix products, compiled from kernels.c, as autograd functions.

The file is compiled at first use, by the machine's own C compiler, into the user's cache. Where there is none the blocks run
as modules (packed.py). What each function computes is said by the torch functions that its test compares it with.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("kernels.c")
DTYPES = (torch.float32, torch.bfloat16)
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT_S = 60


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for one type; None where they cannot be compiled here."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), *COMPILERS))), None)
    if compiler is None or dtype not in DTYPES:
        return None
    flags = ["-shared", "-fPIC", "-O3", "-fno-math-errno", "-march=native" if _is_x86() else "-mcpu=native"]
    # torch's own threads: a second OpenMP beside its own would have as many again, which spin
    threads = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    flags += ["-fopenmp"] if threads.exists() else ["-fopenmp-simd"]
    flags += ["-DBF16"] if dtype == torch.bfloat16 else []
    name = hashlib.sha256(repr((SOURCE.read_bytes(), flags, _cpu_flags())).encode()).hexdigest()[:20]
    try:
        path = _cache_folder() / f"kernels-{name}.so"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            command = [compiler, *flags, str(SOURCE), "-o", str(unfinished), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
            unfinished.replace(path)
        compiled = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    for function, types in SIGNATURES.items():
        getattr(compiled, function).argtypes = types
        getattr(compiled, function).restype = None
    return compiled


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i686")


def _cpu_flags() -> str:
    """What the CPU can do, which differs among the machines that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_folder() -> Path:
    """The user's cache, or a new folder where others could write there: what is found in it is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lorakit-"))


# What each function takes: a type and what its letters mean. Pointers are addresses of tensors, or None.
POINTER, INTEGER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
DROPOUT = (ctypes.c_double, ctypes.c_uint64)
SIGNATURES: Mapping[str, tuple[type, ...]] = {
    "split": (*[POINTER] * 4, *[INTEGER] * 4),
    "merge": (*[POINTER] * 3, *[INTEGER] * 4),
    "softmax": (*[POINTER] * 3, *[INTEGER] * 3, FLOAT, *DROPOUT),
    "softmax_backward": (*[POINTER] * 4, *[INTEGER] * 3, FLOAT, *DROPOUT),
    "add_norm": (*[POINTER] * 8, *[INTEGER] * 2, FLOAT, *DROPOUT),
    "add_norm_backward": (*[POINTER] * 6, *[INTEGER] * 2, *DROPOUT),
    "gelu": (*[POINTER] * 3, *[INTEGER] * 2),
    "gelu_backward": (*[POINTER] * 4, *[INTEGER] * 2),
}


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Call a function of the library."""
    compiled = library(dtype)
    assert compiled is not None
    getattr(compiled, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


class Dropout(NamedTuple):
    """A rate, and the seed of what is drawn."""

    rate: float
    seed: int


def draw(rate: float) -> Dropout:
    """Dropout with a seed from torch's own generator; nothing is drawn where the rate is 0."""
    return Dropout(rate, int(torch.randint(2**62, ())) if rate else 0)


class Texts(NamedTuple):
    """Texts one behind the other, without padding: rows starts[i] to starts[i + 1] are those of text i."""

    starts: Tensor  # (n + 1,)
    n: int
    longest: int
    rows: int  # those of all texts, and perhaps some more that belong to none


class Attend(torch.autograd.Function):
    """The computation of `attend`. The probabilities are saved; what is dropped of them is drawn again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        biases: Sequence[Tensor],
        asking: Texts,
        texts: Texts,
        heads: int,
        drop: Dropout,
    ) -> Tensor:
        split = zip((q, k, v), biases, (asking, texts, texts), strict=True)
        q, k, v = (_split(rows, bias, of, heads) for rows, bias, of in split)
        p = q @ k.mT  # (texts heads, asking, longest); as yet scores
        dropped = torch.empty_like(p) if drop.rate else None
        options = (texts.starts, texts.n, heads * asking.longest, texts.longest, q.shape[2] ** -0.5, *drop)
        _call("softmax", p.dtype, p, dropped, *options)
        ctx.save_for_backward(q, k, v, p)
        ctx.asking, ctx.texts, ctx.heads, ctx.drop, ctx.options = asking, texts, heads, drop, options
        return _merge((p if dropped is None else dropped) @ v, asking, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        by_y = _split(grad.contiguous(), None, ctx.asking, ctx.heads)
        by_scores = by_y @ v.mT  # as yet of the probabilities
        dropped = torch.empty_like(p) if ctx.drop.rate else None
        _call("softmax_backward", p.dtype, p, by_scores, dropped, *ctx.options)
        by_v = (p if dropped is None else dropped).mT @ by_y
        by = ((by_scores @ k, ctx.asking), (by_scores.mT @ q, ctx.texts), (by_v, ctx.texts))
        return (*(_merge(split, of, ctx.heads) for split, of in by), None, None, None, None, None)


def _split(rows: Tensor, bias: Tensor | None, texts: Texts, heads: int) -> Tensor:
    """Shapes: rows (N, d), bias (d,) to (texts heads, longest, d / heads)."""
    d = rows.shape[1]
    split = rows.new_empty(texts.n * heads, texts.longest, d // heads)
    _call("split", rows.dtype, rows, bias, split, texts.starts, texts.n, heads, texts.longest, d)
    return split


def _merge(split: Tensor, texts: Texts, heads: int) -> Tensor:
    """The reverse of `_split`; rows that belong to no text are 0."""
    d = split.shape[2] * heads
    rows = split.new_zeros(texts.rows, d)
    _call("merge", rows.dtype, split, rows, texts.starts, texts.n, heads, texts.longest, d)
    return rows


def attend(
    q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor], asking: Texts, texts: Texts, heads: int, drop: Dropout
) -> Tensor:
    """Softmax attention of each text's tokens among themselves, after the biases are added to q, k and v.

    `asking` are the rows of q: `texts` as well, or one row of each.

    Shapes: q (asking.rows, d), k and v (texts.rows, d), biases 3 of (d,), to (asking.rows, d).
    """
    answer: Tensor = Attend.apply(q, k, v, biases, asking, texts, heads, drop)
    return answer


class AddNorm(torch.autograd.Function):
    """The computation of `add_norm`. Of its arrays the normalised rows are saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, residual: Tensor, gain: Tensor, shift: Tensor, eps: float, drop: Dropout
    ) -> Tensor:
        y, needed = torch.empty_like(x), any(ctx.needs_input_grad)
        z = torch.empty_like(x) if needed else None
        inverse = x.new_empty(len(x), dtype=torch.float32) if needed else None
        _call("add_norm", x.dtype, x, bias, residual, gain, shift, y, z, inverse, *x.shape, eps, *drop)
        ctx.save_for_backward(z, inverse, gain)
        ctx.drop = drop
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        z, inverse, gain = ctx.saved_tensors
        by_residual = torch.empty_like(z)
        by_x = torch.empty_like(z) if ctx.drop.rate else None
        grad = grad.contiguous()
        _call("add_norm_backward", z.dtype, grad, z, inverse, gain, by_residual, by_x, *z.shape, *ctx.drop)
        return by_residual if by_x is None else by_x, None, by_residual, None, None, None, None


def add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, gain: Tensor, shift: Tensor, eps: float, drop: Dropout
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)), all but x and residual frozen. Shapes: these (N, d), the others (d,)."""
    answer: Tensor = AddNorm.apply(x, bias, residual, gain, shift, eps, drop)
    return answer


class Gelu(torch.autograd.Function):
    """The computation of `gelu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _call("gelu", x.dtype, x, bias, y, *x.shape)
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, bias = ctx.saved_tensors
        by_x = torch.empty_like(x)
        _call("gelu_backward", x.dtype, grad.contiguous(), x, bias, by_x, *x.shape)
        return by_x, None


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias), by the error function, with the bias frozen. Shapes: x (N, d), bias (d,)."""
    answer: Tensor = Gelu.apply(x, bias)
    return answer
