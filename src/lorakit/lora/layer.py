"""The modules that hold adapters beside the frozen layers of the base model, and the routing that chooses among them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.lora.geometry import geometry_of
from lorakit.lora.kernels import adapted_linear
from lorakit.lora.updates import LoRA

BASE = None  # as an adapter name in a routing: these rows see the base model alone


class Routing:
    """Which adapter serves which rows of a batch; one object per model, shared by all its hosts.

    `segments` lists (adapter, number of rows) in batch order. One segment serves the whole batch whatever its
    size; no segment means the base model. Beam search multiplies rows, so the caller multiplies the counts.
    """

    def __init__(self) -> None:
        self.segments: list[tuple[str | None, int]] = []

    def use(self, adapter: str | None) -> None:
        """Send every row to one adapter, or to the base model."""
        self.segments = [] if adapter is BASE else [(adapter, 0)]

    def only(self) -> str | None:
        """The one adapter that serves the whole batch, for modules that cannot be applied to a part of it."""
        if len(self.segments) > 1:
            raise ValueError("nn.MultiheadAttention serves one adapter a batch")
        return self.segments[0][0] if self.segments else BASE

    def map(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Apply `function(adapter, *slices)` to each segment of `rows` and put the answers together again."""
        if len(self.segments) <= 1:
            return function(self.only(), *rows)
        sizes = [size for _, size in self.segments]
        if sum(sizes) != len(rows[0]):
            raise ValueError(f"routing covers {sum(sizes)} rows, the batch has {len(rows[0])}")
        pieces = zip(*(tensor.split(sizes) for tensor in rows), strict=True)
        answers = [function(adapter, *slices) for (adapter, _), slices in zip(self.segments, pieces, strict=True)]
        return torch.cat(answers)


class AdapterHost(nn.Module):
    """A frozen module of the base model and what each adapter keeps beside it, by adapter name."""

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.routing = routing
        self.merged: str | None = None
        self._kept: dict[str, nn.Parameter] = {}  # the base's tensors as they were before merging; in no state dict

    def __getattr__(self, name: str) -> Any:
        """What other code reads from the plain module (T5's feed-forward looks at wo.weight.dtype, say)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base(x, *args, **kwargs)
        return y if self.merged else self.routing.map(self._changed, x, y)

    def _changed(self, adapter: str | None, x: Tensor, y: Tensor) -> Tensor:
        """The base's answer as the adapter's part changes it."""
        if adapter is BASE or adapter not in self.adapters:
            return y
        changed: Tensor = self.adapters[adapter](x, y, self)
        return changed

    def merge(self, adapter: str) -> None:
        """Answer as `adapter` does, whatever the routing says, until `unmerge`."""
        if self.merged is not None:
            raise AdapterError(f"adapter {self.merged!r} is merged already; unmerge it first")
        self.merged = adapter

    def _check_finite(self, *weights: Tensor) -> None:
        if not all(weight.isfinite().all() for weight in weights):
            adapter, self.merged = self.merged, None
            raise AdapterError(f"adapter {adapter!r} would make non-finite weights; it is not merged")

    def _replace(self, name: str, tensor: Tensor) -> None:
        """Let a new parameter of the base's dtype stand in for one of its own, which may be tied to another module's."""
        old = getattr(self.base, name)
        self._kept[name] = old
        setattr(self.base, name, nn.Parameter(tensor.to(old.dtype).contiguous(), requires_grad=False))

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        self.merged = None
        for name, old in self._kept.items():
            setattr(self.base, name, old)
        self._kept.clear()

    def replaced(self, adapter: str) -> Iterable[nn.Parameter]:
        """The parameters of the base in whose place the adapter has its own."""
        return ()

    def unwrapped(self) -> nn.Module:
        """The plain module that answers as this host does now (merged, or the base)."""
        return self.base


class Layer(AdapterHost):
    """A frozen layer of any kind in geometry.py, and the low-rank updates its adapters add: y = W x + b + s B A x."""

    base: Any  # a module with a weight, and a bias or none
    fused = False  # whether plain updates of plain layers are computed by kernels.adapted_linear

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__(base, routing)
        geometry = geometry_of(base)
        assert geometry is not None, f"{type(base).__name__} is no layer that can be adapted"
        self.geometry = geometry

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        update = self._fusible() if self.fused else None
        if update is None:
            return super().forward(x, *args, **kwargs)
        return adapted_linear(x, self.weight, self.base.bias, *update.factors(), update.scaling)

    def _fusible(self) -> LoRA | None:
        """The update that serves the whole batch, if it is W x + b + s B A x and nothing more."""
        name = self.routing.only() if len(self.routing.segments) == 1 else BASE
        if self.merged or name is BASE or name not in self.adapters:
            return None
        update = self.lora(name)
        return update if update.is_plain() else None

    def lora(self, adapter: str) -> LoRA:
        """The update that `adapter` adds here."""
        update = self.adapters[adapter]
        assert isinstance(update, LoRA)
        return update

    def matrix(self) -> Tensor:
        """The matrix view of W in fp32, detached. Shapes: (d_out, d_in)."""
        return self.geometry.matrix(self.base).detach().float()

    def along_channels(self, values: Tensor, y: Tensor) -> Tensor:
        """One value per output channel, shaped to be broadcast over y. Shapes: (d_out,)."""
        shape = [1] * y.dim()
        shape[self.geometry.channel] = -1
        return values.view(shape)

    def merge(self, adapter: str) -> None:
        super().merge(adapter)
        if adapter not in self.adapters:
            return
        update = self.lora(adapter)
        matrix, offset = self.matrix() + update.delta_weight(self).detach(), update.offset(self)
        self._check_finite(matrix.to(self.weight.dtype), *([] if offset is None else [offset]))
        if offset is not None and getattr(self.base, "bias", None) is None:
            self.merged = None
            raise AdapterError(f"adapter {adapter!r} trains a bias where the layer has none; it cannot be merged")
        self._replace(self.geometry.parameter, self.geometry.weight(matrix, self.base))
        if offset is not None:
            self._replace("bias", self.base.bias + offset.detach())

    @property
    def weight(self) -> Tensor:
        """W as the base keeps it."""
        weight: Tensor = getattr(self.base, self.geometry.parameter)
        return weight

    def replaced(self, adapter: str) -> Iterable[nn.Parameter]:
        return () if self.lora(adapter).base_bias is None else (self.base.bias,)


class LoRALinear(Layer):
    """A frozen linear layer and the low-rank updates its adapters add: y = W x + b + s B A x."""

    base: nn.Linear


class SavedModule(AdapterHost):
    """A module that adapters train in full (a head, a newly initialised layer): each has its own copy."""

    def __getattr__(self, name: str) -> Any:
        return nn.Module.__getattr__(self, name)  # the base's weights are not what answers

    def add(self, adapter: str) -> None:
        """Give `adapter` a trainable fp32 copy of the base module."""
        self.adapters[adapter] = copy.deepcopy(self.base).float().requires_grad_(True)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def run(adapter: str | None, rows: Tensor) -> Tensor:
            name = self.merged or adapter
            if name is BASE or name not in self.adapters:
                answer: Tensor = self.base(rows, *args, **kwargs)
                return answer
            module = self.adapters[name]
            if not rows.is_floating_point():  # an embedding takes ids
                looked_up: Tensor = module(rows, *args, **kwargs)
                return looked_up.to(next(self.base.parameters()).dtype)
            dtype = next(module.parameters()).dtype  # the copy is fp32 also over a bf16 base
            trained: Tensor = module(rows.to(dtype), *args, **kwargs)
            return trained.to(rows.dtype)

        return run(BASE, x) if self.merged else self.routing.map(run, x)

    def merge(self, adapter: str) -> None:
        super().merge(adapter)
        if adapter in self.adapters:
            self._check_finite(*self.adapters[adapter].parameters())

    def replaced(self, adapter: str) -> Iterable[nn.Parameter]:
        return self.base.parameters()

    def unwrapped(self) -> nn.Module:
        if self.merged is None or self.merged not in self.adapters:
            return self.base
        dtype = next(self.base.parameters()).dtype
        return self.adapters[self.merged].to(dtype).requires_grad_(False)


def hosts(model: nn.Module, adapter: str | None = None) -> Sequence[tuple[str, AdapterHost]]:
    """Every (path, host) in the model's order; with `adapter`, those that hold a part of it."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, AdapterHost)]
    return found if adapter is None else [(path, host) for path, host in found if adapter in host.adapters]
