"""A tiny random model of any family that transformers has, in a folder, as if it were a published checkpoint."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lorakit.app.export.onnx import export_onnx
from lorakit.data.example import Example
from lorakit.errors import LorakitError
from lorakit.inference.answer import as_input
from lorakit.inference.predictor import load
from lorakit.models import load_base
from lorakit.task_info import TASKS
from lorakit.tasks.base import inputs_of
from tests.interop.matrix import Outcome
from tests.lora.oracle import peft_load
from tests.runs import WORDS, changed, fit, sections
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
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


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
    own |= {"decoder_start_token_id": 2} if there.get("is_encoder_decoder") else {}
    own |= {"attention_window": 8} if "attention_window" in there else {}
    own |= {"vocab_size": len(tokenizer())} if "vocab_size" in there else {}
    return config_class(**own | changes)


def save_family(folder: Path, family: str, auto: str = "AutoModel", pad: str | None = PAD, **changes: Any) -> Path:
    """A folder with a random model of a family, by its config's `model_type`, and the tokenizer."""
    model_class = getattr(transformers, auto)._model_mapping[type(config := config_of(family, **changes))]
    randomized((model_class[0] if isinstance(model_class, tuple) else model_class)(config)).save_pretrained(folder)
    tokenizer(pad).save_pretrained(folder)
    return folder


# The matrix: every family that transformers has for a task, with every check


class Kind(NamedTuple):
    """A task, the classes of transformers for its models and for the checkpoints that they start from."""

    task: str
    auto: str
    checkpoint: str


KINDS = {
    "classification": Kind("sequence_classification", "AutoModelForSequenceClassification", "AutoModel"),
    "tagging": Kind("token_classification", "AutoModelForTokenClassification", "AutoModel"),
    "choice": Kind("multiple_choice", "AutoModelForMultipleChoice", "AutoModel"),
    "text2text": Kind("text2text_classification", "AutoModelForSeq2SeqLM", "AutoModelForSeq2SeqLM"),
}
LATENT = dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8) | {"n_group": 1, "topk_group": 1}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
T5_PART = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")} | TOKENS
T5_PART |= {"num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": len(tokenizer())}
MAMBA = {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 32, "attention_head_dim": 16}
OWN: dict[str, dict[str, Any]] = {  # what a family's config needs besides the small sizes
    **{family: LATENT | {"num_experts_per_tok": 2} for family in ("axk1", "axk2", "deepseek_v2", "deepseek_v3")},
    "cohere_compass_text": {"layer_types": [*ROPE], "rope_parameters": ROPE},
    "fsmt": dict.fromkeys(("src_vocab_size", "tgt_vocab_size"), len(tokenizer())) | {"langs": ["en", "de"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    **{family: {"head_dim": 8} for family in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lilt": {"hidden_size": 24},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "mistral4": LATENT | {"head_dim": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 2)
    | {"d_latents": 16, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 1},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text"), LINEAR),
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4, "hash_seed": 0}
    | {"is_decoder": False, "feed_forward_size": 24, "attention_head_size": 8}
    | dict.fromkeys(("local_attn_chunk_length", "lsh_attn_chunk_length"), 4),
    "t5gemma": {"encoder": T5_PART, "decoder": T5_PART, "vocab_size": len(tokenizer())},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": MAMBA | {"mamba_dt_rank": 4, "layers_block_type": ["hybrid", "hybrid"]},
    "zamba2": MAMBA | {"n_mamba_heads": 2, "mamba_headdim": 16, "mamba_d_state": 8, "adapter_rank": 2, "chunk_size": 4},
}
NO_TEXT = "the family does not read plain text: it needs sound, images or positions on a page"
LEFT_OUT = {
    **dict.fromkeys(("audioflamingo3", "bros", "gemma3", "glmasr", "granite_speech", "qwen3_5"), NO_TEXT),
    **dict.fromkeys(("granite_speech_plus", "layoutlmv2", "layoutlmv3", "modernvbert", "qwen3_asr"), NO_TEXT),
    **dict.fromkeys(("moss_transcribe_diarize", "musicflamingo", "nemo_speechlm", "omniasr", "qwen2_audio"), NO_TEXT),
    **dict.fromkeys(("seamless_m4t", "seamless_m4t_v2", "t5gemma2", "ultravbert", "vibevoice_asr"), NO_TEXT),
    **dict.fromkeys(("voxtral", "voxtral_realtime"), NO_TEXT),
    "encoder-decoder": "it combines two models of any families",
}
# of the others too, for all that is known, but each takes half a minute
EXPORTED = ("bert", "roberta", "distilbert", "modernbert", "xlm-roberta", "mpnet")
TOLERANCE = 1e-5  # of the largest number
TEXTS = ("the film was stale", "the last scene and the cast was rather lovely and the plot was fresh", "clumsy")


class Known(NamedTuple):
    """What ends otherwise for a cause of its own: in which families and check, by which error, and why."""

    families: str
    check: str
    error: str
    why: str


KNOWN = (
    Known("ibert", "trains", "ConfigError: .*no layer is left", "its layers are QuantLinear, none that LoRA adapts"),
    Known(
        "canine|funnel|reformer",
        "trains",
        "ModelError: .* cannot read 'a'",
        "transformers cannot read a text of every length with it: refused when it is loaded",
    ),
    Known(
        "longformer",
        "trains",
        "ModelError: .*three separator tokens",
        "transformers looks for three separator tokens in each pair, which few tokenizers write: refused when it is loaded",
    ),
    Known(
        "switch_transformers|nllb-moe",
        "trains",
        "ModelError: .*expert_capacity",
        "its experts take so many tokens of a batch, so that answers depend on the other texts: refused",
    ),
    Known(
        "prophetnet|fsmt",
        "trains",
        "ModelError: .*token by token",
        "in this transformers its decoder gives other logits token by token than at once: refused",
    ),
    Known(
        "axk[12]|beam|deepseek_v[23]|hunyuan_v1_moe|qwen2_moe|qwen3_next",
        "in peft",
        "differs by|RuntimeWarning: .*gate_up_proj",  # from transformers 5.24 on it warns of what it leaves out
        "peft takes targets named as the experts of transformers 4 for tensors of all experts, and so leaves out those of "
        "the shared expert",
    ),
)


def cells() -> list[tuple[str, str]]:
    """(family, kind) of everything that transformers has a class for."""
    mappings = {kind: getattr(transformers, KINDS[kind].auto)._model_mapping for kind in KINDS}
    return sorted({(config.model_type, kind) for kind, mapping in mappings.items() for config in mapping})


class Trained:
    """A run of a tiny model of one family, and its folder."""

    def __init__(self, family: str, kind: str, data: Path, folder: Path) -> None:
        self.family, self.kind, self.base, self.run = family, KINDS[kind], folder / "base", folder / "run"
        save_family(self.base, family, self.kind.checkpoint, **OWN.get(family, {}))
        raw = sections(self.base, data, self.kind.task)
        raw["lora"] = {"r": 2}
        raw["train"] = {"epochs": 1, "batch_size": 4, "lr": 1e-2}
        fit(changed(raw), self.run)
        self.predictor = load(self.run)

    @property
    def plain(self) -> Any:
        """The base as it is loaded for a run."""
        known = TASKS[self.kind.task]
        return load_base(str(self.base), known.model_kind, labels=known.outputs(self.predictor.side.labels)).model

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """What a model says of the first text, and of some tokens where it writes."""
        task = self.predictor.task
        batch = inputs_of(task.collate(task.encode([self.example(TEXTS[0])])[0]))
        if task.info.model_kind == "text2text":
            batch["decoder_input_ids"] = torch.tensor([[2, 5, 9]])
        if task.info.wants == "choices":  # as transformers takes them; ours reads any rows of them
            batch = {key: ids[None] for key, ids in batch.items()}
        answer: Tensor = model.eval()(**batch).logits
        return answer.float()

    def example(self, text: str) -> Example:
        """A text as the task takes it, with two choices where it wants some."""
        task = self.predictor.task
        return as_input(task, Example(text, choices=TEXTS[1:] if task.info.wants == "choices" else ()))


def trains(made: Trained) -> float:
    """a run ends normally, and its adapter changes the answers, which are all finite."""
    plain, ours = made.logits(made.plain), made.logits(made.predictor.model)
    assert ours.isfinite().all(), "an answer is not finite"
    assert not torch.equal(plain, ours), "the adapter changes no answer"
    return 0.0


def alone(made: Trained) -> float:
    """a text gets the same answer alone as in a batch with longer and shorter ones."""
    examples = [made.example(text) for text in TEXTS]
    together = made.predictor.answers(examples)
    return max(
        off(numbers(made.predictor.answers([e])[0]), numbers(t)) for e, t in zip(examples, together, strict=True)
    )


def in_peft(made: Trained) -> float:
    """peft loads the adapter on the same base, and gives the same answers."""
    return off(made.logits(peft_load(made.plain, made.run / "adapter")), made.logits(made.predictor.model))


def merged(made: Trained) -> float:
    """transformers loads the merged model, and gives the same answers."""
    wanted, folder = made.logits(made.predictor.model), made.run.with_name("merged")
    load(made.run).merge_to(folder)
    return off(made.logits(getattr(transformers, made.kind.auto).from_pretrained(folder)), wanted)


def exported(made: Trained) -> float:
    """its ONNX export gives the same answers (tried for a few families only, because it takes long)."""
    if made.family in EXPORTED and made.kind is KINDS["classification"]:
        export_onnx(made.run, made.run.with_name("onnx"))  # raises where they differ
    return 0.0


def numbers(answer: Any) -> Tensor:
    """The probabilities or values in a task's answer."""
    return torch.tensor(getattr(answer, "probabilities", None) or getattr(answer, "scores", None) or answer)


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference as a part of the largest number, of 0.1 where all are smaller; an error where that is too much.

    Numbers near 0 are what is left of larger ones, by whose rounding they differ.
    """
    worst = float((one - other).abs().max() / other.abs().max().clamp_min(0.1))
    assert worst <= TOLERANCE, f"differs by {worst:.1e} of the largest number"
    return worst


FAMILY_CHECKS: Mapping[str, Callable[[Trained], float]] = {
    "trains": trains,
    "alone": alone,
    "in peft": in_peft,
    "merged": merged,
    "exported": exported,
}


def run_family(family: str, kind: str, data: Path, folder: Path) -> dict[str, Outcome]:
    """Every check of one cell, by name. `data` has the files of tests.runs, `folder` is to be empty."""
    if family in LEFT_OUT:
        return dict.fromkeys(FAMILY_CHECKS, Outcome("n/a", LEFT_OUT[family]))
    try:
        made = Trained(family, kind, data, folder)
    except Exception as err:
        return dict.fromkeys(FAMILY_CHECKS, explained(family, "trains", err))
    found = {}
    for name, check in FAMILY_CHECKS.items():
        try:
            found[name] = Outcome("pass", difference=check(made))
        except Exception as err:
            found[name] = explained(family, name, err)
    return found


def explained(family: str, check: str, err: Exception) -> Outcome:
    """A refusal of ours or a difference that has a reason in KNOWN; else a failure."""
    message = " ".join(f"{type(err).__name__}: {err}".split())
    for known in KNOWN:
        if re.fullmatch(known.families, family) and known.check == check and re.search(known.error, message):
            return Outcome("refused" if isinstance(err, LorakitError) else "differs", known.why)
    return Outcome("FAIL", message[:300])
