"""One vector of a text's token states: for embeddings, and for classifiers over the mean of a text's tokens.

Such a model is an encoder of AutoModel, so that its adapter is one that peft loads over AutoModel; a classifier has a linear
layer `classifier` beside the encoder's own parts, for sentence encoders, whose first token was trained to say nothing. A whole
one is written in the layout of sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.errors import ModelError
from lorakit.hashing import open_regular, read_object

HEAD = "classifier"
POOLING, DENSE = "1_Pooling", "2_Dense"  # folders
LEGACY = "pooling_mode_"  # begins the keys of older files, each true or false
MOST_BYTES = 2**20  # of the file that says how a base pools


QUERIES, DOCUMENTS = ("query",), ("document", "passage", "corpus")  # names of a base's prompts


class Answer(NamedTuple):
    """What such a model gives, under the name that transformers' classifiers give it."""

    logits: Tensor  # (B, C), or the vectors (B, d)


class Layout(NamedTuple):
    """What a folder of sentence-transformers says of how it makes a vector of a text, besides its pooling."""

    normalize: bool = False  # to length 1
    prompts: Mapping[str, str] = MappingProxyType({})  # that texts begin with, by their role
    max_length: int | None = None  # tokens


def own_pooling(folder: Path, name: str) -> str:
    """How a base's own checkpoint makes one vector of a text ("mean", "cls", "max", ...); "" where it does not say.

    Raises:
        ModelError: it says so in a file that is damaged.
    """
    path = folder / POOLING / "config.json"
    if not path.is_file():
        return ""
    try:
        config = read_object(path, MOST_BYTES)
    except (OSError, ValueError) as err:
        raise ModelError(f"model.base = {name!r}: {path}: {err}; set model.pooling = 'mean' or 'cls'") from err
    modes = config.get("pooling_mode")
    if modes is None:
        keys = [key.removeprefix(LEGACY) for key, on in config.items() if key.startswith(LEGACY) and on]
        modes = [key.removesuffix("_token").removesuffix("_tokens") for key in keys]
    return modes if isinstance(modes, str) else " and ".join(map(str, modes))


def own_layout(folder: Path, name: str) -> Layout:
    """What a base's own checkpoint says of its vectors; a plain encoder says nothing.

    Raises:
        ModelError: a file is damaged, or its vectors are made by more than pooling and a normalisation (a Dense layer).
    """
    if not (folder / "modules.json").is_file():
        return Layout()
    read, file = dict[str, Any](), "modules.json"
    try:
        with open_regular(folder / file, MOST_BYTES) as stream:
            types = [str(module["type"]).rpartition(".")[2] for module in json.loads(stream.read())]
        for file in ("config_sentence_transformers.json", "sentence_bert_config.json"):
            if (folder / file).is_file():
                read |= read_object(folder / file, MOST_BYTES)
        prompts = {str(key): str(text) for key, text in (read.get("prompts") or {}).items()}
        longest = read.get("max_seq_length")
        longest = None if longest is None else int(longest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ModelError(f"model.base = {name!r}: {folder / file}: damaged: {err!r}") from err
    if others := [kind for kind in types if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ModelError(
            f"model.base = {name!r}: makes vectors by a module {others[0]} (modules.json), which lorakit lacks; use a base "
            "with Transformer, Pooling and Normalize alone"
        )
    return Layout("Normalize" in types, prompts, longest)


def embed_texts(body: nn.Module, pooling: Literal["cls", "mean"]) -> RemovableHandle:
    """Let an encoder answer with one vector a text: the mean of its token states, or the first of them."""
    body.pooler = None  # type: ignore[assignment]  # what it would make of the first token nobody reads
    return body.register_forward_hook(partial(_embed, pooling), with_kwargs=True)


def _embed(
    pooling: Literal["cls", "mean"], body: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], states: Any
) -> Answer:
    """After the encoder's forward, in place of its token states."""
    hidden: Tensor = states.last_hidden_state
    return Answer(hidden[:, 0] if pooling == "cls" else mean_of_tokens(hidden, inputs.get("attention_mask")))


def mean_of_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each text's token states, padding left out, computed in fp32.

    Shapes: hidden (B, T, d), mask (B, T) of 1 where a token is, to (B, d).
    """
    if mask is None:
        return hidden.float().mean(1).to(hidden.dtype)
    mask = mask[..., None].float()
    return ((hidden.float() * mask).sum(1) / mask.sum(1)).to(hidden.dtype)


def classify_by_mean(body: nn.Module, outputs: int, seed: int) -> RemovableHandle:
    """Let an encoder answer whole texts: by a linear layer, initialised by `seed`, over the mean of its token states."""
    config: Any = body.config
    head = nn.Linear(config.hidden_size, outputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(head.bias)
    body.pooler = None  # type: ignore[assignment]  # what it would make of the first token nobody reads
    body.add_module(HEAD, head)
    return body.register_forward_hook(_classify, with_kwargs=True)


def _classify(body: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], states: Any) -> Answer:
    """After the encoder's forward, in place of its token states."""
    classifier: nn.Module = body.get_submodule(HEAD)
    return Answer(classifier(mean_of_tokens(states.last_hidden_state, inputs.get("attention_mask"))))


def reads_mean(model: nn.Module) -> bool:
    """Whether a model is such a one."""
    return _classify in model._forward_hooks.values()


def pooling_of(model: nn.Module) -> Literal["cls", "mean"] | None:
    """How a model makes the vectors that it answers with; None where it answers with something else."""
    hooks = (hook for hook in model._forward_hooks.values() if isinstance(hook, partial) and hook.func is _embed)
    return next((hook.args[0] for hook in hooks), None)


def save_layout(model: nn.Module, folder: Path, layout: Layout) -> None:
    """Write, beside an encoder or an adapter, what makes it a model of sentence-transformers.

    Its `encode` gives the model's vectors or, of a classifier over the mean, the logits.
    """
    pooling = pooling_of(model)
    head: dict[str, Tensor] = {} if pooling else dict(model.get_submodule(HEAD).state_dict())
    config: Any = model.config
    modules = [("", "Transformer"), (POOLING, "Pooling")]
    modules += [(DENSE, "Dense")] if head else []
    modules += [(f"{len(modules)}_Normalize", "Normalize")] if layout.normalize else []
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{module}"}
            for i, (path, module) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": layout.max_length, "do_lower_case": False},
        f"{POOLING}/config.json": {
            "word_embedding_dimension": config.hidden_size,
            **{
                f"{LEGACY}{mode}": mode.partition("_")[0] == (pooling or "mean")
                for mode in ("cls_token", "mean_tokens", "max_tokens")
            },
        },
    }
    if any(layout.prompts.values()):
        files["config_sentence_transformers.json"] = {
            "prompts": dict(layout.prompts),
            "default_prompt_name": "document",
        }
    if head:
        outputs, d = head["weight"].shape
        files[f"{DENSE}/config.json"] = {
            "in_features": d,
            "out_features": outputs,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path, _ in modules[2:]:
        (folder / path).mkdir(exist_ok=True)
    if head:
        tensors = {f"linear.{name}": tensor.detach().cpu().contiguous() for name, tensor in head.items()}
        save_file(tensors, folder / DENSE / "model.safetensors", metadata={"format": "pt"})


def load_head(model: nn.Module, folder: Path) -> bool:
    """Give the model the classifier that `save_layout` wrote into its folder; whether there is one of this size."""
    path = folder / DENSE / "model.safetensors"
    if not path.is_file():
        return False
    try:
        tensors = {key.removeprefix("linear."): tensor for key, tensor in load_file(path).items()}
        model.get_submodule(HEAD).load_state_dict(tensors)
    except (OSError, SafetensorError) as err:
        raise ModelError(f"{path}: damaged: {err}") from err
    except RuntimeError:  # of another size, or with other parts: a projection of embeddings, say
        return False
    return True
