"""The schema of lorakit.json, the facts about a shipped adapter or model; without torch."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from lorakit.data.example import Columns
from lorakit.errors import AdapterError, short
from lorakit.hashing import Fingerprint, read_object
from lorakit.recipe import TaskSection, first_problem

SIDE_FILE = "lorakit.json"
FORMAT = 1
MOST_BYTES = 2**24  # of the file; enough for 200,000 labels of 40 characters, listed twice
MOST_ENTRIES = 100_000  # of an object in it, since each wrong entry makes an error object
MOST_TOKENS = 1_000_000
LEAST = {"temperature": 1e-9, "spread": 0.0}  # logits divided by less are not finite
Guarded = Literal["adapter_config.json", "adapter_model.safetensors"]
GUARDED: tuple[Guarded, ...] = get_args(Guarded)  # an edit of alpha, for example, changes every answer but no shape


def _few(value: Any) -> Any:
    if isinstance(value, Mapping) and len(value) > MOST_ENTRIES:
        raise ValueError(f"should be an object of at most {MOST_ENTRIES:,} entries, not {len(value):,}")
    return value


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) < len(labels):
        twice = Counter(labels).most_common(1)[0][0]
        raise ValueError(f"should be different labels; {twice[:80]!r} appears twice")
    return labels


def _in_tuples(columns: Any) -> Any:
    """JSON has no tuples."""
    if not isinstance(columns, dict):
        return columns
    return {
        **columns,
        **{key: tuple(columns[key]) for key in ("label", "negative", "choices") if type(columns.get(key)) is list},
    }


def _usable(tuned: dict[str, Any]) -> dict[str, Any]:
    for name, value in tuned.items():
        values = list(value.values()) if isinstance(value, dict) else [value]
        if not all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in values):
            raise ValueError("should be finite numbers, or objects of them")
        least = LEAST.get(name)
        if least is not None and not (type(value) in (int, float) and value > least):
            raise ValueError(f"should be a number above {least:g} for {name}")
    return tuned


Name = Annotated[str, Field(min_length=1, max_length=4096)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Few = BeforeValidator(_few)


class Facts(BaseModel):
    """A table of the file: values of the wrong type are errors, keys of a newer lorakit are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Base(Facts):
    """The model that an adapter belongs to."""

    name: Name
    revision: Name | None = None
    sha256: Sha256  # of the weights
    config_sha256: Sha256 | None = None  # None in older folders
    tokenizer_sha256: Sha256 | None = None

    @classmethod
    def of(cls, name: str, revision: str | None, fingerprint: Fingerprint) -> Self:
        """The base with this name and fingerprint."""
        weights, config, tokenizer = fingerprint
        return cls(name=name, revision=revision, sha256=weights, config_sha256=config, tokenizer_sha256=tokenizer)

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint that a base must have."""
        return Fingerprint(self.sha256, self.config_sha256, self.tokenizer_sha256)


class Side(Facts):
    """The content of the file: all that prediction needs besides the weights."""

    task: TaskSection
    base: Base
    labels: Annotated[tuple[str, ...], FailFast(), AfterValidator(_distinct)]
    max_length: Annotated[int, Field(strict=True, ge=1, le=MOST_TOKENS)]
    columns: Annotated[
        Columns, BeforeValidator(_in_tuples)
    ]  # of the training data; with a pair, predictions need pairs
    dtype: Literal["fp32", "bf16", "fp16"]
    method: Literal["lora", "full", "head"]
    quantize: Literal["none", "int8", "nf4"] = "none"
    pooling: Literal["cls", "mean"] = "cls"
    # on the validation examples, for example thresholds
    tuned: Annotated[dict[str, Any], AfterValidator(_usable)] = {}
    data: Annotated[dict[str, str], Few] = {}  # sha256 of each source used for training or selection
    scores: Annotated[dict[str, float], Few] = {}
    versions: Annotated[dict[str, str], Few] = {}
    files: dict[Guarded, Sha256] = {}
    begins_from: Annotated[dict[str, str], Few] = {}  # the adapter of model.adapter
    combined: Annotated[dict[str, Any], Few] = {}  # how `lorakit combine` made it


def read_facts(folder: Path) -> Side:
    """Read a folder's lorakit.json; the files beside it are not checked.

    Raises:
        AdapterError: it is damaged (the message names the key), of a newer format, or of an export.
    """
    path = folder / SIDE_FILE
    try:
        raw = read_object(path, MOST_BYTES)
    except OSError as err:
        raise AdapterError(f"{path}: cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise AdapterError(f"{path}: damaged: {err}") from err
    if export := raw.get("export"):
        raise AdapterError(f"{folder}: this is an export to {str(export)[:80]} for other programs; use the run itself")
    if (format := raw.get("format")) != FORMAT:
        words = (
            "was written by a newer lorakit; this one reads" if isinstance(format, int) and format > FORMAT else "not"
        )
        raise AdapterError(f"{path}: format {short(format)} {words} {FORMAT}")
    try:
        side = Side.model_validate(raw)
    except ValidationError as err:
        raise AdapterError(f"{path}: damaged: {first_problem(err)}") from err
    if not side.labels and side.task.info.names_labels:
        raise AdapterError(f"{path}: damaged: labels = []: {side.task.name} should have at least one")
    return side
