"""The base model and its tokenizer, loaded and looked into. The only file that imports transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError, first_line
from lorakit.hashing import Fingerprint, fingerprint_of
from lorakit.lora import fuse, read_first_row
from lorakit.lora.kernels import attend, draw, fits
from lorakit.lora.packed import pack
from lorakit.lora.speedups import changes_of, pass_once
from lorakit.model_files import conversion_note
from lorakit.model_files import find as find
from lorakit.pooling import (
    HEAD,
    Layout,
    classify_by_mean,
    embed_texts,
    load_head,
    own_layout,
    own_pooling,
    pooling_of,
    reads_mean,
    save_layout,
)
from lorakit.recipe import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTENTION = "lorakit-sdpa"  # a name in transformers' table of attention functions
MOST_LAYERS = 1_000  # a damaged config asked for a million, which are built one by one
LAYER_COUNT = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?")
LONGEST = 512  # tokens; the default limit where a model would allow more
RATE = re.compile(r"(.*_)?(pdrop|dropout(_prob|_rate|_p)?)")  # how transformers calls a dropout rate
LAYER_RATE = re.compile(r"(.*_)?layerdrop")  # the share of whole blocks that are skipped
# in the config, by Falcon, GPT-J, ...
READ_EACH_TIME = ("attention_dropout", "attn_pdrop", "dropout", "hidden_dropout")
SHORT, LONG = "a", "a b c d e f g h i"  # two texts to be read together
READ = ("input_ids", "attention_mask")
NEAR = 1e-3  # of the largest answer: by so much one may differ from another that should be the same
# Families with byte-level BPE, where a word given alone must be told that a space stands before it.
BYTE_LEVEL = ("roberta", "longformer", "bart", "deberta", "gpt2", "modernbert")


@dataclass(frozen=True)
class Kind:
    """How transformers and peft call a kind of model."""

    auto_class: str
    peft_task_type: str | None
    problem_type: str | None = None  # what the config says to transformers' own loss and pipelines

    @property
    def answers_texts(self) -> bool:
        """Whether a head of transformers answers whole texts."""
        return self.auto_class in ("AutoModelForSequenceClassification", "AutoModelForMultipleChoice")


KINDS: Mapping[str, Kind] = {
    "sequence_classification": Kind("AutoModelForSequenceClassification", "SEQ_CLS"),
    "multi_label_classification": Kind("AutoModelForSequenceClassification", "SEQ_CLS", "multi_label_classification"),
    "regression": Kind("AutoModelForSequenceClassification", "SEQ_CLS", "regression"),
    "reranker": Kind("AutoModelForSequenceClassification", "SEQ_CLS", "regression"),
    # peft has no word for it: its adapters name the class of their model
    "multiple_choice": Kind("AutoModelForMultipleChoice", None),
    "token_classification": Kind("AutoModelForTokenClassification", "TOKEN_CLS"),
    "text2text": Kind("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "embedding": Kind("AutoModel", "FEATURE_EXTRACTION"),  # an encoder without a head, whose logits are a vector
}


@dataclass(frozen=True)
class BaseModel:
    """A base model ready to be adapted, and what is needed to find and recognise it again."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    name: str  # as the user wrote it
    revision: str | None
    fingerprint: Fingerprint
    saved_modules: tuple[str, ...]  # paths of the head, and of layers that the checkpoint lacked
    missing: tuple[str, ...]  # tensors that the checkpoint lacked, and that are random now
    max_length: int  # tokens
    drops: bool  # whether a part of it drops anything at random while it trains
    pooling: Literal["cls", "mean"]  # what a classifier reads: what its family's own head does, or the mean over tokens
    own_pooling: str  # what its checkpoint says of it; "" where that is nothing
    layout: Layout  # and of the vectors of an embedding model
    notes: tuple[str, ...] = ()  # what the user is told of its files

    def copy(self) -> BaseModel:
        """The same with a model of its own, for another adapter: weights of the checkpoint, which stay, share
        their memory."""
        named = self.model.named_parameters()
        shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for name, p in named if name not in self.missing}
        return replace(self, model=deepcopy(self.model, shared))

    def with_layers(self, layers: Mapping[str, nn.Module]) -> BaseModel:
        """With these layers in the model, by name, which are saved with an adapter as its head is."""
        for name, module in layers.items():
            self.model.add_module(name, module)
        return replace(self, saved_modules=(*self.saved_modules, *layers))

    def speed_up(self, device: torch.device) -> tuple[str, ...]:
        """Apply all speed-ups that help here to a model that is cast and adapted; returns them in words.

        Which, fixed rules say and no measurement, so that runs are reproducible (docs/adr/0007). `changes_of` undoes them.
        """
        on_cpu = device.type == "cpu"
        layers = fuse(self.model)
        # of ConvBERT's and RoFormer's choices the head reads the last one
        reads_first = all(getattr(m, "summary_type", "first") == "first" for m in self.model.modules())
        done = {
            f"{layers} fused LoRA layers": layers,
            "last block: first token only": self.kind.answers_texts and reads_first and read_first_row(self.model),
            "fused attention": on_cpu and attend_in_few_passes(self.model),
            "fused dropout and norms": on_cpu and pass_once(self.model),
            "no work on padding": on_cpu and pack(self.model),
        }
        return tuple(words for words, is_done in done.items() if is_done)

    def new_head(self) -> nn.Linear | None:
        """The output layer, where the checkpoint lacked it, it has a bias, and it reads what the task answers: a
        text or a token.

        T5Gemma's gives logits of every token, one of which is then the text's.
        """
        linears = [(path, m) for path, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        path, last = linears[-1]
        if f"{path}.bias" not in self.missing:
            return None
        shapes: list[torch.Size] = []
        hook = last.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        device = last.weight.device
        text = {key: torch.tensor([ids], device=device) for key, ids in self.tokenizer(LONG).items() if key in READ}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            self.model(**text)
        hook.remove()
        reads_tokens = len(shapes[0]) == 3 and shapes[0][1] > 1
        return last if reads_tokens == (self.kind.peft_task_type == "TOKEN_CLS") else None


def load_base(
    name: str,
    kind: str,
    *,
    labels: Sequence[str] = (),
    revision: str | None = None,
    dropout: float | None = None,
    seed: int = 0,
    fingerprint: Fingerprint | None = None,
    pooling: Pooling = "cls",
) -> BaseModel:
    """Load a base model in fp32; layers that the checkpoint lacks are initialised by `seed`.

    `pooling` is what a classifier of whole texts reads; "auto" is the mean where the checkpoint says so.

    `fingerprint` is its own where that is known already, which spares reading the weights once more.

    Raises:
        ModelError: the model is not found (nor the hub reachable), has no weights that can be read, or is of another kind.
    """
    folder, known = find(name, revision), KINDS[kind]
    with _quiet():
        config = _config(folder, name, labels if kind != "text2text" else ())
        if dropout is not None:  # some modules are made only where the rate is above zero
            _set_dropout(_configs(config), dropout)
        if known.problem_type:
            config.problem_type = known.problem_type
        says, layout = "", Layout()
        if known.peft_task_type == "SEQ_CLS" or kind == "embedding":
            says = own_pooling(folder, name)
        if kind == "embedding":
            layout, pooling = own_layout(folder, name), _vector_pooling(name, pooling, says, config)
        elif pooling == "auto":
            # what reads two texts together needs a head that others have for that too
            with_own_head = kind in ("reranker", "multiple_choice")
            pooling = "mean" if says == "mean" and not with_own_head and not config.is_encoder_decoder else "cls"
        if pooling == "mean" and kind != "embedding":
            if known.peft_task_type != "SEQ_CLS" or config.is_encoder_decoder:
                what = "an encoder with a decoder" if config.is_encoder_decoder else f"used by {known.auto_class}"
                raise ModelError(
                    f"model.pooling = 'mean': {name} is {what}; the mean is for encoders that answer whole texts"
                )
            # for transformers and peft an encoder without a head
            known = replace(known, auto_class="AutoModel", peft_task_type="FEATURE_EXTRACTION")
        model, missing = _model(folder, name, known, config, seed)
        if kind == "embedding":
            changes_of(model).add("one vector a text", embed_texts(model, pooling).remove)
            missing = {key for key in missing if not key.startswith("pooler.")}
        elif pooling == "mean":
            classifier = classify_by_mean(model, config.num_labels, seed)
            changes_of(model).add("classifier over the mean of the tokens", classifier.remove)
            new = set() if load_head(model, folder) else {f"{HEAD}.weight", f"{HEAD}.bias"}
            missing = {key for key in missing if not key.startswith("pooler.")} | new
        if kind == "multiple_choice":
            handle = model.register_forward_pre_hook(one_choice_a_row, with_kwargs=True)
            changes_of(model).add("one choice a row", handle.remove)
        tokenizer = _tokenizer(folder, name, config, known)
    if dropout is not None:
        _set_dropout([*model.modules(), *_configs_of(model)], dropout)
    if known.peft_task_type == "SEQ_2_SEQ_LM":
        model.config.decoder_start_token_id = _decoder_start(model, name)
    for own in _configs_of(model):
        if hasattr(own, "pad_token_id"):  # what is padded is what the tokenizer's token says, by whatever the file is
            own.pad_token_id = tokenizer.pad_token_id
    if any(hasattr(config, "expert_capacity") for config in _configs_of(model)):
        raise ModelError(
            f"model.base = {name!r}: its experts take so many tokens of a batch and no more (expert_capacity), so "
            "that the answer to a text would depend on the others; choose a model without"
        )
    with torch.random.fork_rng(devices=[]):
        if known.peft_task_type == "SEQ_2_SEQ_LM":
            _check_decoder(model, tokenizer, name)
        model.depends_on_batch = _depends_on_batch(model, tokenizer, name, known)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        kind=known,
        name=name,
        revision=revision,
        fingerprint=fingerprint or fingerprint_of(folder),
        saved_modules=_saved_modules(model, missing, known),
        missing=tuple(sorted(missing)),
        max_length=min(_max_length(model, tokenizer), layout.max_length or LONGEST),
        drops=has_dropout(model),
        pooling=pooling,
        own_pooling=says,
        layout=layout,
        notes=tuple(note for note in (conversion_note(folder, name),) if note),
    )


def one_choice_a_row(
    model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let a model for multiple choice read rows of one choice each, so that questions may have different numbers of them.

    Before its forward. Shapes: inputs (B, T) to (B, 1, T), of which its logits are (B, 1); (B, C, T) stays.
    """
    return args, {key: x[:, None] if isinstance(x, Tensor) and x.dim() == 2 else x for key, x in inputs.items()}


def _vector_pooling(name: str, pooling: Pooling, says: str, config: Any) -> Literal["cls", "mean"]:
    """How an embedding model makes one vector of a text: as its checkpoint says, the mean where that says nothing."""
    if config.is_encoder_decoder:
        raise ModelError(f"model.base = {name!r}: an encoder with a decoder; embeddings need an encoder")
    if pooling != "auto":
        return pooling
    if says not in ("", "cls", "mean"):
        raise ModelError(
            f"model.base = {name!r}: its checkpoint turns a text into a vector by {says} (1_Pooling), but lorakit "
            "has only 'mean' and 'cls'; set model.pooling to one of them"
        )
    return "cls" if says == "cls" else "mean"


def load_tokenizer(name: str, kind: str, revision: str | None = None) -> tuple[Any, int]:
    """The tokenizer of a base model and its length limit in tokens, without the weights; errors as `load_base`."""
    from transformers import MODEL_MAPPING

    folder = find(name, revision)
    with _quiet():
        config = _config(folder, name, ())
        tokenizer = _tokenizer(folder, name, config, KINDS[kind])
        with torch.device("meta"):
            body = MODEL_MAPPING[type(config)]
            return tokenizer, _max_length((body[0] if isinstance(body, tuple) else body)(config), tokenizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and reports from transformers: what matters of them is said by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _from_pretrained(auto_class: str, folder: Path, name: str, **options: Any) -> Any:
    """What a class of transformers reads from a base's folder. Every reading goes through here: no code in it is
    ever run.

    Raises:
        ModelError: the folder needs code of its own, or its files are damaged or of another kind.
    """
    import transformers

    try:
        return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as err:  # a damaged file fails wherever it is first used, with whatever is raised there
        if "trust_remote_code" in str(err):
            file = "tokenizer_config.json" if auto_class == "AutoTokenizer" else "config.json"
            raise ModelError(
                f"model.base = {name!r}: needs code of its own (auto_map in {file}), which lorakit never runs; "
                "choose a model of a family that transformers has"
            ) from err
        what = {"AutoConfig": "config.json cannot be used", "AutoTokenizer": "its tokenizer cannot be loaded"}
        raise ModelError(
            f"model.base = {name!r}: {what.get(auto_class, f'cannot be loaded by {auto_class}')}: {first_line(err)}"
        ) from err


def _config(folder: Path, name: str, labels: Sequence[str]) -> Any:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = _from_pretrained("AutoConfig", folder, name, **(names if labels else {}))
    config._attn_implementation = None  # the folder's choice may name a kernel, code that the hub would be asked for
    for own in _configs(config):  # every answer is read by its name, and is the logits
        own.return_dict, own.output_hidden_states, own.output_attentions = True, False, False
    for key, value in vars(config).items():
        if not isinstance(value, int) or "layer" not in key:
            continue
        if value > MOST_LAYERS or (LAYER_COUNT.fullmatch(key) and value < 1):
            raise ModelError(
                f"model.base = {name!r}: config.json: {key} = {value}: a model has 1 to {MOST_LAYERS:,} layers"
            )
    return config


def _configs(config: Any) -> list[Any]:
    """A config and those inside of it: of a decoder, of the part that reads text, ..."""
    from transformers import PreTrainedConfig

    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(each for own in inner for each in _configs(own))]


def _configs_of(model: nn.Module) -> list[Any]:
    """Every config that a part of the model looks at, some of which are copies."""
    own = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    return list({id(each): each for config in own for each in _configs(config)}.values())


def _set_dropout(holders: Iterable[Any], rate: float) -> None:
    """Give every dropout among modules and configs this rate; with 0, no block is skipped either."""
    for holder in holders:
        for name in _rates(holder, RATE) + (_rates(holder, LAYER_RATE) if rate == 0 else []):
            if isinstance(holder, nn.Module) or type(getattr(holder, name)) is float:
                setattr(holder, name, rate)
            elif rate == 0:  # some configs take whole numbers alone
                setattr(holder, name, 0)


def _rates(holder: Any, pattern: re.Pattern[str]) -> list[str]:
    """The names under which a module or a config has a rate, as a number of its own."""
    rates = [name for name, value in vars(holder).items() if type(value) in (int, float) and pattern.fullmatch(name)]
    return [*rates, "p"] if isinstance(holder, nn.modules.dropout._DropoutNd) and pattern is RATE else rates


def has_dropout(model: nn.Module) -> bool:
    """Whether a part of the model drops anything at random while it trains."""
    rates = [getattr(m, name) for m in model.modules() for p in (RATE, LAYER_RATE) for name in _rates(m, p)]
    return any(rates) or any(getattr(c, name, None) for c in _configs_of(model) for name in READ_EACH_TIME)


def _model(folder: Path, name: str, kind: Kind, config: Any, seed: int) -> tuple[Any, set[str]]:
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _from_pretrained(kind.auto_class, folder, name, config=config, **options)
    return model, set(info["missing_keys"])


def _tokenizer(folder: Path, name: str, config: Any, kind: Kind) -> Any:
    options: dict[str, Any] = {}
    if kind.peft_task_type == "TOKEN_CLS" and config.model_type in BYTE_LEVEL:
        options["add_prefix_space"] = True
    # These heads read the state at the last end token, and want as many of them in each text: one that a text spells
    # is text.
    ends_count = kind.answers_texts and config.is_encoder_decoder
    if ends_count:
        options["split_special_tokens"] = True
    tokenizer = _from_pretrained("AutoTokenizer", folder, name, **options)
    if ends_count and tokenizer.is_fast:  # a unigram model has the token as a piece too, which it must read as several
        from tokenizers import normalizers

        backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token
        apart = normalizers.Replace(end, f"{end[0]} {end[1:]}")
        backend.normalizer = normalizers.Sequence([apart, *([backend.normalizer] if backend.normalizer else [])])
    if tokenizer.pad_token_id is None:  # decoder-only families have none; what stands there is masked
        if tokenizer.eos_token_id is None:
            raise ModelError(f"model.base = {name!r}: its tokenizer has neither a padding nor an end token; add one")
        tokenizer.pad_token = tokenizer.eos_token
    reads_last = kind.answers_texts and getattr(config, "summary_type", None) == "last"
    tokenizer.padding_side = "left" if reads_last else "right"
    return tokenizer


def _decoder_start(model: Any, name: str) -> int:
    """The token that a decoder begins with, chosen as `generate` does."""
    keys = ("decoder_start_token_id", "bos_token_id")
    for token in (getattr(config, key, None) for key in keys for config in (model.generation_config, model.config)):
        if token is not None:
            return int(token)
    raise ModelError(
        f"model.base = {name!r}: config.json has no decoder_start_token_id, the token that an output begins with"
    )


def _check_decoder(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a model whose decoder says otherwise to a text in training, to what an encoder has read of it, or
    token by token.

    Raises:
        ModelError: it does, or cannot read the text.
    """
    text = {key: torch.tensor([ids]) for key, ids in tokenizer(SHORT).items() if key in READ}
    written = [model.config.decoder_start_token_id, *tokenizer(LONG)["input_ids"][:3]]
    steps, cache = [], None
    try:
        with torch.no_grad():
            expected = model(**text, decoder_input_ids=torch.tensor([written]), use_cache=False).logits[0]
            read = {"encoder_outputs": model.get_encoder()(**text), "attention_mask": text["attention_mask"]}
            at_once = model(**read, decoder_input_ids=torch.tensor([written]), use_cache=False).logits[0]
            for token in written:
                out = model(**read, decoder_input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                steps.append(out.logits[0, -1])
                cache = out.past_key_values
    except Exception as err:
        raise ModelError(
            f"model.base = {name!r}: {type(model).__name__} cannot read {SHORT!r}: {first_line(err)}"
        ) from err
    if max((expected - other).abs().max() for other in (at_once, torch.stack(steps))) > NEAR * expected.abs().max():
        raise ModelError(
            f"model.base = {name!r}: {type(model).__name__} of this transformers gives other logits token by token "
            "than for a whole output, so that it would be trained on one and answer by the other"
        )


def _saved_modules(model: nn.Module, missing: set[str], kind: Kind) -> tuple[str, ...]:
    """The task head, and every module inside the encoder that the checkpoint lacked (BERT's pooler, say)."""
    new = {key.rpartition(".")[0] for key in missing} - {""}  # a buffer of the model itself
    if kind.peft_task_type == "FEATURE_EXTRACTION":
        return (*([HEAD] if reads_mean(model) else []), *sorted(new - {HEAD}))
    if kind.peft_task_type == "SEQ_2_SEQ_LM":  # a generator's output layer is part of the base
        return tuple(sorted(new))
    body = getattr(model, "base_model_prefix", "")
    head = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    return (*head, *sorted(path for path in new if path.startswith(body + ".")))


def _max_length(model: Any, tokenizer: Any) -> int:
    """The longest text in tokens: of the positions that the model has, those that it counts from behind its
    padding token."""
    names = ("max_position_embeddings", "max_encoder_position_embeddings")
    limits = [getattr(config, name, None) for config in _configs(model.config) for name in names]
    limits.append(tokenizer.model_max_length)
    for path, module in model.named_modules():
        start, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if "position" in path.rpartition(".")[2] and start is not None and table is not None:
            limits.append(len(table) - start - 1)
    return int(min(limit for limit in (*limits, LONGEST) if limit is not None and limit > 0))  # below 1: no limit


def depends_on_batch(model: nn.Module) -> bool:
    """Whether a text is answered otherwise beside a longer one, as was tried when the model was loaded."""
    return bool(getattr(model, "depends_on_batch", False))


def _depends_on_batch(model: Any, tokenizer: Any, name: str, kind: Kind) -> bool:
    """Whether a text is answered otherwise beside a longer one, since padding is not masked as a whole.

    Raises:
        ModelError: the model cannot read the two texts, in training or else.
    """
    ids = [tokenizer(text)["input_ids"] for text in (SHORT, LONG)]
    n, longest = map(len, ids)
    before = longest - n if tokenizer.padding_side == "left" else 0
    after = longest - n - before
    pad = tokenizer.pad_token_id
    batch = {
        "input_ids": torch.tensor([[pad] * before + ids[0] + [pad] * after, ids[1]]),
        "attention_mask": torch.tensor([[0] * before + [1] * n + [0] * after, [1] * longest]),
    }
    reader = model.get_encoder() if kind.peft_task_type == "SEQ_2_SEQ_LM" else model
    try:
        with torch.no_grad():
            reader.train()(**batch)
            together = reader.eval()(**batch)[0][0].float()
            single = {"input_ids": torch.tensor(ids[:1]), "attention_mask": torch.ones(1, n, dtype=torch.long)}
            alone = reader(**single)[0][0].float()
    except Exception as err:
        raise ModelError(
            f"model.base = {name!r}: {type(model).__name__} cannot read {SHORT!r} beside {LONG!r}: {first_line(err)}"
        ) from err
    if together.ndim == 2:  # a row a token
        together = together[before : before + n]
    return float((alone - together).abs().max()) > NEAR * float(alone.abs().max())


def attend_in_few_passes(model: Any) -> bool:
    """Let a model's attention on a CPU run in few passes where a backward pass follows; whether it is of a kind that can.

    That pass of torch's own takes many times longer than it need with dropout, and in bf16, for which there is fp32 where
    few passes cannot be had (docs/benchmarks.md).
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        has_backward = any(array.requires_grad for array in (query, key, value))
        if not has_backward and not options.get("dropout"):  # which is drawn alike with a backward pass and without
            torchs: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
            return torchs
        bias: Tensor | None = options.get("position_bias")
        is_known = key.shape[1] == query.shape[1] and options.get("softcap") is None and options.get("cache") is None
        if is_known and not (bias is not None and bias.requires_grad) and fits(query):
            if (causal := options.get("is_causal")) is None:
                causal = getattr(module, "is_causal", True)
            if mask is None and causal and query.shape[2] > 1:
                mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
            if mask is not None and mask.dtype != torch.bool:  # of numbers to be added
                bias, mask = mask if bias is None else bias + mask, None
            drop = draw(options.get("dropout", 0.0))
            scaling = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
            bias = None if bias is None else bias.to(query.dtype)
            answer = attend(query, key, value, bias=bias, mask=mask, scaling=scaling, drop=drop)
            return answer.transpose(1, 2).contiguous(), None
        wide = {
            name: option.float() if isinstance(option, Tensor) and option.is_floating_point() else option
            for name, option in {**options, "attention_mask": mask}.items()
        }
        answer, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), **wide)
        return answer.to(query.dtype), None

    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    changes_of(model).add("fused attention", partial(model.set_attn_implementation, "sdpa"))
    return True


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, layout: Layout, without: Collection[str] = ()
) -> None:
    """Write a plain model and its tokenizer as a folder that transformers loads, some layers left out.

    One that gives vectors, or reads the mean over its tokens, is an encoder to transformers, and whole, with `layout`, to
    sentence-transformers.
    """
    if reads_mean(model):
        without = {*without, HEAD}
    tensors = {key: value for key, value in model.state_dict().items() if key.partition(".")[0] not in without}
    with _quiet():
        model.save_pretrained(folder, state_dict=tensors)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
    if reads_mean(model) or pooling_of(model):
        save_layout(model, folder, layout)


def save_plain(base: BaseModel, folder: Path) -> None:
    """Write all of a model's folder but the weights."""
    model: Any = base.model
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes."""
    import transformers

    import lorakit

    return {"lorakit": lorakit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
