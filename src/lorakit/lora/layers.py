"""The modules that wrap frozen modules of the base model and hold adapters, and the routing that chooses among adapters.

`AdapterHost.forward` is the reference of what an adapted model computes; the update itself is `LoRA.forward` in updates.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.lora.fused_linear import Update, adapted_linear
from lorakit.lora.updates import LoRA
from lorakit.lora.weight_layouts import geometry_of

BASE = None  # as an adapter name in a routing: these examples use the base model only
Segments = Sequence[tuple[str | None, int]]  # adapter and number of examples


class AdapterHost(nn.Module):
    """A frozen module of the base model, and each adapter's module for it by adapter name."""

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.routing = routing
        self.merged: str | None = None
        self.originals: dict[str, nn.Parameter] = {}  # the base's tensors before merging; not in the state dict

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The reference: the base's output, changed for each example by its own adapter (for a low-rank update
        # W x + b + s B A x). Any other implementation is an optimisation of it.
        y: Tensor = self.base(x, *args, **kwargs)
        if self.merged:
            return y

        def changed(adapter: str | None, x: Tensor, y: Tensor) -> Tensor:
            if adapter is BASE or adapter not in self.adapters:
                return y
            return self.adapters[adapter](x, y, self)  # type: ignore[no-any-return]

        return self.routing.map(changed, x, y)

    def __getattr__(self, name: str) -> Any:
        """Attributes that other code reads from the plain module (for example wo.weight.dtype in T5's feed-forward)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def merge(self, adapter: str) -> None:
        """Compute as with `adapter`, whatever the routing, until `unmerge`."""
        if self.merged is not None:
            raise AdapterError(f"adapter {self.merged!r} is merged already; unmerge it first")
        self.merged = adapter

    def _check_finite(self, *weights: Tensor) -> None:
        if not all(weight.isfinite().all() for weight in weights):
            adapter, self.merged = self.merged, None
            raise AdapterError(f"adapter {adapter!r} would make non-finite weights; it is not merged")

    def _replace(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter of the base, which may be tied to another module's, by a new one of the same dtype."""
        old = getattr(self.base, name)
        self.originals[name] = old
        setattr(self.base, name, nn.Parameter(tensor.to(old.dtype).contiguous(), requires_grad=False))

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit."""
        self.merged = None
        for name, old in self.originals.items():
            setattr(self.base, name, old)
        self.originals.clear()

    def replaced(self, adapter: str) -> Iterable[nn.Parameter]:
        """The parameters of the base that the adapter replaces by its own."""
        return ()

    def unwrapped(self) -> nn.Module:
        """The plain module that computes the same as this host now (merged, or the base)."""
        return self.base


class Layer(AdapterHost):
    """A frozen layer of any kind in weight_layouts.py, and the low-rank updates its adapters add: y = W x + b + s B A x.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("word_embeddings", "query")))
    >>> all(isinstance(host, Layer) for _, host in hosts(model))
    True
    """

    base: Any  # a module with a weight, and a bias or none
    fused = False  # whether plain updates are computed by adapted_linear

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__(base, routing)
        geometry = geometry_of(base)
        assert geometry is not None, f"{type(base).__name__} is not a layer that can be adapted"
        self.geometry = geometry

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        updates = self.plain_updates(len(x)) if self.fused and not self.merged else None
        if updates is None or all(update.A is None for update in updates):
            return super().forward(x, *args, **kwargs)
        # an optimisation: equal up to rounding, with fewer passes over x and y
        return adapted_linear(x, self.weight, self.base.bias, updates)

    def plain_updates(self, n: int) -> list[Update] | None:
        """The updates of a batch of n examples, in its order; None if one of them is not plain."""
        updates = []
        for adapter, size in self.routing.sized(n):
            if adapter is BASE or adapter not in self.adapters:
                updates.append(Update(size))
            elif (update := self.lora(adapter)).is_plain():
                updates.append(Update(size, *update.factors(), update.scaling))
            else:
                return None
        return updates

    def lora(self, adapter: str) -> LoRA:
        """The update that `adapter` adds here."""
        update = self.adapters[adapter]
        assert isinstance(update, LoRA)
        return update

    def matrix(self) -> Tensor:
        """The matrix view of W in fp32, detached. Shapes: (d_out, d_in)."""
        return self.geometry.matrix(self.base).detach().float()

    def along_channels(self, values: Tensor, y: Tensor) -> Tensor:
        """One value per output channel, in a shape that broadcasts over y. Shapes: (d_out,)."""
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
            raise AdapterError(f"adapter {adapter!r} trains a bias where the layer has none, so it cannot be merged")
        self._replace(self.geometry.parameter, self.geometry.weight(matrix, self.base))
        if offset is not None:
            self._replace("bias", self.base.bias + offset.detach())

    @property
    def weight(self) -> Tensor:
        """W in the base's own layout."""
        weight: Tensor = getattr(self.base, self.geometry.parameter)
        return weight

    def replaced(self, adapter: str) -> Iterable[nn.Parameter]:
        return () if self.lora(adapter).base_bias is None else (self.base.bias,)


class LoRALinear(Layer):
    """A frozen linear layer and the low-rank updates its adapters add: y = W x + b + s B A x.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)))
    >>> layer = model.bert.encoder.layer[0].attention.self.query
    >>> type(layer), type(layer.base), list(layer.adapters)
    (<class 'lorakit.lora.layers.LoRALinear'>, <class 'torch.nn.modules.linear.Linear'>, ['default'])
    """

    base: nn.Linear


class SavedModule(AdapterHost):
    """A module that adapters train in full (a head, a newly initialised layer): each has its own copy.

    >>> config = LoraConfig(r=4, target_modules=("query",), modules_to_save=("classifier",))
    >>> targets = add_adapter(model, config)
    >>> [path for path, host in hosts(model) if isinstance(host, SavedModule)]
    ['classifier']
    """

    def __getattr__(self, name: str) -> Any:
        return nn.Module.__getattr__(self, name)  # the base's weights are not the ones in use

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
            if not isinstance(rows, Tensor) or not rows.is_floating_point():  # an embedding takes ids
                looked_up: Tensor = module(rows, *args, **kwargs)
                return looked_up.to(next(self.base.parameters()).dtype)
            dtype = next(module.parameters()).dtype  # the copy is fp32 even over a bf16 base
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


class Routing:
    """Which adapter serves which examples of a batch; one object per model, shared by all its hosts.

    `segments` are in batch order. One segment serves the whole batch whatever its size; no segment means the base model.
    Beam search multiplies examples, so the caller multiplies the counts.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",)), "a")
    >>> routing = model.bert.encoder.layer[0].attention.self.query.routing
    >>> with routed(model, [("a", 1), (None, 2)]):
    ...     print(routing.segments)
    [('a', 1), (None, 2)]
    """

    def __init__(self) -> None:
        self.segments: Segments = []

    @contextmanager
    def routed(self, segments: Segments) -> Iterator[None]:
        """Use these segments within this block."""
        before, self.segments = self.segments, segments
        try:
            yield
        finally:
            self.segments = before

    def use(self, adapter: str | None) -> None:
        """Send every example to one adapter, or to the base model."""
        self.segments = [] if adapter is BASE else [(adapter, 0)]

    def only(self) -> str | None:
        """The single adapter of the whole batch, for modules that cannot be applied to a part of it."""
        if len(self.segments) > 1:
            raise ValueError("nn.MultiheadAttention serves one adapter per batch")
        return self.segments[0][0] if self.segments else BASE

    def sized(self, n: int) -> Segments:
        """The segments of a batch of n examples, with their numbers.

        Raises:
            ValueError: several segments cover more or less than the batch.
        """
        if len(self.segments) <= 1:
            return [(self.only(), n)]
        if (covered := sum(size for _, size in self.segments)) != n:
            raise ValueError(f"routing covers {covered} rows, the batch has {n}")
        return self.segments

    def map(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Apply `function(adapter, *slices)` to each segment of `rows` and concatenate the results.

        Results of different width (heads with different numbers of classes) are padded with zeros to the widest.
        """
        if len(self.segments) <= 1:
            return function(self.only(), *rows)
        segments = self.sized(len(rows[0]))
        parts = zip(*(tensor.split([size for _, size in segments]) for tensor in rows), strict=True)
        answers = [function(adapter, *slices) for (adapter, _), slices in zip(segments, parts, strict=True)]
        width = max(answer.shape[-1] for answer in answers)
        return torch.cat([F.pad(answer, (0, width - answer.shape[-1])) for answer in answers])


def hosts(model: nn.Module, adapter: str | None = None) -> Sequence[tuple[str, AdapterHost]]:
    """Every (path, host) in the model's order; with `adapter`, only those that hold its modules.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> [path for path, _ in hosts(model)][0]
    'bert.encoder.layer.0.attention.self.query'
    """
    all_hosts = [(path, module) for path, module in model.named_modules() if isinstance(module, AdapterHost)]
    return all_hosts if adapter is None else [(path, host) for path, host in all_hosts if adapter in host.adapters]
