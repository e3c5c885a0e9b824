"""A tiny random model of any family that transformers has, in a folder, as if it were a published checkpoint."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.runs import WORDS
from tests.tiny import randomized

PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SIZES: dict[str, Any] = {  # under every name by which a family's config has them
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "model_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 24),
    **dict.fromkeys(("n_inner", "ffn_dim", "dff", "moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "max_encoder_position_embeddings", "n_positions", "n_ctx"), 64),
    "max_decoder_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


def tokenizer(pad: str | None = PAD) -> PreTrainedTokenizerFast:
    """Pieces of words behind spaces, as of T5; a start and an end token around each text."""
    pieces = [(token, 0.0) for token in (PAD, START, END, UNKNOWN)] + [("▁", -5.0)]
    pieces += [(f"▁{word}", -3.0) for word in dict.fromkeys((*WORDS, "good", "bad", "classify"))]
    pieces += [(char, -8.0) for char in string.ascii_letters + string.digits + string.punctuation]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = [(START, 1), (END, 2)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", pair=f"{START} $A {END} $B {END}", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **({"pad_token": pad} if pad else {}),
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )


def config_of(family: str, **changes: Any) -> Any:
    """A family's config with small sizes; `changes` come last, None takes a key back to the family's own."""
    config_class = transformers.CONFIG_MAPPING[family]
    there = vars(config_class())
    own = {key: size for key, size in SIZES.items() if there.get(key) is not None}
    own |= {key: token for key, token in TOKENS.items() if key in there}
    own |= {"decoder_start_token_id": 0} if there.get("is_encoder_decoder") else {}
    own |= {"attention_window": 8} if "attention_window" in there else {}
    own |= {"vocab_size": len(tokenizer())} if "vocab_size" in there else {}
    return config_class(**own | changes)


def save_family(folder: Path, family: str, auto: str = "AutoModel", pad: str | None = PAD, **changes: Any) -> Path:
    """A folder with a random model of a family, by its config's `model_type`, and the tokenizer."""
    model_class = getattr(transformers, auto)._model_mapping[type(config := config_of(family, **changes))]
    randomized((model_class[0] if isinstance(model_class, tuple) else model_class)(config)).save_pretrained(folder)
    tokenizer(pad).save_pretrained(folder)
    return folder
