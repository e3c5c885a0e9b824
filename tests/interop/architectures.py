"""The models of the matrix, and the names in them that its variants need. A new one is a line in ARCHITECTURES."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.tiny import VOCABULARY, copier, randomized, tiny

LABELS = 3


class Architecture(NamedTuple):
    """A model to adapt, and the names in it that the variants need."""

    model: str  # the class in transformers, or "" for the model of plain torch below
    task_type: str | None
    targets: tuple[str, str]  # two linear layers that lie in every block
    embedding: str
    also_saved: str  # a module besides the head that is trained in full
    head: tuple[str, ...] = ()
    block: int = 1  # a block to adapt alone
    conv: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The model with random weights, the same at each call."""
        return tiny(self.model, num_labels=LABELS) if self.model else _torch_model()()

    @property
    def auto(self) -> str:
        """The class of transformers that loads a folder of this task."""
        return {
            "SEQ_CLS": "AutoModelForSequenceClassification",
            "TOKEN_CLS": "AutoModelForTokenClassification",
            "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
            "CAUSAL_LM": "AutoModelForCausalLM",
        }[self.task_type or ""]


def both(family: str, *names: Any, also: tuple[str, str], **kw: Any) -> list[Architecture]:
    """The architectures of an encoder with its two heads. `also` has a module to save for each of the two."""
    return [
        Architecture(f"{family}For{task}Classification", kind, *names, saved, head=("classifier",), **kw)
        for task, kind, saved in zip(("Sequence", "Token"), ("SEQ_CLS", "TOKEN_CLS"), also, strict=True)
    ]


NORM = "embeddings.LayerNorm"
ARCHITECTURES: dict[str, Architecture] = {
    f"{name} {architecture.task_type or ''}".strip(): architecture
    for name, architectures in {
        "BERT": both("Bert", ("query", "value"), "word_embeddings", also=("pooler", NORM)),
        "RoBERTa": both("Roberta", ("query", "value"), "word_embeddings", also=(NORM, NORM)),
        "DistilBERT": both("DistilBert", ("q_lin", "v_lin"), "word_embeddings", also=(NORM, NORM)),
        "ELECTRA": both("Electra", ("query", "value"), "word_embeddings", also=("embeddings_project",) * 2),
        "DeBERTa-v2": both(
            "DebertaV2", ("query_proj", "value_proj"), "word_embeddings", also=("pooler", NORM), conv=("conv.conv",)
        ),
        "ModernBERT": both("ModernBert", ("Wqkv", "Wi"), "tok_embeddings", also=("head", "final_norm")),
        "ALBERT": both("Albert", ("query", "ffn"), "word_embeddings", also=("pooler", NORM), block=0),
        "T5": [
            Architecture(
                "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ("q", "v"), "encoder.embed_tokens", "final_layer_norm"
            ),
        ],
        "BART": [
            Architecture(
                "BartForConditionalGeneration",
                *("SEQ_2_SEQ_LM", ("q_proj", "v_proj"), "encoder.embed_tokens", "layernorm_embedding"),
            )
        ],
        "GPT-2": [
            Architecture("GPT2ForSequenceClassification", "SEQ_CLS", ("c_attn", "c_fc"), "wte", "ln_f", ("score",)),
            Architecture("GPT2LMHeadModel", "CAUSAL_LM", ("c_attn", "c_fc"), "wte", "ln_f"),
        ],
        "plain torch": [
            Architecture("", None, ("up", "down"), "tokens", "norm", ("classifier",), conv=("along", "across"))
        ],
    }.items()
    for architecture in architectures
}
# peft's "classifier" takes every module whose name ends so
ARCHITECTURES["DistilBERT SEQ_CLS"] = ARCHITECTURES["DistilBERT SEQ_CLS"]._replace(
    head=("classifier", "pre_classifier")
)


@functools.cache
def _torch_model() -> Callable[[], nn.Module]:
    """What gives a copy at each call: torch draws a convolution's bias anew for each model that is built."""
    return copier(randomized(TorchModel()))


class TorchModel(nn.Module):
    """A tagger of plain torch modules: attention, convolutions and linear layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.body = nn.ModuleDict({"blocks": nn.ModuleList([TorchBlock(width) for _ in range(2)])})
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, LABELS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden = self.tokens(input_ids)
        for block in self.body["blocks"]:
            hidden = block(hidden, attention_mask)
        return SimpleNamespace(logits=self.classifier(self.norm(hidden)))


class TorchBlock(nn.Module):
    """Attention over tokens, a convolution over tokens, one over tokens and channels, and a feed-forward net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.along = nn.Conv1d(width, width, 3, padding=1)
        self.across = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0]
        x = x + self.along(x.mT).mT.tanh()
        x = x + self.across(torch.stack([x, x.flip(-1), x.flip(-2), -x], 1)).sum(1).tanh()
        return x + self.down(self.up(x).tanh())
