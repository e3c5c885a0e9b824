"""Adapters other than low-rank updates of a layer's input: biases, rows of an embedding, fused attention.

Shapes: V tokens in the vocabulary, d the width of an embedding, n trained rows, E the width of an attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.lora.layers import BASE, AdapterHost, Layer, Routing, hosts
from lorakit.lora.updates import LoRA


class TrainedBias(nn.Module):
    """An adapter's own bias for a module of the base, in fp32. Shapes: (d_out,)."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.base_bias = nn.Parameter(bias.detach().float().clone())


class BiasHost(AdapterHost):
    """A module without a low-rank update whose bias is trained (peft's bias = "all")."""

    base: Any

    def add(self, adapter: str) -> None:
        """Give `adapter` a trainable fp32 copy of the bias."""
        self.adapters[adapter] = TrainedBias(self.base.bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def run(adapter: str | None, rows: Tensor) -> Tensor:
            own = adapter is not BASE and adapter in self.adapters
            bias = {"bias": self.bias(str(adapter)).to(self.base.bias.dtype)} if own else {}
            answer: Tensor = torch.func.functional_call(self.base, bias, (rows, *args), kwargs)
            return answer

        return run(BASE, x) if self.merged else self.routing.map(run, x)

    def bias(self, adapter: str) -> nn.Parameter:
        """The adapter's own bias. Shapes: (d_out,)."""
        trained = self.adapters[adapter]
        assert isinstance(trained, TrainedBias)
        return trained.base_bias

    def merge(self, adapter: str) -> None:
        super().merge(adapter)
        if adapter in self.adapters:
            bias = self.bias(adapter).detach()
            self._check_finite(bias)
            self._replace("bias", bias)

    def replaced(self, adapter: str) -> Iterable[nn.Parameter]:
        return (self.base.bias,)


class TrainedRows(nn.Module):
    """An adapter's own rows of an embedding, in fp32. Shapes: indices (n,), rows (n, d), slots (V,)."""

    indices: Tensor
    slots: Tensor

    def __init__(self, weight: Tensor, indices: Sequence[int]) -> None:
        super().__init__()
        places = torch.tensor(list(indices), device=weight.device)
        slots = torch.full((len(weight),), -1, device=weight.device)
        slots[places] = torch.arange(len(places), device=weight.device)
        self.register_buffer("indices", places, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.rows = nn.Parameter(weight.detach()[places].float())

    def forward(self, x: Tensor, y: Tensor, host: RowsHost) -> Tensor:
        """The host's output y for x with these rows inserted: looked up by ids, or as logits. Shapes: (B, ..., d or V)."""
        if isinstance(host.base, nn.Linear):
            bias = None if host.base.bias is None else host.base.bias[self.indices]
            return y.index_copy(-1, self.indices, F.linear(x, self.rows.to(x.dtype), bias))
        slots = self.slots[x]
        rows = self.rows.to(y.dtype)[slots.clamp_min(0)] * getattr(host.base, "embed_scale", 1.0)  # BART scales
        return torch.where(slots.ge(0)[..., None], rows, y)


class RowsHost(AdapterHost):
    """An embedding of which adapters train some rows (peft's trainable_token_indices), or an output layer tied to it.

    Tied modules share one TrainedRows, so a new token has the same vector as input and output.
    """

    base: Any

    def trained(self, adapter: str) -> TrainedRows:
        """The rows that `adapter` trains here."""
        rows = self.adapters[adapter]
        assert isinstance(rows, TrainedRows)
        return rows

    def merge(self, adapter: str) -> None:
        super().merge(adapter)
        if adapter in self.adapters:
            trained = self.trained(adapter)
            self._check_finite(trained.rows)
            weight = self.base.weight
            self._replace("weight", weight.index_copy(0, trained.indices, trained.rows.detach().to(weight.dtype)))


class Attention(Layer):
    """nn.MultiheadAttention, whose fused input projection and output projection each get an update.

    The module applies its weights itself, so the updates act on the weights and not on inputs. The output projection is a
    separate Layer under its own name.
    """

    base: nn.MultiheadAttention

    def __init__(self, base: nn.MultiheadAttention, routing: Routing) -> None:
        super().__init__(base, routing)
        base.out_proj = Layer(base.out_proj, routing)  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = None if self.merged else self.routing.only()
        if adapter is BASE or adapter not in self.adapters:
            return self.base(*args, **kwargs)
        weights = {
            "in_proj_weight": _updated(self, adapter),
            "out_proj.base.weight": _updated(self.base.out_proj, adapter),  # type: ignore[arg-type]
        }
        return torch.func.functional_call(self.base, weights, args, kwargs)


def _updated(layer: Layer, adapter: str) -> Tensor:
    weight: Tensor = getattr(layer.base, layer.geometry.parameter)
    update: LoRA = layer.lora(adapter)
    return weight + layer.geometry.weight(update.delta_weight(layer), layer.base).to(weight.dtype)


def set_fast_paths(model: nn.Module) -> None:
    """Disable PyTorch's fused path of each nn.TransformerEncoderLayer that contains a host, and enable it in the others.

    The fused kernel uses the weights without calling the modules, so an adapter inside would have no effect.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            relu = module.activation is F.relu or isinstance(module.activation, nn.ReLU)
            gelu = module.activation is F.gelu or isinstance(module.activation, nn.GELU)
            module.activation_relu_or_gelu = 0 if hosts(module) else 1 if relu else 2 if gelu else 0  # PyTorch's codes
