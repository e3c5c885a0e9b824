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
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.hashing import proc, user_cache, whole_file

SOURCE = Path(__file__).with_name("kernels.c")
DTYPES = (torch.float32, torch.bfloat16)
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT_S = 60


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for one type; None where they cannot be compiled here."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), *COMPILERS))), None)
    if compiler is None or dtype not in DTYPES or os.name != "posix":
        return None
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    flags = ["-shared", "-fPIC", "-O3", "-fno-math-errno", "-march=native" if is_x86 else "-mcpu=native"]
    # torch's own threads: a second OpenMP beside its own would have as many again, which spin
    threads = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    flags += ["-fopenmp"] if threads.exists() else ["-fopenmp-simd"]
    flags += ["-DBF16"] if dtype == torch.bfloat16 else []
    cpu = proc("cpuinfo", "flags", "Features") or platform.processor()  # machines of one home folder may differ in it
    name = hashlib.sha256(repr((SOURCE.read_bytes(), flags, cpu)).encode()).hexdigest()[:20]
    own = _cache_folder()
    try:
        # what is loaded stays so when its file is gone
        with nullcontext(own) if own else tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
            path = Path(folder, f"{name}.so")
            if not path.exists():
                with whole_file(path) as unfinished:
                    words = [compiler, *flags, str(SOURCE), "-o", str(unfinished), "-lm"]
                    subprocess.run(words, check=True, capture_output=True, timeout=TIMEOUT_S)
            compiled = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    for function, types in SIGNATURES.items():
        getattr(compiled, function).argtypes = types
        getattr(compiled, function).restype = None
    return compiled


def _cache_folder() -> Path | None:
    """Where the user's compiled files are; None where there can be none, or others could write to it: what is found is run."""
    if (folder := user_cache("kernels")) is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    is_own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_own and os.access(folder, os.W_OK) else None


def fits(x: Tensor) -> bool:
    """Whether these functions can take an array: on a CPU, of a type that they know, and not while a graph is recorded."""
    is_recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return (
        x.device.type == "cpu"
        and not is_recorded
        and not torch.is_autocast_enabled("cpu")
        and library(x.dtype) is not None
    )


# What each function takes: a type and what its letters mean. Pointers are addresses of tensors, or None.
POINTER, INTEGER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
DROPOUT = (ctypes.c_double, ctypes.c_uint64)
SIGNATURES: Mapping[str, tuple[type, ...]] = {
    "split": (*[POINTER] * 4, *[INTEGER] * 4),
    "merge": (*[POINTER] * 3, *[INTEGER] * 4),
    "softmax": (*[POINTER] * 7, *[INTEGER] * 4, FLOAT, *DROPOUT),
    "softmax_backward": (*[POINTER] * 3, *[INTEGER] * 2, FLOAT, *DROPOUT),
    "attend_last": (*[POINTER] * 4, INTEGER, *[POINTER] * 3, *[INTEGER] * 4),
    "likeliest": (*[POINTER] * 3, *[INTEGER] * 2),
    "dropout": (*[POINTER] * 2, INTEGER, *DROPOUT),
    "rms_norm": (*[POINTER] * 4, *[INTEGER] * 2, FLOAT),
    "rms_norm_backward": (*[POINTER] * 5, *[INTEGER] * 2),
    "add_norm": (*[POINTER] * 8, *[INTEGER] * 2, FLOAT, *DROPOUT),
    "add_norm_backward": (*[POINTER] * 6, *[INTEGER] * 2, *DROPOUT),
    "gelu": (*[POINTER] * 3, *[INTEGER] * 2),
    "gelu_backward": (*[POINTER] * 4, *[INTEGER] * 2),
}


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
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


class Split(torch.autograd.Function):
    """The computation of `split`, whose backward pass is that of `Merge`, and the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor | None, texts: Texts, heads: int) -> Tensor:
        ctx.texts, ctx.heads = texts, heads
        d = rows.shape[1]
        y = rows.new_empty(texts.n, heads, texts.longest, d // heads)
        _call("split", rows.dtype, rows, bias, y, texts.starts, texts.n, heads, texts.longest, d)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return Merge.forward(ctx, grad, ctx.texts), None, None, None


class Merge(torch.autograd.Function):
    """The computation of `merge`."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, texts: Texts) -> Tensor:
        ctx.texts, ctx.heads = texts, heads.shape[1]
        d = heads.shape[1] * heads.shape[3]
        rows = heads.new_zeros(texts.rows, d)
        _call("merge", rows.dtype, heads.contiguous(), rows, texts.starts, texts.n, ctx.heads, texts.longest, d)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Split.forward(ctx, grad.contiguous(), None, ctx.texts, ctx.heads), None


def split(rows: Tensor, bias: Tensor | None, texts: Texts, heads: int) -> Tensor:
    """Rows plus a frozen bias, or none, as texts and heads, 0 behind a text.

    Shapes: rows (texts.rows, d) and bias (d,) to (texts, heads, longest, d / heads).
    """
    y: Tensor = Split.apply(rows, bias, texts, heads)
    return y


def merge_heads(heads: Tensor, texts: Texts) -> Tensor:
    """The reverse; rows that belong to no text are 0. Shapes: (texts, heads, longest, d / heads) to (texts.rows, d)."""
    rows: Tensor = Merge.apply(heads, texts)
    return rows


class Attend(torch.autograd.Function):
    """The computation of `attend`. The probabilities are saved; what is dropped of them is drawn again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, texts: Texts | None, bias: Tensor | None, mask: Tensor | None,
        scaling: float, drop: Dropout,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x.contiguous() for x in (q, k, v))
        p = q @ k.mT  # (B, heads, Q, T); as yet scores
        dropped = torch.empty_like(p) if drop.rate else None
        starts = None if texts is None else texts.starts
        arrays = (*_strided(bias, p.shape), *_strided(mask, p.shape))
        _call("softmax", p.dtype, p, dropped, starts, *arrays, *p.shape, scaling, *drop)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling, ctx.drop = scaling, drop
        y: Tensor = (p if dropped is None else dropped) @ v
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        by_scores = grad @ v.mT  # as yet of the probabilities
        dropped = torch.empty_like(p) if ctx.drop.rate else None
        rows = p.numel() // p.shape[-1]
        _call("softmax_backward", p.dtype, p, by_scores, dropped, rows, p.shape[-1], ctx.scaling, *ctx.drop)
        by_v = (p if dropped is None else dropped).mT @ grad
        return by_scores @ k, by_scores.mT @ q, by_v, None, None, None, None, None


def _strided(array: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, Any]:
    """An array as wide as this shape, and its strides of the other dimensions, of which it may lack some."""
    if array is None:
        return None, None
    if array.stride(-1) != 1 or array.shape[-1] != shape[-1]:
        array = array.expand(*array.shape[:-1], shape[-1]).contiguous()
    array = array.expand(shape)
    return array, (ctypes.c_int64 * 3)(*array.stride()[:3])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    texts: Texts | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scaling: float,
    drop: Dropout,
) -> Tensor:
    """Attention: softmax(scaling q k^T + bias) v over what the mask leaves, dropout on the probabilities; the bias is frozen.

    Where `texts` is given a text has as many keys as tokens.

    Shapes: q (B, heads, Q, d), k and v (B, heads, T, d); bias and bool mask broadcast to (B, heads, Q, T); to (B, heads, Q, d).
    """
    y: Tensor = Attend.apply(q, k, v, texts, bias, mask, scaling, drop)
    return y


def attend_last(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, counts: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Attention of one query a row, without gradients: row i asks the first counts[i] keys of text rows[i].

    The scores are not scaled, as in T5.

    Shapes: q (R, heads, d), keys and values (B, T, heads d), rows and counts (R,) of int64, bias (heads, T), to (R, heads, d).
    """
    q, y = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    of_bias = 0 if bias is None else bias.stride(0)
    sizes = (*q.shape[:2], keys.shape[1], q.shape[2])
    _call("attend_last", q.dtype, q, keys, values, bias, of_bias, rows, counts, y, *sizes)
    return y


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each row's largest logit, the first of equal ones, and its log-probability. Shapes: (N, V) to (N,) twice."""
    logits = logits.contiguous()
    place, log_p = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    _call("likeliest", logits.dtype, logits, place, log_p, *logits.shape)
    return place, log_p


class Drop(torch.autograd.Function):
    """The computation of `dropout`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Dropout) -> Tensor:
        ctx.drop = drop
        x = x.contiguous()
        y = torch.empty_like(x)
        _call("dropout", x.dtype, x, y, x.numel(), *drop)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Drop.forward(ctx, grad, ctx.drop), None


def dropout(x: Tensor, drop: Dropout) -> Tensor:
    """What dropout leaves of x, drawn from its seed."""
    y: Tensor = Drop.apply(x, drop)
    return y


class RMSNorm(torch.autograd.Function):
    """The computation of `rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        _call("rms_norm", x.dtype, x, gain, y, inverse, inverse.numel(), x.shape[-1], eps)
        ctx.save_for_backward(x, inverse, gain)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, gain = ctx.saved_tensors
        by_x = torch.empty_like(x)
        _call("rms_norm_backward", x.dtype, grad.contiguous(), x, inverse, gain, by_x, inverse.numel(), x.shape[-1])
        return by_x, None, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """gain x / sqrt(mean x^2 + eps), the gain frozen (Zhang and Sennrich 2019, arXiv:1910.07467). Shapes: (..., d), (d,)."""
    y: Tensor = RMSNorm.apply(x, gain, eps)
    return y


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
