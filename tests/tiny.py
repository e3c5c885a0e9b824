"""Tiny random models for tests: built from a config on the spot, no network, the same weights at each call.

transformers takes longer to build one than a test to use it, so that each is built once and copied at each call.
They are in eval mode and without dropout. Every weight and bias is drawn anew, so that nothing is zero or one by its
default: a bias that is dropped or a norm that is skipped changes the answer.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.data.example import Example
from lorakit.tasks.base import Batch, Item, Task

Model = TypeVar("Model", bound=nn.Module)
VOCABULARY = 60
ENCODER_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
}
BERT_SIZES = {**ENCODER_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# by model_type: everything that a tiny model of the family needs to be told
SIZES: dict[str, dict[str, Any]] = {
    "albert": {**BERT_SIZES, "embedding_size": 16},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "vocab_size": VOCABULARY,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 40,
        "dropout": 0.0,
    },
    "bert": BERT_SIZES,
    "deberta-v2": {
        **BERT_SIZES,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "pooler_hidden_size": 32,
        "conv_kernel_size": 3,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "vocab_size": VOCABULARY,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "electra": {**BERT_SIZES, "embedding_size": 16},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "modernbert": {
        **ENCODER_SIZES,
        "local_attention": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    **dict.fromkeys(("roberta", "camembert", "xlm-roberta"), BERT_SIZES),
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "d_ff": 48,
        "vocab_size": VOCABULARY,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
}


def tiny(architecture: str, *, seed: int = 0, **kw: Any) -> PreTrainedModel:
    """A model by its class in transformers. `kw` goes to its config; `seed` chooses the weights."""
    return _maker(architecture, seed, pickle.dumps(kw))()


@functools.cache
def _maker(architecture: str, seed: int, kw: bytes) -> Callable[[], PreTrainedModel]:
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**SIZES[model_class.config_class.model_type], **pickle.loads(kw)})
    return copier(randomized(model_class(config), seed))


def copier(model: Model) -> Callable[[], Model]:
    """What gives a copy of the model at each call, five times as fast as copy.deepcopy; tied tensors stay tied."""
    tensors: dict[int, Tensor] = {}

    def key(thing: object) -> int | None:
        if not isinstance(thing, Tensor):
            return None
        tensors[id(thing)] = thing
        return id(thing)

    pickled = io.BytesIO()
    pickler = pickle.Pickler(pickled)
    pickler.persistent_id = key
    pickler.dump(model)

    def copied() -> Model:
        unpickler = pickle.Unpickler(io.BytesIO(pickled.getvalue()))
        unpickler.persistent_load = functools.cache(lambda key: copy.deepcopy(tensors[key]))
        return unpickler.load()

    return copied


def read_once(load: Callable[..., tuple[nn.Module, set[str]]]) -> Callable[..., tuple[nn.Module, set[str]]]:
    """lorakit.models._model that reads a folder once for each way of reading it, and copies what it has read from then on."""
    known: dict[object, tuple[Callable[[], nn.Module], set[str]]] = {}

    @functools.wraps(load)
    def read(folder: Path, name: str, kind: object, config: object, seed: int) -> tuple[nn.Module, set[str]]:
        files = frozenset((path, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
        key = (files, name, kind, pickle.dumps(config), seed)
        if key not in known:
            model, missing = load(folder, name, kind, config, seed)
            known[key] = copier(model), missing
        copied, missing = known[key]
        return copied(), set(missing)

    return read


def tiny_bert(num_labels: int = 2, **kw: Any) -> PreTrainedModel:
    """BERT with a sequence-classification head."""
    return tiny("BertForSequenceClassification", num_labels=num_labels, **kw)


def tiny_token_bert(num_labels: int = 5, **kw: Any) -> PreTrainedModel:
    """BERT with a token-classification head."""
    return tiny("BertForTokenClassification", num_labels=num_labels, **kw)


def tiny_roberta(num_labels: int = 2, **kw: Any) -> PreTrainedModel:
    """RoBERTa, whose head is a module of two linear layers."""
    return tiny("RobertaForSequenceClassification", num_labels=num_labels, **kw)


def tiny_distilbert(num_labels: int = 2, **kw: Any) -> PreTrainedModel:
    """DistilBERT, whose head begins with `pre_classifier`."""
    return tiny("DistilBertForSequenceClassification", num_labels=num_labels, **kw)


def tiny_gpt2(**kw: Any) -> PreTrainedModel:
    """GPT-2, whose linear layers are transposed and whose head is tied to the embeddings."""
    return tiny("GPT2LMHeadModel", **kw)


def tiny_t5(**kw: Any) -> PreTrainedModel:
    """T5 for conditional generation."""
    return tiny("T5ForConditionalGeneration", **kw)


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
    """Random inputs for any of these models, the last rows padded. Shapes: (rows, tokens); a decoder gets labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[rows // 2 :, tokens - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        batch["labels"] = torch.randint(5, VOCABULARY, (rows, 4), generator=generator)
    return batch


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's answer. Shapes: (B, C), (B, T, C) or, for T5, (B, target tokens, V)."""
    answer: Tensor = model(**batch).logits
    return answer


def items_of(task: Task, examples: Sequence[Example]) -> list[Item]:
    """The examples' items in a row, as training and prediction see them."""
    return [item for of_example in task.encode(examples) for item in of_example]


def taught(model: nn.Module, task: Task, batch: Batch) -> nn.Module:
    """The model after 60 plain steps on the task's own loss over one batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (task.losses(model, batch).sum() / batch["n_targets"].sum()).backward()
        optimizer.step()
    return model.eval()
