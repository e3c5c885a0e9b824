"""Tiny random models for tests: built from a config on the spot, no network, the same weights at each call.

They are in eval mode and without dropout. Every weight and bias is drawn anew, so that nothing is zero or one by its
default: a bias that is dropped or a norm that is skipped changes the answer.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 60
BERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_bert(num_labels: int = 2, **kw: Any) -> PreTrainedModel:
    """BERT with a sequence-classification head. `kw` goes to BertConfig; `seed` chooses the weights."""
    return _bert("BertForSequenceClassification", num_labels, **kw)


def tiny_token_bert(num_labels: int = 5, **kw: Any) -> PreTrainedModel:
    """BERT with a token-classification head."""
    return _bert("BertForTokenClassification", num_labels, **kw)


def tiny_roberta(num_labels: int = 2, **kw: Any) -> PreTrainedModel:
    """RoBERTa, whose head is a module of two linear layers."""
    seed = kw.pop("seed", 0)
    config = transformers.RobertaConfig(**{**BERT_SIZES, "num_labels": num_labels, **kw})
    return randomized(transformers.RobertaForSequenceClassification(config), seed)


def tiny_distilbert(num_labels: int = 2, **kw: Any) -> PreTrainedModel:
    """DistilBERT, whose head begins with `pre_classifier`."""
    seed = kw.pop("seed", 0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY}
    still = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    config = transformers.DistilBertConfig(**{**sizes, **still, "num_labels": num_labels, **kw})
    return randomized(transformers.DistilBertForSequenceClassification(config), seed)


def tiny_t5(**kw: Any) -> PreTrainedModel:
    """T5 for conditional generation. `kw` goes to T5Config; `seed` chooses the weights."""
    seed = kw.pop("seed", 0)
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "vocab_size": VOCABULARY}
    depths = {"num_layers": 3, "num_decoder_layers": 1}
    config = transformers.T5Config(**{**sizes, **depths, "dropout_rate": 0.0, "decoder_start_token_id": 0, **kw})
    return randomized(transformers.T5ForConditionalGeneration(config), seed)


def _bert(architecture: str, num_labels: int, **kw: Any) -> PreTrainedModel:
    seed = kw.pop("seed", 0)
    config = transformers.BertConfig(**{**BERT_SIZES, "num_labels": num_labels, **kw})
    return randomized(getattr(transformers, architecture)(config), seed)


@torch.no_grad()
def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with every parameter drawn from the seed: matrices ~ 0.7/sqrt(d_in), vectors about their default."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(0.7 * noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
    return model.eval()


def tiny_batch(model: nn.Module, rows: int = 6, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for any of these models, the last rows padded. Shapes: (rows, tokens); T5 gets labels too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[rows // 2 :, tokens - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if isinstance(model, transformers.T5ForConditionalGeneration):
        batch["labels"] = torch.randint(5, VOCABULARY, (rows, 4), generator=generator)
    return batch


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's answer. Shapes: (B, C), (B, T, C) or, for T5, (B, target tokens, V)."""
    answer: Tensor = model(**batch).logits
    return answer
