"""adapter_config.json as peft 0.21 writes it: our settings in its words, and its words as our settings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lorakit.errors import AdapterError, ConfigError, short
from lorakit.hashing import read_object
from lorakit.lora.config import ALL_LINEAR, LoraConfig
from lorakit.lora.layers import Layer, hosts
from lorakit.lora.target_presets import with_presets
from lorakit.lora.targets import OUT_PROJ, embeddings_in_place_of, has_suffix, select_targets, trainable_row_modules
from lorakit.lora.updates import LoRA
from lorakit.lora.weight_layouts import TRANSPOSED, geometry_of

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
# Keys that do not change what a saved adapter computes, whatever their value.
HARMLESS = {
    *("auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config"),
    *("lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "runtime_config"),
}
# Initialisations after which peft's A and B are valid on the unchanged base.
INNOCENT_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica", "kaiming")


# What we read: what it must be in words, and as kinds for `_fits`; null stands for the default where peft takes it.
FLAG: tuple[str, Any] = ("true or false", (bool, None))
NAMES: tuple[str, Any] = ("a string or a list of strings", (str, [str], None))
TYPES: Mapping[str, tuple[str, Any]] = {
    "alpha_pattern": ("an object of numbers", ({"": float}, None)),
    "base_model_name_or_path": ("a string", (str, None)),
    "bias": ("a string", str),
    "ensure_weight_tying": FLAG,
    "exclude_modules": NAMES,
    "init_lora_weights": ("true, false or a string", (str, bool, None)),
    "layers_pattern": NAMES,
    "layers_to_transform": ("a whole number or a list of them", (int, [int], None)),
    "lora_alpha": ("a number", float),
    "lora_bias": FLAG,
    "lora_dropout": ("a number", float),
    "modules_to_save": ("a list of strings", ([str], None)),
    "r": ("a whole number", int),
    "rank_pattern": ("an object of whole numbers", ({"": int}, None)),
    "revision": ("a string", (str, None)),
    "target_modules": NAMES,
    "task_type": ("a string", (str, None)),
    "trainable_token_indices": (
        "a list of whole numbers, or an object of such lists",
        ([int], {"": [int]}, None),
    ),
    "use_dora": FLAG,
    "use_rslora": FLAG,
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a kind: a type, None, a list [kind], an object {"": kind}, or one of (kind, kind)."""
    if isinstance(kind, tuple):
        return any(_fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(item, kind[""]) for item in value.values())
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 1e300)
    return value is None if kind is None else type(value) is kind


class BaseInfo(NamedTuple):
    """What an adapter says of the model it belongs to.

    >>> config = LoraConfig(r=4, target_modules=("query",))
    >>> targets = add_adapter(model, config)
    >>> save_adapter(model, folder, config, BaseInfo("bert-base-uncased", task_type="SEQ_CLS"))
    """

    name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None  # SEQ_CLS, TOKEN_CLS, SEQ_2_SEQ_LM, ...


def peft_config(model: nn.Module, config: LoraConfig, base: BaseInfo, name: str) -> dict[str, Any]:
    """Every key that peft writes, for an adapter that is in the model. What peft has no word for is written as plain LoRA."""
    config = with_presets(model, config)
    targeted = select_targets(model, config)
    planned = {target.path for target in targeted}
    main, called = embeddings_in_place_of(model)
    updates = [
        (path, host.lora(name)) for path, host in hosts(model, name) if isinstance(host, Layer) and path in planned
    ]
    doubled = any(update.start_A is not None for _, update in updates)
    rank_factor = 2 if doubled else 1
    alpha_factor = math.sqrt(2) if doubled and config.use_rslora else rank_factor
    targets: str | list[str]
    by_path = (
        config.target_modules == ALL_LINEAR
        or (isinstance(config.target_modules, str) and config.layers_to_transform is not None)  # which peft refuses
        or any(target.path in called and target.matched_by == main for target in targeted)  # by another name
    )
    if by_path:
        targets = sorted(path for path, _ in updates if not path.endswith(OUT_PROJ))
    elif isinstance(config.target_modules, str):
        targets = config.target_modules
    else:
        targets = sorted({entry.partition(":")[0] for entry in config.target_modules})
    ranks, alphas = _patterns(model, config, dict(updates), rank_factor, alpha_factor)
    excluded = config.exclude_modules if isinstance(config.exclude_modules, str) else sorted(config.exclude_modules)
    if isinstance(config.trainable_token_indices, Mapping):
        # by the names that were given or, of tied embeddings, by the name that peft acts on
        paths = trainable_row_modules(model, config)
        is_matched = all(any(has_suffix(path, name) for path in paths) for name in config.trainable_token_indices)
        by_name = config.trainable_token_indices if is_matched else paths
        rows: Any = {name: list(indices) for name, indices in by_name.items()}
    else:
        rows = list(config.trainable_token_indices)
    return {
        **DEFAULTS,
        "alpha_pattern": alphas,
        "auto_mapping": None
        if base.task_type
        else {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
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
        "trainable_token_indices": rows or None,
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
        # all-linear would pass by layers that are too small for twice the rank
        target_modules=tuple(p for p in updates if not p.endswith(OUT_PROJ))
        if config.target_modules == ALL_LINEAR
        else config.target_modules,
        r=config.r * rank_factor,
        lora_alpha=config.lora_alpha * alpha_factor,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    actual = {path: (len(update.parts()["A"]), update.scaling) for path, update in updates.items()}
    expected = {
        target.path: (target.r, config.scaling(target.alpha, target.r)) for target in select_targets(model, written)
    }
    if all(
        r == expected[path][0] and math.isclose(s, expected[path][1], rel_tol=1e-9) for path, (r, s) in actual.items()
    ):
        return ranks, alphas
    power = 0.5 if config.use_rslora else 1.0
    places = {path: "^" + path.removesuffix(OUT_PROJ) for path in actual}  # nothing but this path
    return {places[p]: r for p, (r, _) in actual.items()}, {places[p]: s * r**power for p, (r, s) in actual.items()}


def read_adapter_config(folder: Path) -> tuple[LoraConfig, BaseInfo]:
    """The settings of a saved adapter, ours or peft's.

    Keys that peft does not know are ignored, as peft does, unless a newer peft than the one we follow wrote the file.

    >>> config = LoraConfig(r=4, target_modules=("query", "value"))
    >>> targets = add_adapter(model, config)
    >>> save_adapter(model, folder, config)
    >>> read_adapter_config(folder)[0] == config
    True

    Raises:
        AdapterError: the file is missing, is not a JSON object, or asks for something that cannot be done faithfully.
    """
    path = folder / CONFIG_FILE
    try:
        raw = read_object(path, MAX_BYTES)
    except FileNotFoundError as err:
        raise AdapterError(f"{folder} is not an adapter folder: it has no {path.name}") from err
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise AdapterError(f"{path}: {err}") from err
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {short(raw.get('peft_type'))}; only 'LORA' can be read")
    newer = _version(raw.get("peft_version")) > _version(PEFT_VERSION)
    for key, value in raw.items():
        if key in TYPES:
            words, kind = TYPES[key]
            if not _fits(value, kind):
                raise AdapterError(f"{path}: {key} = {short(value)} is not {words}")
        elif key in DEFAULTS or newer:
            is_off = (
                value is None or value is False or (value == [] and key in ("layer_replication", "target_parameters"))
            )
            if not (key in HARMLESS or value == DEFAULTS.get(key) or is_off):
                raise AdapterError(f"{path}: {short(key[:80])[1:-1]} = {short(value)} is not supported")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() in ("gaussian", "mica"):  # which peft reads in any case
        init = init.lower()
    if init not in INNOCENT_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights = {short(init)} belongs to an edited base model; "
            "save it again with peft's path_initial_model_for_weight_conversion"
        )
    targets, layers, pattern = (raw.get(key) for key in ("target_modules", "layers_to_transform", "layers_pattern"))
    if isinstance(layers, int):
        layers = [layers]
    if pattern and layers and isinstance(targets, list):
        targets, layers = _in_blocks(targets, layers, [pattern] if isinstance(pattern, str) else pattern), None
    rows = raw.get("trainable_token_indices") or ()
    try:
        config = LoraConfig(
            r=raw.get("r", DEFAULTS["r"]),
            lora_alpha=raw.get("lora_alpha", DEFAULTS["lora_alpha"]),
            lora_dropout=raw.get("lora_dropout", 0.0),
            # peft has default targets for each family, which are those of our preset
            target_modules="query-value" if targets is None else _names(targets),
            exclude_modules=_names(raw.get("exclude_modules") or ()),
            layers_to_transform=tuple(layers) if layers else None,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            modules_to_save=tuple(dict.fromkeys(raw.get("modules_to_save") or ())),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            lora_bias=bool(raw.get("lora_bias")),
            bias=raw.get("bias", "none"),
            trainable_token_indices={name: tuple(i) for name, i in rows.items()}
            if isinstance(rows, dict)
            else tuple(rows),
            init_lora_weights="gaussian" if init == "gaussian" else "kaiming",
        )
    except ConfigError as err:
        raise AdapterError(f"{path}: {err}") from err
    return config, BaseInfo(raw.get("base_model_name_or_path"), raw.get("revision"), raw.get("task_type"))


def _version(text: Any) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d{1,9}", text)[:3])) if isinstance(text, str) else ()


def _names(value: str | Sequence[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _in_blocks(names: Sequence[str], layers: Sequence[int], patterns: Sequence[str]) -> str:
    """peft's layers_pattern as a regular expression over whole paths: names in these blocks of these lists of blocks."""
    blocks = rf"(?:{'|'.join(patterns)})\.(?:{'|'.join(map(str, layers))})\."
    return rf"(?=(?:.*\.)?{blocks})(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"
