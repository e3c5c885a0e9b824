"""How a low-rank update acts in each kind of layer: a line in a dict for each kind; all other code is the same for every kind.

In memory A is always (r, d_in) and B (d_out, r), matrices over the *matrix view* M (d_out, d_in) of a layer's weight, with d_in
flattened over a convolution's kernel. Initialisations, norms and merging therefore only see matrices, and only this file
knows the layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

CONVOLVE: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d}


@dataclass(frozen=True)
class Geometry:
    """A kind of layer: its weight as a matrix and back, and the two ways an input passes through it."""

    name: str  # of its constant in this file, used to pickle and copy it
    matrix: Callable[[Any], Tensor]  # the weight as M (d_out, d_in)
    weight: Callable[[Tensor, Any], Tensor]  # a matrix like M back in the weight's shape
    product: Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # B A x
    plain: Callable[[Tensor, Any], Tensor]  # W x without the bias
    channel: int = -1  # the output's dimension of size d_out
    parameter: str = "weight"  # the name of the layer's weight

    def __reduce__(self) -> str:
        return self.name


def _linear_product(x: Tensor, A: Tensor, B: Tensor, base: Any) -> Tensor:
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def _embedding_product(ids: Tensor, A: Tensor, B: Tensor, base: Any) -> Tensor:
    dtype = base.weight.dtype
    return F.embedding(ids, A.T.to(dtype), padding_idx=base.padding_idx) @ B.T.to(dtype)


def _conv_product(x: Tensor, A: Tensor, B: Tensor, base: Any) -> Tensor:
    inner = A.view(len(A), *base.weight.shape[1:]).to(x.dtype)
    outer = B.view(*B.shape, *(1 for _ in base.kernel_size)).to(x.dtype)
    return CONVOLVE[len(base.kernel_size)](_convolved(x, inner, base), outer)


def _convolved(x: Tensor, weight: Tensor, base: Any) -> Tensor:
    convolve = CONVOLVE[len(base.kernel_size)]
    if base.padding_mode != "zeros":
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        return convolve(x, weight, None, base.stride, 0, base.dilation)
    return convolve(x, weight, None, base.stride, base.padding, base.dilation)


LINEAR = Geometry(
    name="LINEAR",
    matrix=lambda base: base.weight,
    weight=lambda matrix, base: matrix,
    product=_linear_product,
    plain=lambda x, base: F.linear(x, base.weight),
)
TRANSPOSED = Geometry(  # GPT-2's Conv1D keeps W as (d_in, d_out)
    name="TRANSPOSED",
    matrix=lambda base: base.weight.T,
    weight=lambda matrix, base: matrix.T,
    product=_linear_product,
    plain=lambda x, base: x @ base.weight,
)
EMBEDDING = Geometry(
    name="EMBEDDING",
    matrix=lambda base: base.weight.T,
    weight=lambda matrix, base: matrix.T,
    product=_embedding_product,
    plain=lambda ids, base: F.embedding(ids, base.weight, padding_idx=base.padding_idx),
)
CONVOLUTION = Geometry(
    name="CONVOLUTION",
    matrix=lambda base: base.weight.flatten(1),
    weight=lambda matrix, base: matrix.view_as(base.weight),
    product=_conv_product,
    plain=lambda x, base: _convolved(x, base.weight, base),
    channel=1,
)

ATTENTION = dataclasses.replace(
    LINEAR, name="ATTENTION", matrix=lambda base: base.in_proj_weight, parameter="in_proj_weight"
)


def geometry_of(module: nn.Module) -> Geometry | None:
    """The geometry of a layer that can be adapted, or None."""
    if isinstance(module, nn.Linear):
        return None if type(module).__name__.endswith("Router") else LINEAR  # chooses experts: gives more than W x
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1:
        return CONVOLUTION
    if isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:
        return ATTENTION
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' own, which we do not import
        return TRANSPOSED
    return None


def matrix_shape(module: Any) -> tuple[int, int]:
    """(d_out, d_in) of a layer's matrix view."""
    geometry = geometry_of(module)
    assert geometry is not None
    d_out, d_in = geometry.matrix(module).shape
    return d_out, d_in
