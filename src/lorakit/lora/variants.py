"""The short axes on which LoRA variants differ. A variant is one small function and one line in a dict.

Shapes: W (d_out, d_in), A (r, d_in), B (d_out, r).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The two factors of an update s B A. Shapes: A (r, d_in), B (d_out, r); both fp32."""

    A: Tensor
    B: Tensor


def named_generator(seed: int, path: str) -> torch.Generator:
    """A generator that depends on the seed and the module's path alone, so that what else is injected changes nothing."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# Scaling: (alpha, r) -> s


def standard_scaling(alpha: float, r: int) -> float:
    """Scaling alpha / r (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""
    return alpha / r


def rslora_scaling(alpha: float, r: int) -> float:
    """Scaling alpha / sqrt(r), which keeps the update's size stable as r grows (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(r)


# Initialisation: (W, r, s, generator) -> Factors. Where B is not zero, the layer subtracts the start, so that W is never edited.


def kaiming_init(weight: Tensor, r: int, scaling: float, generator: torch.Generator) -> Factors:
    """A uniform in +-1/sqrt(d_in), that is kaiming-uniform with a = sqrt(5), and B zero: loralib's and peft's default."""
    d_out, d_in = weight.shape
    bound = 1 / math.sqrt(d_in)
    A = torch.empty(r, d_in).uniform_(-bound, bound, generator=generator)
    return Factors(A, torch.zeros(d_out, r))


def gaussian_init(weight: Tensor, r: int, scaling: float, generator: torch.Generator) -> Factors:
    """A normal with standard deviation 1/r and B zero (peft's `gaussian`)."""
    d_out, d_in = weight.shape
    return Factors(torch.empty(r, d_in).normal_(0, 1 / r, generator=generator), torch.zeros(d_out, r))


def pissa_init(weight: Tensor, r: int, scaling: float, generator: torch.Generator) -> Factors:
    """The r largest singular directions of W: s B A is W's best rank-r part (Meng et al. 2024, arXiv:2404.02948, eq. 2-4).

    The paper leaves the residual in W; here W stays as it is and the layer subtracts the start.
    """
    U, S, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return Factors((root[:, None] * Vh[:r]).contiguous(), U[:, :r] * root)


def olora_init(weight: Tensor, r: int, scaling: float, generator: torch.Generator) -> Factors:
    """The first r columns of Q and rows of R of W = QR (Büyükakyüz 2024, arXiv:2406.01775, algorithm 1).

    As with pissa, W stays as it is and the layer subtracts the start.
    """
    Q, R = torch.linalg.qr(weight.detach().float())
    root = math.sqrt(scaling)
    return Factors((R[:r] / root).contiguous(), (Q[:, :r] / root).contiguous())


Scaling = Callable[[float, int], float]
Init = Callable[[Tensor, int, float, torch.Generator], Factors]

SCALINGS: Mapping[str, Scaling] = {"standard": standard_scaling, "rslora": rslora_scaling}
INITS: Mapping[str, Init] = {
    "kaiming": kaiming_init,
    "gaussian": gaussian_init,
    "pissa": pissa_init,
    "olora": olora_init,
}
