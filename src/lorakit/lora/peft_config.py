"""adapter_config.json as peft 0.21 writes it: our settings in its words, and its words as our settings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lorakit.errors import AdapterError, ConfigError
from lorakit.lora.config import ALL_LINEAR, LoraConfig
from lorakit.lora.geometry import TRANSPOSED, geometry_of
from lorakit.lora.layer import Layer, hosts
from lorakit.lora.presets import with_presets
from lorakit.lora.targets import OUT_PROJ, select_targets
from lorakit.lora.updates import LoRA

CONFIG_FILE = "adapter_config.json"
MAX_BYTES = 1_000_000
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
    *("bias", "lora_bias", "trainable_token_indices", "ensure_weight_tying", "layers_pattern"),
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


def peft_config(model: nn.Module, config: LoraConfig, base: BaseInfo, name: str) -> dict[str, Any]:
    """Every key that peft writes, for an adapter that is in the model. What peft has no word for is written as plain LoRA."""
    config = with_presets(model, config)
    planned = {target.path for target in select_targets(model, config)}
    updates = [
        (path, host.lora(name)) for path, host in hosts(model, name) if isinstance(host, Layer) and path in planned
    ]
    doubled = any(update.start_A is not None for _, update in updates)
    rank_factor = 2 if doubled else 1
    alpha_factor = math.sqrt(2) if doubled and config.use_rslora else rank_factor
    targets: str | list[str]
    by_path = config.target_modules == ALL_LINEAR or (
        isinstance(config.target_modules, str) and config.layers_to_transform is not None  # which peft refuses
    )
    if by_path:
        targets = sorted(path for path, _ in updates if not path.endswith(OUT_PROJ))
    elif isinstance(config.target_modules, str):
        targets = config.target_modules
    else:
        targets = sorted({entry.partition(":")[0] for entry in config.target_modules})
    ranks, alphas = _patterns(model, config, dict(updates), rank_factor, alpha_factor)
    excluded = config.exclude_modules if isinstance(config.exclude_modules, str) else sorted(config.exclude_modules)
    return {
        **DEFAULTS,
        "alpha_pattern": alphas,
        "auto_mapping": None if base.task_type else _auto_mapping(model),
        "base_model_name_or_path": base.name_or_path,
        "bias": config.bias,
        "exclude_modules": None if by_path else excluded or None,
        "fan_in_fan_out": any(geometry_of(host.base) is TRANSPOSED for _, host in hosts(model, name)),
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        "layers_to_transform": None
        if by_path or config.layers_to_transform is None
        else sorted(config.layers_to_transform),
        "lora_alpha": config.lora_alpha * alpha_factor,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": sorted(config.modules_to_save) or None,
        "r": config.r * rank_factor,
        "rank_pattern": ranks,
        "revision": base.revision,
        "target_modules": targets,
        "task_type": base.task_type,
        "trainable_token_indices": _listed(config.trainable_token_indices) or None,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _patterns(
    model: nn.Module, config: LoraConfig, updates: Mapping[str, LoRA], rank_factor: int, alpha_factor: float
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern as they were asked for, if they still say what each layer has; else layer by layer.

    They do not where ranks were pruned, redistributed or combined, nor where the first of several matches counts: in the
    file the keys are sorted.
    """
    ranks = {key: r * rank_factor for key, r in sorted(config.rank_pattern.items())}
    alphas = {key: alpha * alpha_factor for key, alpha in sorted(config.alpha_pattern.items())}
    written = dataclasses.replace(
        config,
        r=config.r * rank_factor,
        lora_alpha=config.lora_alpha * alpha_factor,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    have = {path: (len(update.parts()["A"]), update.scaling) for path, update in updates.items()}
    said = {
        target.path: (target.r, config.scaling(target.alpha, target.r)) for target in select_targets(model, written)
    }
    if all(r == said[path][0] and math.isclose(s, said[path][1], rel_tol=1e-9) for path, (r, s) in have.items()):
        return ranks, alphas
    power = 0.5 if config.use_rslora else 1.0
    places = {path: "^" + path.removesuffix(OUT_PROJ) for path in have}  # nothing but this path
    return {places[p]: r for p, (r, _) in have.items()}, {places[p]: s * r**power for p, (r, s) in have.items()}


def _listed(rows: Any) -> Any:
    return {name: list(i) for name, i in rows.items()} if isinstance(rows, Mapping) else list(rows)


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
            lora_bias=bool(raw.get("lora_bias")),
            bias=raw.get("bias", "none"),
            trainable_token_indices=_rows(raw.get("trainable_token_indices") or ()),
            init_lora_weights="gaussian" if raw.get("init_lora_weights") == "gaussian" else "kaiming",
        )
    except (ConfigError, TypeError) as err:
        raise AdapterError(f"{path}: {err}") from err
    return config, BaseInfo(raw.get("base_model_name_or_path"), raw.get("revision"), raw.get("task_type"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise AdapterError(f"{path}: {size:,} bytes; the settings of an adapter have {MAX_BYTES:,} at most")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise AdapterError(f"{path.parent} is no adapter folder: it has no {path.name}") from err
    except (OSError, ValueError, RecursionError) as err:
        raise AdapterError(f"{path}: cannot be read as JSON: {err}") from err
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: holds a {type(raw).__name__}, not an object")
    return raw


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _items(value, str)


def _indices(value: Any) -> tuple[int, ...] | None:
    return None if value is None else (value,) if isinstance(value, int) else _items(value, int)


def _rows(value: Any) -> Any:
    return {name: _items(i, int) for name, i in value.items()} if isinstance(value, dict) else _items(value, int)


def _items(value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value):
        return tuple(value)
    raise TypeError(f"{value!r} is no list of {kind.__name__}")


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TypeError(f"{value!r} is no object of names and numbers")
