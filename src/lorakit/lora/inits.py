"""Initialisations of A and B. Each is a function and a line in INITS.

Shapes: W (d_out, d_in), A (r, d_in), B (d_out, r).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.lora.config import PISSA_NITER

OVERSAMPLING = 8  # directions drawn beyond k (Halko et al. 2009, section 4.2: 5 or 10)


class Factors(NamedTuple):
    """The two factors of an update s B A. Shapes: A (r, d_in), B (d_out, r); both fp32."""

    A: Tensor
    B: Tensor


def truncated(M: Tensor, r: int) -> tuple[Factors, float]:
    """The best B A of rank r for a matrix, by SVD (Eckart and Young 1936), and |M - B A| / |M|.

    Shapes: M (d_out, d_in); A (r, d_in), B (d_out, r), of fewer than r where the matrix has no r directions.
    """
    U, S, Vh = torch.linalg.svd(M.float(), full_matrices=False)
    root = S[:r].sqrt()
    lost = float(S[r:].norm() / S.norm()) if S.any() else 0.0
    return Factors((root[:, None] * Vh[:r]).contiguous(), U[:, :r] * root), lost


def named_generator(seed: int, path: str) -> torch.Generator:
    """A generator that depends only on the seed and the module's path, so that other injected modules have no influence."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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


def fast_pissa_init(weight: Tensor, r: int, scaling: float, generator: torch.Generator, niter: int = 16) -> Factors:
    """PiSSA by randomised SVD, with `niter` power iterations (Meng et al. 2024, arXiv:2404.02948, section 4: fast SVD).

    peft's `pissa_niter_N`; a few directions more than r are drawn here, which costs little and is closer to `pissa`.
    """
    U, S, Vh = randomised_svd(weight.detach().float(), r, niter, generator)
    root = (S / scaling).sqrt()
    return Factors((root[:, None] * Vh).contiguous(), U * root)


def randomised_svd(M: Tensor, k: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triples of M, approximately (Halko et al. 2009, arXiv:0909.4061, algorithms 4.4 and 5.1).

    Shapes: M (m, n), returned U (m, k), S (k,), Vh (k, n); fewer than k where M has fewer.
    """
    drawn = torch.empty(M.shape[1], min(k + OVERSAMPLING, *M.shape)).normal_(generator=generator)
    Q = torch.linalg.qr(M @ drawn.to(M.device)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    return Q @ U[:, :k], S[:k], Vh[:k]


def orthogonal_init(weight: Tensor, r: int, scaling: float, generator: torch.Generator) -> Factors:
    """A from the even, B from the odd rows of one random orthogonal (r, r) matrix, so that B A is 0 (peft's `orthogonal`).

    Source: datta0.github.io/posts/rethink-lora-init. Differences: B A is 0 only up to rounding, so the layer subtracts
    the start; and the rank may be odd, with one row more for A.
    """
    d_out, d_in = weight.shape

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=generator)

    Q = torch.linalg.qr(normal(r, r)).Q
    A, B = normal(d_in, (r + 1) // 2) @ Q[0::2], normal(d_out, r // 2) @ Q[1::2]
    return Factors((A.T / 10).contiguous(), B / 10)


def olora_init(weight: Tensor, r: int, scaling: float, generator: torch.Generator) -> Factors:
    """The first r columns of Q and rows of R of W = QR (Büyükakyüz 2024, arXiv:2406.01775, algorithm 1).

    As with pissa, W stays as it is and the layer subtracts the start.
    """
    Q, R = torch.linalg.qr(weight.detach().float())
    root = math.sqrt(scaling)
    return Factors((R[:r] / root).contiguous(), (Q[:, :r] / root).contiguous())


Init = Callable[[Tensor, int, float, torch.Generator], Factors]

INITS: Mapping[str, Init] = {
    "kaiming": kaiming_init,
    "gaussian": gaussian_init,
    "pissa": pissa_init,
    "pissa_niter_16": fast_pissa_init,
    "olora": olora_init,
    "orthogonal": orthogonal_init,
}


def find_init(name: str) -> Init | None:
    """The initialisation of this name, or None. In `pissa_niter_N`, N may be any number."""
    number = PISSA_NITER.fullmatch(name)
    return partial(fast_pissa_init, niter=int(number[1])) if number else INITS.get(name)
