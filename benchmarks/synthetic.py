"""A model and texts of nobody's, for benchmarks of what goes on around a model: a random BERT of one layer over made-up words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(
    f"{a}{b}" for a in ("bri", "lor", "tam", "vel", "sun", "mor", "kip", "dra") for b in ("no", "ta", "lim", "es")
)


def save_base(folder: Path, **settings: Any) -> None:
    """The model, the same each time, and a tokenizer of whole words; `settings` are those of a BertConfig."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, **settings)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
