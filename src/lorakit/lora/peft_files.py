"""One adapter on disk, as peft 0.21 writes it: adapter_config.json and adapter_model.safetensors.

Keys come from walking the modules that hold the adapter, never from searching names in strings. Reading checks the
whole header against the model before a tensor is allocated, and refuses rather than loads half. No pickle, ever.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.errors import AdapterError, ConfigError
from lorakit.hashing import open_regular, unique_keys
from lorakit.lora.config import LoraConfig
from lorakit.lora.inject import biased_modules, check_known, insert_adapter
from lorakit.lora.layers import AdapterHost, Layer, hosts
from lorakit.lora.peft_config import CONFIG_FILE, BaseInfo, peft_config, read_adapter_config
from lorakit.lora.special_layers import BiasHost, RowsHost
from lorakit.lora.targets import (
    OUT_PROJ,
    embeddings_in_place_of,
    has_suffix,
    layer_at,
    plain,
    saved_modules,
    select_targets,
    tied_to,
    trainable_row_modules,
    walk,
    without_idle_entries,
)
from lorakit.lora.weight_layouts import matrix_shape

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"
NAMED = re.compile(  # an update's key with the adapter's name in it
    r"(\.lora_(?:A|B|embedding_A|embedding_B))\.default(\.weight|\.bias|)$|(\.lora_magnitude_vector)\.default(?:\.weight)?$"
)
HEADS = {  # what peft saves for a task, beside modules_to_save
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
}
JUNK = re.compile(r".*\.(modules_to_save|original_module)\.(.*\.)?bias")  # doubles that peft writes with bias = "all"


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter under peft's keys, detached, on the CPU; LoRA factors in fp32."""
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()  # tied modules share their part, which is written once
    for path, host in hosts(model, name):
        part = host.adapters[name]
        if id(part) not in written:
            written.add(id(part))
            for key, tensor in _disk_tensors(host, name).items():
                tensors[f"{PREFIX}{_disk_path(path)}.{key}"] = tensor
    return {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}


def _disk_path(path: str) -> str:
    """The path in peft's names, which differ inside of an attention alone."""
    outer = path.removesuffix(OUT_PROJ)
    return path if outer == path else f"{outer}.base_layer.out_proj"


def _disk_tensors(host: AdapterHost, name: str) -> dict[str, Tensor]:
    """What an adapter keeps at one place, under peft's keys and in its shapes."""
    if isinstance(host, Layer):
        parts = host.lora(name).parts()
        keys = _disk_keys(host.base, len(parts["A"]))
        return {keys[role].name: tensor.view(keys[role].shape) for role, tensor in parts.items()}
    if isinstance(host, BiasHost):
        return {"bias": host.bias(name)}
    if isinstance(host, RowsHost):
        return {ROWS: host.trained(name).rows}
    return dict(host.adapters[name].state_dict())


class _Key(NamedTuple):
    name: str
    shape: tuple[int, ...]


def _disk_keys(base: nn.Module, r: int) -> dict[str, _Key]:
    """The role of a tensor in an update (see LoRA.parts) -> peft's key under the layer's path, and the shape there."""
    d_out, d_in = matrix_shape(base)
    A, B = _Key("lora_A.weight", (r, d_in)), _Key("lora_B.weight", (d_out, r))
    magnitude: tuple[int, ...] = (d_out,)
    if isinstance(base, nn.Embedding):
        A, B = _Key("lora_embedding_A", (r, d_in)), _Key("lora_embedding_B", (d_out, r))
    elif isinstance(base, (nn.Conv1d, nn.Conv2d)):
        ones = (1,) * len(base.kernel_size)
        A, B = _Key(A.name, (r, *base.weight.shape[1:])), _Key(B.name, (d_out, r, *ones))
        magnitude = (1, d_out, *ones)
    return {
        "A": A,
        "B": B,
        "magnitude": _Key("lora_magnitude_vector", magnitude),
        "lora_bias": _Key("lora_B.bias", (d_out,)),
        "base_bias": _Key("base_layer.bias", (d_out,)),
    }


def save_adapter(
    model: nn.Module, folder: Path | str, config: LoraConfig, base: BaseInfo = BaseInfo(), name: str = "default"
) -> None:
    """Write one adapter; peft loads the folder as it is, and the same adapter gives the same bytes.

    An update with a start (pissa, olora) is written as plain LoRA of twice the rank, valid on the unchanged base.

    >>> config = LoraConfig(r=4, target_modules=("query", "value"))
    >>> targets = add_adapter(model, config)
    >>> save_adapter(model, folder, config)
    >>> sorted(path.name for path in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_known(model, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = peft_config(model, config, base, name)
    save_file(adapter_tensors(model, name), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True), encoding="utf-8")
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)  # safetensors lets its owner alone read it


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> LoraConfig:
    """Add a saved adapter to the model and make it the active one; the model is untouched when anything is wrong.

    Copies of the base's own weights, which peft writes beside an embedding that it adapts, are compared with the model's. A
    module of the base that the file has other weights for is one that the adapter saves.

    >>> config = LoraConfig(r=4, target_modules=("query", "value"))
    >>> targets = add_adapter(other_model, config)
    >>> save_adapter(other_model, folder, config)
    >>> load_adapter(model, folder) == config
    True

    Raises:
        AdapterError: settings, keys, shapes or dtypes do not fit this model, or a value is not finite.
    """
    folder = Path(folder)
    config, base = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    header = _header(path)
    tensors: dict[str, Tensor] = {}
    try:
        config = _as_peft_means(model, config, base, header.keys())
        shapes = _expected_shapes(model, config)
        main, _ = embeddings_in_place_of(model)
        idle = {key for key in header if main and key.startswith(f"{PREFIX}{main}.lora_")}
        of_base = {  # the base's own tensors under the keys that stand for them
            key: own
            for key in header.keys() - shapes.keys()
            if (own := _in_base(model, key)) is not None and tuple(own.shape) == header[key].shape
        }
        if idle or of_base:
            _check_header(path, {key: header[key] for key in header.keys() - idle - of_base.keys()}, shapes)
            tensors = _read_tensors(path)
            factors = [tensors[key] for key in idle if "embedding" in key]
            if factors and all(factor.any() for factor in factors):
                raise AdapterError(f"{path}: {min(idle)}: the model never calls {main}, so peft ignores it")
            replaced = set()
            for key, tensor in of_base.items():
                stored, own = tensors[key], tensor.detach().cpu()
                # a copy of it changes nothing, one of them perhaps rounded to the dtype of the other
                if not (torch.equal(own.to(stored.dtype), stored) or torch.equal(stored.to(own.dtype), own)):
                    replaced.add(_path(key))
            config = _with_replaced_modules(model, config, replaced, of_base.keys())
            shapes = _expected_shapes(model, config)
            header = {key: header[key] for key in header.keys() - idle if key not in of_base or _path(key) in replaced}
    except ConfigError as err:
        raise AdapterError(f"{folder} does not fit this model: {err}") from err
    _check_header(path, header, shapes)
    tensors = tensors or _read_tensors(path)
    insert_adapter(model, config, name)
    _assign(model, name, tensors)
    return config


def reload_adapter(model: nn.Module, folder: Path, name: str = "default", without: Sequence[str] = ()) -> None:
    """Give an adapter of the model the values that a folder of the same settings holds, which is quicker than to load it.

    Modules in `without` stay as they are, whatever the folder has of them.

    Raises:
        AdapterError: the folder's keys, shapes or dtypes are not this adapter's, or a value is not finite; the adapter
            then is as before. Whether the settings are the same the caller must know.
    """
    path = folder / WEIGHTS_FILE
    left = tuple(f"{PREFIX}{module}." for module in without)
    shapes = {
        key: tuple(tensor.shape) for key, tensor in adapter_tensors(model, name).items() if not key.startswith(left)
    }
    _check_header(path, {key: info for key, info in _header(path).items() if not key.startswith(left)}, shapes)
    _assign(model, name, {key: tensor for key, tensor in _read_tensors(path).items() if key in shapes})


def _header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file under peft's own keys, without the doubles that peft writes."""
    raw = read_header(path)
    header = {_key(key): info for key, info in raw.items() if not JUNK.fullmatch(key)}
    if len(header) < sum(not JUNK.fullmatch(key) for key in raw):
        raise AdapterError(f"{path}: holds a tensor twice, with and without the adapter's name in its key")
    return header


def _key(key: str) -> str:
    """peft's key of a tensor; some files have the name of the adapter in it, which peft reads where it is "default"."""
    return NAMED.sub(r"\1\2\3", key)


def _as_peft_means(model: nn.Module, config: LoraConfig, base: BaseInfo, keys: Set[str]) -> LoraConfig:
    """The settings in our stricter reading of names. Nothing is lost: the file's keys must match the result exactly.

    peft lists every head name that it knows for a task, or adds them when it reads, present or not, and lets pass any other;
    its `classifier` takes DistilBERT's `pre_classifier` along.
    """
    paths = [path for path, _ in walk(model)]
    adapted = {path for path in paths for A in ("lora_A.weight", "lora_embedding_A") if f"{PREFIX}{path}.{A}" in keys}
    heads = HEADS.get(base.task_type or "", ())
    saved = [name for name in config.modules_to_save if any(has_suffix(path, name) for path in paths)]
    saved += [
        path
        for path in paths
        if path.endswith((*config.modules_to_save, *heads))
        and not any(has_suffix(path, name) for name in saved)
        and any(key.startswith(f"{PREFIX}{path}.") and ".lora_" not in key for key in keys)
    ]
    return without_idle_entries(model, dataclasses.replace(config, modules_to_save=tuple(saved)), adapted)


def _path(key: str) -> str:
    return key.removeprefix(PREFIX).rpartition(".")[0]


def _in_base(model: nn.Module, key: str) -> Tensor | None:
    """The parameter of the base that a key stands for, if it is one that names the base's own."""
    parameter = key.rpartition(".")[2]
    try:
        module = plain(model.get_submodule(_path(key).removesuffix(".base_layer")))
    except AttributeError:
        return None
    tensor: Tensor | None = module._parameters.get(parameter) if key.startswith(PREFIX) else None
    return tensor


def _with_replaced_modules(model: nn.Module, config: LoraConfig, paths: Set[str], keys: Set[str]) -> LoraConfig:
    """The settings with the modules saved whose weights in the base peft would replace by those of the file.

    Raises:
        ConfigError: one is adapted as well, its tensors are not all among `keys`, or what is tied to it stays as it was.
    """
    saved = {*saved_modules(model, config.modules_to_save), *paths}
    for path in sorted(paths):
        adapted = path.endswith(".base_layer") or not path
        expected = (
            set() if adapted else {f"{PREFIX}{path}.{key}" for key in plain(model.get_submodule(path)).state_dict()}
        )
        tied = tied_to(model, path) if f"{PREFIX}{path}.weight" in expected else []
        if adapted or expected - keys or not saved.issuperset(tied):
            first = min(key for key in keys if _path(key) == path)
            raise ConfigError(f"{first} differs from the model's own: the adapter was trained on another base")
    return dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *sorted(paths)))


def _expected_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shape that each key must have for this model and these settings."""
    shapes: dict[str, tuple[int, ...]] = {}
    targets = select_targets(model, config)
    for target in targets:
        layer = layer_at(model, target.path)
        keys = _disk_keys(layer, target.r)
        roles = ["A", "B"] + ["magnitude"] * config.use_dora + ["lora_bias"] * config.lora_bias
        roles += ["base_bias"] * (config.bias != "none" and getattr(layer, "bias", None) is not None)
        for role in roles:
            shapes[f"{PREFIX}{_disk_path(target.path)}.{keys[role].name}"] = keys[role].shape
    saved = saved_modules(model, config.modules_to_save)
    biases = biased_modules(model, config, {target.path for target in targets}, saved)
    for path in saved:
        for key, tensor in plain(model.get_submodule(path)).state_dict().items():
            shapes[f"{PREFIX}{path}.{key}"] = tuple(tensor.shape)
    for path in biases:
        shapes[f"{PREFIX}{path}.bias"] = tuple(plain(model.get_submodule(path)).bias.shape)
    for path, indices in trainable_row_modules(model, config).items():
        width = plain(model.get_submodule(path)).embedding_dim
        shapes[f"{PREFIX}{path}.{ROWS}"] = (len(indices), width)
    return shapes


def _check_header(path: Path, header: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for words, keys in (("lacks", shapes.keys() - header.keys()), ("has unexpected", header.keys() - shapes.keys())):
        if keys:
            raise AdapterError(
                f"{path}: {words} {len(keys)} of {len(shapes)} tensors for this model, first {min(keys)!r}"
            )
    for key, want in shapes.items():
        if (have := header[key].shape) != want:
            raise AdapterError(f"{path}: {key} has shape {have}; this model and these settings need {want}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = {_key(key): tensor for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as err:
        raise AdapterError(f"{path}: damaged: {err}") from err
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():  # as it is read, also if it is stored in more digits
            raise AdapterError(f"{path}: {key} holds NaN or infinite values")
    return tensors


@torch.no_grad()
def _assign(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    for path, host in hosts(model, name):
        for key, part in _disk_tensors(host, name).items():  # views of the parameters themselves
            if (stored := tensors.get(f"{PREFIX}{_disk_path(path)}.{key}")) is not None:  # a tied part is stored once
                part.copy_(stored)


# What a safetensors file says it holds, checked before anything is allocated


MAX_HEADER = 1_000_000  # bytes; an adapter over every layer of BERT-large has 40,000
MAX_TENSORS = 10_000
MAX_VALUES = 10 * MAX_TENSORS
DTYPES = ("F64", "F32", "F16", "BF16")


class TensorInfo(NamedTuple):
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors that a file declares.

    safetensors itself checks that they fill the file without holes and overlaps. Refused here is what it lets pass: keys that
    stand twice (the last wins), headers of 100 MB, millions of empty tensors, dtypes that are not weights.

    Raises:
        AdapterError: the file is missing, is cut off or padded, or its header is not one of weights.
    """
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
                raise ValueError(f"a header of {length:,} bytes")
            raw = file.read(length)
        # counted before they are parsed, which takes a hundred times as long
        if (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
            raise ValueError(f"{count:,} tensors; an adapter has {MAX_TENSORS:,} at most")
        if raw.count(b",") > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values in the header")
        json.loads(raw, object_pairs_hook=unique_keys)
        with safe_open(path, "pt") as tensors:
            slices = ((key, tensors.get_slice(key)) for key in tensors.keys())  # noqa: SIM118 (it is not a mapping)
            header = {key: TensorInfo(entry.get_dtype(), tuple(entry.get_shape())) for key, entry in slices}
        for key, info in header.items():
            if info.dtype not in DTYPES:
                raise ValueError(f"{key} has dtype {info.dtype}; only {', '.join(DTYPES)} are weights")
    except FileNotFoundError as err:
        pickled = path.with_suffix(".bin")
        if pickled.exists():
            raise AdapterError(
                f"{pickled}: pickled weights can run code and are never read; save them as {path.name} where you trust them"
            ) from err
        raise AdapterError(f"{path.parent} is not an adapter folder: it has no {path.name}") from err
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read: {err.strerror}") from err
    except (SafetensorError, ValueError, RecursionError) as err:
        reason = str(err)[:300].encode("unicode_escape").decode()  # it may quote the file, whatever that holds
        raise AdapterError(f"{path}: damaged: {reason}") from err
    return header
