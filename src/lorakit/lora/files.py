"""One adapter on disk, as peft 0.21 writes it: adapter_config.json and adapter_model.safetensors.

Keys come from walking the modules that hold the adapter, never from searching names in strings. Reading checks the
whole header against the model before a tensor is allocated, and refuses rather than loads half. No pickle, ever.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora.config import ALL_LINEAR, LoraConfig
from lorakit.lora.geometry import TRANSPOSED, geometry_of, matrix_shape
from lorakit.lora.header import TensorInfo, read_header
from lorakit.lora.inject import check_known, insert_adapter
from lorakit.lora.layer import Layer, SavedModule, hosts
from lorakit.lora.presets import with_presets
from lorakit.lora.targets import adaptable_layers, has_suffix, saved_modules, select_targets, walk
from lorakit.lora.updates import DoRA

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"  # the version whose format this is

# Every key that peft 0.21 writes for LoRA, with its default. What we do not implement must have the default.
DEFAULTS: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Keys that may have any value: we implement them, or they do not change what the adapter computes.
FREE = {
    *(
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
    ),
    *("init_lora_weights", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
    *("task_type", "use_dora", "use_rslora", "loftq_config", "eva_config", "lora_ga_config", "corda_config"),
}
# Initialisations after which peft's A and B are valid on the unchanged base.
INNOCENT_INITS = (True, False, "gaussian", "orthogonal", "eva", "kaiming")


class BaseInfo(NamedTuple):
    """What an adapter says of the model it belongs to."""

    name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None  # SEQ_CLS, TOKEN_CLS, SEQ_2_SEQ_LM, ...


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one adapter under peft's keys, detached, on the CPU; LoRA factors in fp32."""
    tensors: dict[str, Tensor] = {}
    for path, host in hosts(model, name):
        if isinstance(host, Layer):
            update = host.lora(name)
            A, B = update.factors()
            for (key, shape), tensor in zip(
                _disk_shapes(host.base, len(A), isinstance(update, DoRA)).items(),
                (A, B, *([update.magnitude] if isinstance(update, DoRA) else [])),
                strict=True,
            ):
                tensors[f"{PREFIX}{path}.{key}"] = tensor.view(shape)
        else:
            for key, tensor in host.adapters[name].state_dict().items():
                tensors[f"{PREFIX}{path}.{key}"] = tensor
    return {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}


def _disk_shapes(base: nn.Module, r: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """peft's keys under a layer's path and the shapes it gives them: A, B, and DoRA's magnitude."""
    d_out, d_in = matrix_shape(base)
    A, B, magnitude = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
    if isinstance(base, nn.Embedding):
        shapes: dict[str, tuple[int, ...]] = {"lora_embedding_A": (r, d_in), "lora_embedding_B": (d_out, r)}
    elif isinstance(base, (nn.Conv1d, nn.Conv2d)):
        ones = (1,) * len(base.kernel_size)
        shapes = {A: (r, *base.weight.shape[1:]), B: (d_out, r, *ones)}
    else:
        shapes = {A: (r, d_in), B: (d_out, r)}
    if dora:
        shapes[magnitude] = (1, d_out, *ones) if isinstance(base, (nn.Conv1d, nn.Conv2d)) else (d_out,)
    return shapes


def save_adapter(
    model: nn.Module, folder: Path, config: LoraConfig, base: BaseInfo = BaseInfo(), name: str = "default"
) -> None:
    """Write one adapter; peft loads the folder as it is, and the same adapter gives the same bytes.

    An update with a start (pissa, olora) is written as plain LoRA of twice the rank, valid on the unchanged base.
    """
    check_known(model, name)
    folder.mkdir(parents=True, exist_ok=True)
    raw = _peft_config(model, config, base, name)
    save_file(adapter_tensors(model, name), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True), encoding="utf-8")


def _peft_config(model: nn.Module, config: LoraConfig, base: BaseInfo, name: str) -> dict[str, Any]:
    config = with_presets(model, config)
    updates = [(path, host.lora(name)) for path, host in hosts(model, name) if isinstance(host, Layer)]
    doubled = any(update.start_A is not None for _, update in updates)
    rank_factor = 2 if doubled else 1
    alpha_factor = math.sqrt(2) if doubled and config.use_rslora else rank_factor
    targets: str | list[str]
    by_path = config.target_modules == ALL_LINEAR or (
        isinstance(config.target_modules, str) and config.layers_to_transform is not None  # which peft refuses
    )
    if by_path:
        targets = sorted(path for path, _ in updates)
    else:
        targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    excluded = config.exclude_modules if isinstance(config.exclude_modules, str) else sorted(config.exclude_modules)
    return {
        **DEFAULTS,
        "alpha_pattern": {key: alpha * alpha_factor for key, alpha in config.alpha_pattern.items()},
        "auto_mapping": None if base.task_type else _auto_mapping(model),
        "base_model_name_or_path": base.name_or_path,
        "exclude_modules": None if by_path else excluded or None,
        "fan_in_fan_out": any(geometry_of(host.base) is TRANSPOSED for _, host in hosts(model, name)),
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        "layers_to_transform": None
        if by_path or config.layers_to_transform is None
        else sorted(config.layers_to_transform),
        "lora_alpha": config.lora_alpha * alpha_factor,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": sorted(config.modules_to_save) or None,
        "r": config.r * rank_factor,
        "rank_pattern": {key: r * rank_factor for key, r in config.rank_pattern.items()},
        "revision": base.revision,
        "target_modules": targets,
        "task_type": base.task_type,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def read_adapter_config(folder: Path) -> tuple[LoraConfig, BaseInfo]:
    """The settings of a saved adapter, ours or peft's.

    Raises:
        AdapterError: the file is missing, is no JSON object, or asks for something that cannot be done faithfully.
    """
    path = folder / CONFIG_FILE
    raw = _read_json(path)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {raw.get('peft_type')!r}; only 'LORA' can be read")
    for key, value in raw.items():
        if key not in FREE and value != DEFAULTS.get(key) and value not in (None, False, [], {}):
            raise AdapterError(f"{path}: {key} = {value!r} is not supported")
    if raw.get("init_lora_weights", True) not in INNOCENT_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights = {raw['init_lora_weights']!r} belongs to an edited base model; "
            "save it again with peft's path_initial_model_for_weight_conversion"
        )
    if raw.get("target_modules") is None:
        raise AdapterError(f"{path}: target_modules is missing")
    try:
        config = LoraConfig(
            r=raw.get("r", DEFAULTS["r"]),
            lora_alpha=raw.get("lora_alpha", DEFAULTS["lora_alpha"]),
            lora_dropout=raw.get("lora_dropout", 0.0),
            target_modules=_names(raw["target_modules"]),
            exclude_modules=_names(raw.get("exclude_modules") or ()),
            layers_to_transform=_indices(raw.get("layers_to_transform")),
            rank_pattern=_mapping(raw.get("rank_pattern") or {}),
            alpha_pattern=_mapping(raw.get("alpha_pattern") or {}),
            modules_to_save=tuple(dict.fromkeys(_items(raw.get("modules_to_save") or (), str))),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            init_lora_weights="gaussian" if raw.get("init_lora_weights") == "gaussian" else "kaiming",
        )
    except (ConfigError, TypeError) as err:
        raise AdapterError(f"{path}: {err}") from err
    return config, BaseInfo(raw.get("base_model_name_or_path"), raw.get("revision"), raw.get("task_type"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise AdapterError(f"{path.parent} is no adapter folder: it has no {path.name}") from err
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise AdapterError(f"{path}: cannot be read as JSON: {err}") from err
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: holds a {type(raw).__name__}, not an object")
    return raw


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _items(value, str)


def _indices(value: Any) -> tuple[int, ...] | None:
    return None if value is None else (value,) if isinstance(value, int) else _items(value, int)


def _items(value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value):
        return tuple(value)
    raise TypeError(f"{value!r} is no list of {kind.__name__}")


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TypeError(f"{value!r} is no object of names and numbers")


def load_adapter(model: nn.Module, folder: Path, name: str = "default") -> LoraConfig:
    """Add a saved adapter to the model and make it the active one; the model is untouched when anything is wrong.

    Raises:
        AdapterError: settings, keys, shapes or dtypes do not fit this model, or a value is not finite.
    """
    config, base = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    header = read_header(path)
    config = _as_peft_means(model, config, base, header.keys())
    try:
        shapes = _expected_shapes(model, config)
    except ConfigError as err:
        raise AdapterError(f"{folder} does not fit this model: {err}") from err
    _check_header(path, header, shapes)
    tensors = _read_tensors(path)
    insert_adapter(model, config, name)
    _assign(model, name, tensors)
    return config


def _as_peft_means(model: nn.Module, config: LoraConfig, base: BaseInfo, keys: Set[str]) -> LoraConfig:
    """The settings in our stricter reading of names. Nothing is lost: the file's keys must match the result exactly.

    peft lists every head name it knows, present or not, and targets that lie in a head; and its `classifier` takes
    DistilBERT's `pre_classifier` along.
    """
    paths = [path for path, _ in walk(model)]
    optional = ("classifier", "score") if base.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    saved = [n for n in config.modules_to_save if n not in optional or any(has_suffix(path, n) for path in paths)]
    saved += [
        path
        for path in paths
        if path.endswith(config.modules_to_save)
        and not any(has_suffix(path, name) for name in saved)
        and f"{PREFIX}{path}.weight" in keys
    ]
    targets = config.target_modules
    if not isinstance(targets, str):
        kept = tuple(n for n in targets if any(_in_file(path, keys) and has_suffix(path, n) for path in paths))
        targets = kept or targets
    return dataclasses.replace(config, modules_to_save=tuple(saved), target_modules=targets)


def _in_file(path: str, keys: Set[str]) -> bool:
    return any(f"{PREFIX}{path}.{key}" in keys for key in ("lora_A.weight", "lora_embedding_A"))


def _expected_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shape that each key must have for this model and these settings."""
    layers = adaptable_layers(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for target in select_targets(model, config):
        for key, shape in _disk_shapes(layers[target.path], target.r, config.use_dora).items():
            shapes[f"{PREFIX}{target.path}.{key}"] = shape
    for path in saved_modules(model, config.modules_to_save):
        module = model.get_submodule(path)
        plain = module.base if isinstance(module, SavedModule) else module
        for key, tensor in plain.state_dict().items():
            shapes[f"{PREFIX}{path}.{key}"] = tuple(tensor.shape)
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
        tensors = load_file(path)
    except (SafetensorError, OSError) as err:
        raise AdapterError(f"{path}: damaged: {err}") from err
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {key} holds NaN or infinite values")
    return tensors


@torch.no_grad()
def _assign(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    for path, host in hosts(model, name):
        if isinstance(host, Layer):
            update = host.lora(name)
            keys = _disk_shapes(host.base, len(update.lora_A), isinstance(update, DoRA))
            parts = (update.lora_A, update.lora_B, *([update.magnitude] if isinstance(update, DoRA) else []))
            for key, part in zip(keys, parts, strict=True):
                part.copy_(tensors[f"{PREFIX}{path}.{key}"].view_as(part))
        else:
            module = host.adapters[name]
            module.load_state_dict({key: tensors[f"{PREFIX}{path}.{key}"] for key in module.state_dict()})
