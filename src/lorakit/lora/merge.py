"""Fold an adapter into the base weights, and take it out again bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.lora.inject import check_known, unload
from lorakit.lora.layer import hosts
from lorakit.lora.quantize import dequantize


@torch.no_grad()
def merge(model: nn.Module, name: str = "default") -> None:
    """Fold the adapter into the base: W becomes W + s B A. The old weights are kept, so `unmerge` is exact.

    Over a quantised W the sum is dense, in the dtype of W's products; `unmerge` brings the codes back.

    Raises:
        AdapterError: the adapter is unknown, one is merged already, or a merged weight would not be finite;
            in every case the model stays as it was.
    """
    check_known(model, name)
    done = []
    try:
        for _, host in hosts(model):
            host.merge(name)
            done.append(host)
    except Exception:
        for host in done:
            host.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: every base weight is again the very tensor it was."""
    for _, host in hosts(model):
        host.unmerge()


def merge_and_unload(model: nn.Module, name: str = "default") -> nn.Module:
    """The plain model with the adapter folded in and no trace of LoRA or of quantised weights left."""
    merge(model, name)
    return dequantize(unload(model))
