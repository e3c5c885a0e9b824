"""The settings of one adapter: a frozen dataclass with peft's field names, checked when it is created."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import ConfigError, did_you_mean, short

ALL_LINEAR = "all-linear"
BIASES = ("none", "lora_only", "all")

# The keys of INITS, DATA_INITS and UPDATES, so that settings can be checked without torch.
INIT_NAMES = ("kaiming", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal")
DATA_INIT_NAMES = ("eva", "lora_ga")
UPDATE_NAMES = ("lora", "dora", "lora_fa", "vera", "adalora")
PISSA_NITER = re.compile(r"pissa_niter_(\d{1,3})")  # any number of iterations


def standard_scaling(alpha: float, r: int) -> float:
    """Scaling alpha / r (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""
    return alpha / r


def rslora_scaling(alpha: float, r: int) -> float:
    """Scaling alpha / sqrt(r), which keeps the update's size stable as r grows (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(r)


SCALINGS: Mapping[str, Callable[[float, int], float]] = {"standard": standard_scaling, "rslora": rslora_scaling}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(type(v) is kind for v in values)


def _are_rows(rows: Any) -> bool:
    return all(_are(int, own) for own in rows.values()) if isinstance(rows, Mapping) else _are(int, rows)


# What the fields take that are not checked by their values alone.
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number", _is_number),
    "target_modules": ("a string, or a tuple of names", lambda v: isinstance(v, str) or _are(str, v)),
    "exclude_modules": ("a string, or a tuple of names", lambda v: isinstance(v, str) or _are(str, v)),
    "modules_to_save": ("a tuple of names, for example ('classifier',)", lambda v: _are(str, v)),
    "layers_to_transform": ("a tuple of whole numbers, or None", lambda v: v is None or _are(int, v)),
    "trainable_token_indices": ("a tuple of whole numbers, or a dict of them by module", _are_rows),
    "rank_pattern": ("a dict of ranks by name", lambda v: isinstance(v, Mapping)),
    "alpha_pattern": (
        "a dict of numbers by name",
        lambda v: isinstance(v, Mapping) and all(map(_is_number, v.values())),
    ),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), ("True or False", lambda v: isinstance(v, bool))),
    **dict.fromkeys(("bias", "init_lora_weights", "update"), ("a string", lambda v: isinstance(v, str))),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of one LoRA adapter (Hu et al. 2021, arXiv:2106.09685), named as peft names them.

    >>> LoraConfig(r=4, lora_alpha=16, target_modules=("query", "value"), modules_to_save=("classifier",)).scaling(16, 4)
    4.0

    Raises:
        ConfigError: a value is out of range, or `init_lora_weights` names no known initialisation.
    """

    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r (use_rslora: by lora_alpha / sqrt(r))
    lora_dropout: float = 0.0  # on the input of A, in training only
    target_modules: str | tuple[str, ...] = ALL_LINEAR  # suffixes; or a regex over whole paths; "all-linear"; a preset
    exclude_modules: str | tuple[str, ...] = ()  # same notation; takes precedence over target_modules
    layers_to_transform: tuple[int, ...] | None = None  # indices of blocks; None means all of them
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # name suffix or regex -> r; the first match wins
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # the same for lora_alpha
    modules_to_save: tuple[str, ...] = ()  # trained and saved in full: a head, a newly initialised layer
    use_rslora: bool = False
    use_dora: bool = False  # peft's spelling of update = "dora"
    lora_bias: bool = False  # a trained bias inside the scaled update
    # rows of the input embedding, or of embeddings by name
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    bias: str = "none"  # biases of the base to train: "none", "lora_only" (of the targets), "all"
    init_lora_weights: str = "kaiming"  # a key of INITS or DATA_INITS; pissa_niter_N
    update: str = "lora"  # a key of UPDATES

    def __post_init__(self) -> None:
        for key, (kind, fits) in KINDS.items():
            if not fits(value := getattr(self, key)):
                raise ConfigError(f"{key} = {short(value)}: must be {kind}")
        for key, r in (("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())):
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ConfigError(f"{key} = {r!r}: a rank is a whole number from 1")
        for key, alpha in (
            ("lora_alpha", self.lora_alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ):
            if not (math.isfinite(alpha) and alpha > 0):
                raise ConfigError(f"{key} = {alpha!r}: must be a finite number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout = {self.lora_dropout!r}: must be at least 0 and below 1")
        inits = (*INIT_NAMES, *DATA_INIT_NAMES)
        if self.init_lora_weights not in inits and not PISSA_NITER.fullmatch(self.init_lora_weights):
            hint = did_you_mean(self.init_lora_weights, inits)
            raise ConfigError(f"init_lora_weights = {self.init_lora_weights!r} is not known; {hint}")
        if self.update not in UPDATE_NAMES:
            raise ConfigError(f"update = {self.update!r} is not known; {did_you_mean(self.update, UPDATE_NAMES)}")
        if self.use_dora and self.update not in ("lora", "dora"):
            raise ConfigError(f"use_dora = true contradicts update = {self.update!r}")
        if self.use_dora or self.update == "dora":  # two spellings of one setting
            object.__setattr__(self, "update", "dora")
            object.__setattr__(self, "use_dora", True)
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias = true cannot be used with DoRA, which learns no bias; leave one of them out")
        if not isinstance(self.target_modules, str) and self.update in ("vera", "adalora"):
            for name in self.target_modules:
                if ":" in name:
                    raise ConfigError(f"target_modules: {name!r}: update = {self.update!r} takes whole layers only")
        if self.bias not in BIASES:
            raise ConfigError(f"bias = {self.bias!r} is not known; {did_you_mean(self.bias, BIASES)}")
        rows = self.trainable_token_indices
        for indices in rows.values() if isinstance(rows, Mapping) else (rows,):
            if len(set(indices)) < len(indices) or not all(type(i) is int and i >= 0 for i in indices):
                raise ConfigError(f"trainable_token_indices = {list(indices)}: must be different whole numbers from 0")
        if not self.target_modules and not self.modules_to_save and not rows:
            raise ConfigError("target_modules is empty: name at least one module, or use 'all-linear'")

    def scaling(self, alpha: float, r: int) -> float:
        """The scaling s of s B A for a layer with this alpha and rank."""
        return SCALINGS["rslora" if self.use_rslora else "standard"](alpha, r)
