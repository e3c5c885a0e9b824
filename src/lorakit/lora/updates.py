"""What an adapter adds to one layer. A kind of update is a class and a line in UPDATES.

Shapes: B rows, T tokens, x (B, ..., d_in), y (B, ..., d_out), A (r, d_in), B (d_out, r), W (d_out, d_in).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.lora.fused_linear import rescale
from lorakit.lora.inits import Factors, named_generator
from lorakit.lora.weight_layouts import LINEAR, TRANSPOSED, Geometry


class Layer(Protocol):
    """What an update needs from its host (defined in layers.py)."""

    base: Any
    geometry: Geometry

    def matrix(self) -> Tensor:
        """The matrix view of W in fp32, detached. Shapes: (d_out, d_in)."""
        ...

    def along_channels(self, values: Tensor, y: Tensor) -> Tensor:
        """One value per output channel, shaped to be broadcast over y. Shapes: (d_out,)."""
        ...


class LoRA(nn.Module):
    """One low-rank update of one layer: y -> y + s B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    A and B are fp32 parameters; the product is computed in the dtype of x. Where the start B0 A0 is not zero
    (pissa, olora), the update is s (B A - B0 A0), so that W is never edited and the first step equals the base.
    Two biases can be trained too, and are None otherwise: `lora_bias` b, added inside the scaling
    (peft's lora_bias: y + s (B A x + b)), and `base_bias`, which replaces the layer's own (peft's bias).

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)))
    >>> update = model.bert.encoder.layer[0].attention.self.query.adapters["default"]
    >>> type(update) is LoRA, update.lora_A.shape[0], update.lora_B.abs().max().item()
    (True, 4, 0.0)
    """

    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    rows: Tensor | None
    lora_bias: nn.Parameter | None
    base_bias: nn.Parameter | None

    def __init__(self, factors: Factors, scaling: float, dropout: float = 0.0, layer: Layer | None = None) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(factors.A.clone(memory_format=torch.contiguous_format))
        self.lora_B = nn.Parameter(factors.B.clone(memory_format=torch.contiguous_format))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        has_start = bool(factors.B.any())
        self.register_buffer("start_A", factors.A.clone() if has_start else None)
        self.register_buffer("start_B", factors.B.clone() if has_start else None)
        self.register_buffer("rows", None)
        self.register_parameter("lora_bias", None)
        self.register_parameter("base_bias", None)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of B, the others staying zero: for example q and v of a fused projection. Shapes: (n,)."""
        self.register_buffer("rows", rows, persistent=False)
        self.d_out = len(self.lora_B)
        self.lora_B = nn.Parameter(self.lora_B.detach()[rows])
        if self.start_B is not None:
            self.start_B = self.start_B[rows]

    def train_biases(self, layer: Layer, lora_bias: bool, base_bias: bool) -> None:
        """Add trained biases, which do not change the layer's output yet. A layer without a bias gets no `base_bias`."""
        if lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(len(layer.matrix())))
        bias = getattr(layer.base, "bias", None)
        if base_bias and bias is not None:
            self.base_bias = nn.Parameter(bias.detach().float().clone())

    def factors(self) -> Factors:
        """The factors of the whole update, with the start subtracted: A (r or 2r, d_in), B (d_out, r or 2r).

        B A - B0 A0 is written as (B - B0) A + B0 (A - A0): exactly zero before the first step, and a small change of
        A or B is not lost in the difference of two large products, above all in bf16.
        """
        A, B = self.lora_A, self.lora_B
        if self.start_A is not None and self.start_B is not None:
            A = torch.cat([A, A - self.start_A])
            B = torch.cat([B - self.start_B, self.start_B], dim=1)
        if self.rows is not None:  # zeros in the rows that were left out
            B = B.new_zeros(self.d_out, B.shape[1]).index_copy(0, self.rows, B)
        return Factors(A, B)

    def parts(self) -> dict[str, Tensor]:
        """All tensors that define the update, by role: A, B and others of the variant."""
        A, B = self.factors()
        parts = {"A": A, "B": B, "lora_bias": self.lora_bias, "base_bias": self.base_bias}
        return {role: tensor for role, tensor in parts.items() if tensor is not None}

    def product(self, x: Tensor, layer: Layer) -> Tensor:
        """s B A x. Shapes: x and the answer as the layer's own input and output."""
        return layer.geometry.product(x, *self.factors(), layer.base) * self.scaling

    def dropped(self, x: Tensor) -> Tensor:
        """The input after LoRA's dropout; the ids of an embedding are left unchanged."""
        dropped: Tensor = self.dropout(x) if x.is_floating_point() else x
        return dropped

    def offset(self, layer: Layer) -> Tensor | None:
        """What the trained biases add to the output, or None. Shapes: (d_out,)."""
        added = [] if self.lora_bias is None else [self.scaling * self.lora_bias]
        if self.base_bias is not None:
            added.append(self.base_bias - layer.base.bias)
        return sum(added[1:], added[0]) if added else None

    def forward(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        """The layer's output with this update. Shapes: x as the layer's input, y = W x + b as its output."""
        return self.shifted(y + self.product(self.dropped(x), layer), layer)

    def shifted(self, y: Tensor, layer: Layer) -> Tensor:
        """The output with the trained biases added."""
        offset = self.offset(layer)
        return y if offset is None else y + layer.along_channels(offset.to(y.dtype), y)

    def is_plain(self) -> bool:
        """Whether `forward` adds s B A x and nothing else."""
        drops = self.training and self.dropout.p > 0
        has_bias = self.lora_bias is not None or self.base_bias is not None
        return type(self).forward is LoRA.forward and not drops and not has_bias

    def delta_weight(self, layer: Layer) -> Tensor:
        """What merging adds to the matrix view of W, in fp32. Shapes: (d_out, d_in)."""
        A, B = self.factors()
        return (B @ A) * self.scaling


class DoRA(LoRA):
    """LoRA with a learned magnitude per output row (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    y = m/n (W x + s B A x) + b, n the row norms of W + s B A, held constant in the backward pass (section 4.3).
    It is computed from m/n - 1, which keeps more digits in bf16 than m/n.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",), use_dora=True))
    >>> layer = model.bert.encoder.layer[0].attention.self.query
    >>> torch.allclose(layer.adapters["default"].magnitude, layer.base.weight.norm(dim=1))
    True
    """

    magnitude: nn.Parameter
    base_norm2: Tensor
    fixed_gain: Tensor | None

    def __init__(self, factors: Factors, scaling: float, dropout: float, layer: Layer) -> None:
        super().__init__(factors, scaling, dropout)
        self.register_buffer("base_norm2", layer.matrix().square().sum(1).cpu(), persistent=False)
        self.magnitude = nn.Parameter(self.row_norms(layer.matrix().cpu()))
        self.register_buffer("fixed_gain", None, persistent=False)

    def parts(self) -> dict[str, Tensor]:
        return {**super().parts(), "magnitude": self.magnitude}

    def row_norms(self, M: Tensor) -> Tensor:
        """Row norms of M + s B A by expanding the square, without the (d_out, d_in) product. Shapes: (d_out,)."""
        with torch.no_grad():
            A, B = self.factors()
            cross = F.linear(M, A)  # M A^T (d_out, r)
            gram = B @ (A @ A.T)  # (d_out, r)
            s = self.scaling
            norm2 = self.base_norm2 + 2 * s * (cross * B).sum(1) + s * s * (gram * B).sum(1)
            return norm2.clamp_min(torch.finfo(norm2.dtype).tiny).sqrt()  # a row of zeros must not divide by zero

    def fix(self, layer: Layer) -> None:
        """Compute m / n once for all later forwards of an update that is no longer trained."""
        self.fixed_gain = self.gain(layer).detach()

    def gain(self, layer: Layer) -> Tensor:
        """m / n, the factor of each output row. Shapes: (d_out,)."""
        if self.fixed_gain is not None:
            return self.fixed_gain
        return self.magnitude / self.row_norms(layer.matrix())

    def forward(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        """The layer's output with this update. Shapes: x as the layer's input, y = W x + b as its output."""
        gain, bias = self.gain(layer), getattr(layer.base, "bias", None)
        if self.training and self.dropout.p > 0 and x.is_floating_point():
            x = self.dropped(x)
            plain = layer.geometry.plain(x, layer.base)
            product = self.product(x, layer)
            more = layer.along_channels((gain - 1).to(y.dtype), y)
            rescaled = torch.addcmul(y + product, more, plain + product)
        elif layer.geometry in (LINEAR, TRANSPOSED):

            def again() -> Tensor:
                once_more: Tensor = layer.base(x) + self.product(x, layer)
                return once_more

            rescaled = rescale(y + self.product(x, layer), gain, bias, again)
        else:  # an operation after an embedding or a convolution may change its output in place
            less = layer.along_channels((1 - gain).to(y.dtype), y)
            end = torch.zeros_like(less) if bias is None else layer.along_channels(bias.to(y.dtype), y)
            rescaled = torch.lerp(y + self.product(x, layer), end, less)
        return self.shifted(rescaled, layer)

    def delta_weight(self, layer: Layer) -> Tensor:
        """What merging adds to the matrix view of W, in fp32. Shapes: (d_out, d_in)."""
        gain = self.gain(layer)[:, None]
        return (gain - 1) * layer.matrix() + gain * super().delta_weight(layer)


class LoRAFA(LoRA):
    """LoRA with a frozen A, so that x need not be saved for the backward pass (arXiv:2308.03303, eq. 3).

    Difference: the paper corrects the optimizer's step to follow full fine-tuning; here B gets its plain gradient.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",), update="lora_fa"))
    >>> [name for name in adapter_parameters(model) if "lora_A" in name]
    []
    """

    def __init__(self, factors: Factors, scaling: float, dropout: float = 0.0, layer: Layer | None = None) -> None:
        super().__init__(factors, scaling, dropout, layer)
        del self.lora_A
        self.register_buffer("lora_A", factors.A.clone())


class VeRA(LoRA):
    """Two trained vectors around frozen random factors shared by all layers of a shape (Kopiczko et al. 2024, arXiv:2310.11454).

    y = W x + s diag(b) B diag(d) A x + bias (eq. 2), d starting at 0.1 and b at zero (section 3.2). Differences: s is that of
    LoRA (alpha = r gives the paper's 1), and A and B are shared by layers of equal shape rather than cut from one
    largest pair. On disk it is plain LoRA, larger than the two vectors but readable by every program.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value"), update="vera"))
    >>> attention = model.bert.encoder.layer[0].attention.self
    >>> torch.equal(attention.query.adapters["default"].lora_A, attention.value.adapters["default"].lora_A)
    True
    """

    def __init__(self, factors: Factors, scaling: float, dropout: float = 0.0, layer: Layer | None = None) -> None:
        (r, d_in), d_out = factors.A.shape, len(factors.B)
        super().__init__(Factors(factors.A, torch.zeros(d_out, r)), scaling, dropout, layer)
        del self.lora_A, self.lora_B
        self.register_buffer("lora_A", _shared_projection(r, d_in), persistent=False)
        self.register_buffer("lora_B", _shared_projection(d_out, r), persistent=False)
        self.vera_lambda_d = nn.Parameter(torch.full((r,), 0.1))
        self.vera_lambda_b = nn.Parameter(torch.zeros(d_out))

    def factors(self) -> Factors:
        """The factors multiplied by the trained vectors: A (r, d_in), B (d_out, r)."""
        return Factors(self.vera_lambda_d[:, None] * self.lora_A, self.vera_lambda_b[:, None] * self.lora_B)


@cache
def _shared_projection(rows: int, columns: int) -> Tensor:
    """A kaiming-uniform matrix that depends only on its shape."""
    bound = (3 / columns) ** 0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=named_generator(0, f"vera {rows} {columns}"))


class AdaLoRA(LoRA):
    """An update in the form of a singular value decomposition, s B diag(E) A; a RankBudget prunes E.

    Zhang et al. 2023, arXiv:2303.10512, eq. 3. Difference: A and B start with orthonormal rows and columns (A's from the
    drawn one, B's from W A^T), where the paper draws normals, so that its orthogonality loss starts at zero.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",), update="adalora"))
    >>> model.bert.encoder.layer[0].attention.self.query.adapters["default"].lora_E.shape
    torch.Size([4, 1])
    """

    def __init__(self, factors: Factors, scaling: float, dropout: float, layer: Layer) -> None:
        super().__init__(Factors(factors.A, torch.zeros_like(factors.B)), scaling, dropout, layer)
        A = torch.linalg.qr(factors.A.T).Q.T
        self.lora_A = nn.Parameter(A.contiguous())
        self.lora_B = nn.Parameter(torch.linalg.qr(layer.matrix().to(A.device) @ A.T).Q.contiguous())
        self.lora_E = nn.Parameter(torch.zeros(len(A), 1))

    def factors(self) -> Factors:
        """The factors with the singular values in A: A (r, d_in), B (d_out, r)."""
        return Factors(self.lora_E * self.lora_A, self.lora_B)

    def parts(self) -> dict[str, Tensor]:
        """As in LoRA, without pruned directions (one is left if all were pruned)."""
        left = self.lora_E.flatten().nonzero().flatten()
        left = left if len(left) else left.new_zeros(1)
        A, B = self.factors()
        return {**super().parts(), "A": A[left], "B": B[:, left]}


UPDATES: Mapping[str, type[LoRA]] = {"lora": LoRA, "dora": DoRA, "lora_fa": LoRAFA, "vera": VeRA, "adalora": AdaLoRA}
