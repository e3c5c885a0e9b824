"""What to do where memory has no room for a batch: half of it at a time."""

from __future__ import annotations

import torch

# What torch's allocators say; the GPU's has a class of its own.
WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that memory, the GPU's or the machine's, has no room."""
    if isinstance(err, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(err, RuntimeError) and any(words in str(err).lower() for words in WORDS)


def half(rows: int) -> int:
    """The larger half of so many rows; what the failed attempt held on the GPU is given back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return (rows + 1) // 2
