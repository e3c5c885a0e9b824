"""Which speed-ups a model gets: by fixed rules, not by measurement, so that runs are reproducible; see docs/adr/."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakit.lora import fuse, read_first_row
from lorakit.models import BaseModel, attend_in_fp32


@dataclass(frozen=True)
class Kernels:
    """The speed-ups applied to a model."""

    fused: int = 0  # adapted linear layers computed in one function
    first_row: bool = False  # the last block computes token 0 only
    fp32_attention: bool = False  # the backward pass of attention is slow in bf16 on CPUs

    def __str__(self) -> str:
        parts = {
            f"{self.fused} adapted linear layers in one function each": self.fused,
            "last block: first token only": self.first_row,
            "attention in fp32": self.fp32_attention,
        }
        return "; ".join(words for words, used in parts.items() if used) or "plain"


PLAIN = Kernels()


def speed_up(base: BaseModel, dtype: torch.dtype, device: torch.device) -> Kernels:
    """Apply all speed-ups that help here to a model that is cast and adapted."""
    attention = dtype == torch.bfloat16 and device.type == "cpu"
    return Kernels(
        fused=fuse(base.model),
        first_row=base.kind.peft_task_type == "SEQ_CLS" and read_first_row(base.model),
        fp32_attention=attention and attend_in_fp32(base.model),
    )
