"""A WordPiece tokenizer made on the spot, and tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PIECES = ("peter", "black", "##burn", "##s", "visits", "eu", "in", "brussels", "the", "u", ".", ",", "film", "fine")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@pytest.fixture(scope="session")
def word_pieces() -> PreTrainedTokenizerFast:
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *PIECES))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


@pytest.fixture(scope="session")
def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's own, which is none of this project's files."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "t5_tokenizer"
    if not folder.is_dir():
        pytest.skip("needs the public data sets beside the checkout")
    return AutoTokenizer.from_pretrained(folder)


def bert_config(tokenizer: PreTrainedTokenizerFast, n_labels: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=n_labels,
        initializer_range=0.5,  # so that a random model tells inputs apart
    )


@pytest.fixture
def make_classifier(word_pieces: PreTrainedTokenizerFast) -> Callable[[int], BertForSequenceClassification]:
    def make(n_labels: int) -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(bert_config(word_pieces, n_labels)).eval()

    return make


@pytest.fixture
def make_tagger(word_pieces: PreTrainedTokenizerFast) -> Callable[[int], BertForTokenClassification]:
    def make(n_labels: int) -> BertForTokenClassification:
        torch.manual_seed(0)
        return BertForTokenClassification(bert_config(word_pieces, n_labels)).eval()

    return make


@pytest.fixture(scope="session")
def make_writer(byte_tokenizer: ByT5Tokenizer) -> Callable[[], T5ForConditionalGeneration]:
    def make() -> T5ForConditionalGeneration:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(byte_tokenizer),
            d_model=32,
            d_ff=64,
            d_kv=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=byte_tokenizer.pad_token_id,
            pad_token_id=byte_tokenizer.pad_token_id,
            eos_token_id=byte_tokenizer.eos_token_id,
        )
        return T5ForConditionalGeneration(config)

    return make
