"""Frozen linear layers with 8- or 4-bit weights: a tensor that keeps codes and scales and acts as the matrix they stand for.

The layers stay the modules they were; only their weight is of another kind, so that targeting, merging and files need to
know nothing of it. Autograd runs above `__torch_dispatch__`: what a layer keeps for its backward pass are the codes, and
every product makes the dense matrix anew and drops it. Why not a library's: docs/adr/0006.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lorakit.errors import ConfigError, ModelError, did_you_mean
from lorakit.lora.config import LoraConfig
from lorakit.lora.inits import pissa_init
from lorakit.lora.layers import Layer, hosts
from lorakit.lora.targets import linear_layers, select_targets
from lorakit.lora.updates import DoRA, LoRA, LoRAFA
from lorakit.lora.weight_layouts import TRANSPOSED, geometry_of

INT8_LARGEST = 127  # -128 is not used, so that codes are symmetric
NF4_BLOCK = 64  # values that share a scale (QLoRA, section 2)
NF4_LEVELS = (  # quantiles of the normal distribution, scaled to [-1, 1], with an exact 0 (QLoRA, appendix E)
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Format(NamedTuple):
    """A way to keep a matrix: as codes and scales, and from these its values again, row by row."""

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]  # of fp32
    decode: Callable[[Tensor, Tensor], Tensor]  # in fp32; may be longer than the matrix


def int8_encode(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers to +-127 and one scale a row, its largest absolute value / 127.

    Shapes: matrix (d_out, d_in); codes int8 (d_out, d_in), scales fp32 (d_out, 1).
    """
    scales = _largest(matrix) / INT8_LARGEST
    return (matrix / _divisor(scales)).round_().to(torch.int8), scales


def int8_decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The values, each within half a scale of what was encoded. Shapes: as int8_encode's."""
    return codes.float().mul_(scales)


def nf4_encode(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of 16 levels, two to a byte, and one scale for 64 values (Dettmers et al. 2023, arXiv:2305.14314, eq. 4).

    The scales stay fp32: half a bit a value, of which the paper's double quantisation would save three quarters.

    Shapes: matrix (d_out, d_in), n blocks of it; codes uint8 (n, 32), scales fp32 (n, 1).
    """
    blocks = F.pad(matrix.flatten(), (0, -matrix.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = _largest(blocks)
    blocks = blocks / _divisor(scales)
    codes = torch.zeros_like(blocks, dtype=torch.uint8)
    for low, high in pairwise(NF4_LEVELS):  # five times as fast as torch.bucketize
        codes += blocks > (low + high) / 2
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def nf4_decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The values. Shapes: as nf4_encode's; the answer (n, 64), what fills the last block included."""
    pairs = _nf4_pairs(codes.device).index_select(0, codes.flatten().int())
    return pairs.view(torch.float32).view(-1, NF4_BLOCK).mul_(scales)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """The two fp32 levels that each byte stands for, as one int64: a twelfth of the time of looking up two. Shapes: (256,)."""
    levels = torch.tensor(NF4_LEVELS)
    return torch.cartesian_prod(levels, levels).view(torch.int64).flatten().to(device)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1, keepdim=True)


def _divisor(scales: Tensor) -> Tensor:
    return scales.clamp_min(torch.finfo(scales.dtype).tiny)  # a row of zeros must not divide by zero


FORMATS: Mapping[str, Format] = {
    "int8": Format(int8_encode, int8_decode),
    "nf4": Format(nf4_encode, nf4_decode),
}


class QuantizedTensor(Tensor):
    """A frozen matrix kept in one of the FORMATS, of the dtype in which products with it are computed.

    Moving, casting, transposing and copying it keep it quantised; every other operation sees the dense matrix; and what
    would write into it is refused. Shapes: (d_out, d_in), or transposed.
    """

    codes: Tensor
    scales: Tensor
    format: str
    transposed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, format: str, shape: torch.Size, dtype: torch.dtype, transposed: bool = False
    ) -> QuantizedTensor:
        with torch.inference_mode(False):  # what is made in a mode of inference could not be a view of a parameter
            made: QuantizedTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        made.codes, made.scales, made.format, made.transposed = codes, scales, format, transposed
        return made

    @classmethod
    def of(cls, matrix: Tensor, format: str) -> Self:
        """A dense matrix, encoded from fp32. Shapes: (d_out, d_in)."""
        codes, scales = FORMATS[format].encode(matrix.detach().float())
        return cls(codes, scales, format, matrix.shape, matrix.dtype)

    def dequantize(self) -> Tensor:
        """The dense matrix in this tensor's dtype."""
        shape = self.shape[::-1] if self.transposed else self.shape
        values = FORMATS[self.format].decode(self.codes, self.scales).flatten()[: self.numel()]
        matrix = values.view(shape).to(self.dtype)
        return matrix.T if self.transposed else matrix

    def moved(
        self, move: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, *, flip: bool = False
    ) -> QuantizedTensor:
        """The same matrix, or its transpose, with `move` applied to codes and scales."""
        shape = self.shape[::-1] if flip else self.shape
        dtype = dtype or self.dtype
        return QuantizedTensor(
            move(self.codes), move(self.scales), self.format, shape, dtype, transposed=self.transposed != flip
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in KEPT:
            return KEPT[func](*args, **(kwargs or {}))
        if func._schema.is_mutable and isinstance(args[0], QuantizedTensor):
            raise RuntimeError(f"a quantised weight is frozen: {func} would write into it")
        args, kwargs = tree_map(_dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:  # tells torch that this tensor is made of others
        return ["codes", "scales"], (self.format, self.shape, self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], rest: Any, shape: Any, stride: Any) -> QuantizedTensor:
        return QuantizedTensor(inner["codes"], inner["scales"], *rest)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.format}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _dense(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _same(part: Tensor) -> Tensor:
    return part


def _to(
    weight: QuantizedTensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> Tensor:
    if dtype is not None and not dtype.is_floating_point:
        return weight.dequantize().to(device, dtype)
    return weight.moved(lambda part: part.to(device), dtype)


KEPT: Mapping[Any, Callable[..., Tensor]] = {  # what leaves a matrix quantised
    torch.ops.aten.detach.default: lambda weight: weight.moved(_same),
    torch.ops.aten.clone.default: lambda weight, **_: weight.moved(torch.clone),
    torch.ops.aten._to_copy.default: _to,
    torch.ops.aten.t.default: lambda weight: weight.moved(_same, flip=True),
    torch.ops.aten.permute.default: lambda weight, dims: weight.moved(_same, flip=dims[0] % 2 == 1),  # Tensor.T
}


@torch.no_grad()
def quantize(model: nn.Module, format: str, *, skip: Iterable[str] = ()) -> list[str]:
    """Quantise the weights of a model's linear layers in place, before it gets adapters; their paths are given back.

    These are the layers of `all-linear`: no head, no embedding, no norm. `skip` names what is to be trained in full, as
    modules_to_save does. Each weight keeps its dtype as that of its products; biases stay as they are.

    >>> len(quantize(model, "int8"))
    19

    Raises:
        ConfigError: the format is unknown, `skip` matches nothing, the model has adapters or quantised weights, or
            no linear layer is left.
        ModelError: a weight is not finite.
    """
    if format not in FORMATS:
        raise ConfigError(f"quantize = {format!r} is not known; {did_you_mean(format, FORMATS)}")
    if hosts(model):
        raise ConfigError("quantize comes before the first adapter; this model has adapters already")
    layers = linear_layers(model)
    targets = select_targets(model, LoraConfig(modules_to_save=tuple(skip)))
    chosen: dict[str, Any] = {target.path: layers[target.path] for target in targets if target.path in layers}
    for path, layer in chosen.items():
        if is_quantized(layer):
            raise ConfigError(f"{path} is quantised already; load the model again to choose another format")
        if not layer.weight.isfinite().all():
            raise ModelError(f"{path}.weight holds NaN or infinite values and cannot be quantised")
    for layer in dict.fromkeys(chosen.values()):  # ALBERT's blocks are one module with many paths
        geometry = geometry_of(layer)
        assert geometry is not None
        weight = geometry.weight(QuantizedTensor.of(geometry.matrix(layer), format), layer)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return list(chosen)


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """Replace every quantised weight by the dense one that it represents, in place.

    >>> paths = quantize(model, "int8")
    >>> model is dequantize(model)
    True
    """
    for layer in model.modules():
        if is_quantized(layer):
            layer.register_parameter("weight", nn.Parameter(_dense(layer.weight), requires_grad=False))
    return model


def is_quantized(layer: nn.Module) -> bool:
    """Whether this module itself, not its children, has a quantised weight."""
    return isinstance(layer._parameters.get("weight"), QuantizedTensor)


@torch.no_grad()
def loftq(model: nn.Module, original: Mapping[str, Tensor], name: str = "default") -> None:
    """Initialise an adapter by the best rank-r approximation of the quantisation error: s B A ~ W - Q(W).

    Li et al. 2023, arXiv:2310.08659, algorithm 1 with T = 1. With more rounds the codes would depend on the adapter, and
    could neither be shared by several adapters nor be recomputed from the base model. It is not in INITS, since those
    leave the model's outputs unchanged, while this one moves them towards those of the unquantised model.
    `original` holds the unquantised weights by the names of the plain model's state dict.

    >>> original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    >>> paths = quantize(model, "nf4")
    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> loftq(model, original)

    Raises:
        ConfigError: the adapter has no layer with a quantised weight, is not LoRA or DoRA, has another
            initialisation (pissa, olora), or an original weight is missing.
    """
    layers = {path: host for path, host in hosts(model, name) if isinstance(host, Layer) and is_quantized(host.base)}
    if not layers:
        raise ConfigError(f"loftq: adapter {name!r} has no layer with a quantised weight; quantize the model first")
    for path, layer in layers.items():
        if (key := f"{path}.weight") not in original:
            raise ConfigError(f"loftq: no original weight {key!r}; {did_you_mean(key, original)}")
        update = layer.lora(name)
        if type(update) not in (LoRA, DoRA, LoRAFA) or update.start_A is not None:
            raise ConfigError(
                f"loftq: adapter {name!r} needs update = 'lora' or 'dora' and init_lora_weights = 'kaiming'"
            )
        lost = original[key].float() - _dense(layer.base.weight).float()
        lost = lost.T if layer.geometry is TRANSPOSED else lost
        lost = lost if update.rows is None else lost[update.rows]
        start = pissa_init(lost, len(update.lora_A), update.scaling, torch.Generator())
        update.lora_A.copy_(start.A)
        update.lora_B.copy_(start.B)
        if isinstance(update, DoRA):
            update.magnitude.copy_(update.row_norms(layer.matrix()))
