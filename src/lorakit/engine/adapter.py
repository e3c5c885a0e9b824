"""What a run ships: a folder with peft's two files, the tokenizer, and lorakit.json, which says all that peft's do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.example import Columns
from lorakit.digest import file_sha256
from lorakit.engine.atomic import atomic_folder
from lorakit.engine.prepare import Prepared, columns_of
from lorakit.engine.runtime import DTYPES
from lorakit.errors import AdapterError, OutputError
from lorakit.lora import BaseInfo, save_adapter
from lorakit.lora.files import WEIGHTS_FILE
from lorakit.lora.peft_config import CONFIG_FILE
from lorakit.lora.quantize import FORMATS
from lorakit.models import save_model, save_tokenizer, versions
from lorakit.recipe import TaskSection
from lorakit.tasks.base import Scores

SIDE_FILE = "lorakit.json"
FORMAT = 1
GUARDED = (CONFIG_FILE, WEIGHTS_FILE)  # an edit of alpha, say, changes every answer and no shape
ADAPTER, MODEL = "adapter", "model"  # names in the run folder


@dataclass(frozen=True)
class Side:
    """The content of lorakit.json: enough to answer from the folder alone."""

    task: TaskSection
    labels: tuple[str, ...]
    max_length: int
    tuned: Mapping[str, Any]  # on the validation examples: thresholds, say
    data: Mapping[str, str]  # sha256 of each source that it was trained or chosen on
    columns: Columns  # that it was trained on; with a pair, answers need pairs too
    base: str
    revision: str | None
    base_sha256: str
    dtype: str
    quantize: str
    method: str


def write_shipped(run: Path, prepared: Prepared, scores: Scores) -> Path:
    """Write run/adapter (with full fine-tuning: run/model) as one unit, replacing the one before."""
    target = run / (MODEL if prepared.config is None else ADAPTER)
    with atomic_folder(target, replace=True) as folder:
        if prepared.config is None:
            save_model(prepared.model, prepared.base.tokenizer, folder)
        else:
            info = BaseInfo(prepared.base.name, prepared.base.revision, prepared.base.kind.peft_task_type)
            save_adapter(prepared.model, folder, prepared.config, info, prepared.adapter)
            save_tokenizer(prepared.base.tokenizer, folder)
        write_side(folder, _side(prepared, scores))
    return target


def write_side(folder: Path, content: Mapping[str, Any]) -> None:
    """Write lorakit.json, with the sums of the files beside it."""
    files = {name: file_sha256(folder / name) for name in GUARDED if (folder / name).is_file()}
    text = json.dumps({**content, "format": FORMAT, "files": files}, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / SIDE_FILE).write_text(text + "\n", encoding="utf-8")


def _side(prepared: Prepared, scores: Scores) -> dict[str, Any]:
    recipe, base = prepared.recipe, prepared.base
    return {
        "task": recipe.task.model_dump(),
        "labels": list(prepared.task.labels),
        "tuned": dict(prepared.task.tuned),
        "max_length": recipe.data.max_length or base.max_length,
        "base": {"name": base.name, "revision": base.revision, "sha256": base.sha256},
        "dtype": "fp32" if prepared.dtype.itemsize == 4 else "bf16",
        "quantize": recipe.model.quantize,
        "method": recipe.train.method,
        "columns": {k: v for k, v in dataclasses.asdict(columns_of(recipe.data)).items() if k != "group"},
        "data": prepared.fingerprints,
        "scores": {key: value for key, value in scores.items() if isinstance(value, float)},
        "versions": versions(),
    }


def shipped_folder(path: Path) -> Path:
    """The folder to load for a run folder, an adapter folder or a fully fine-tuned model's folder.

    Raises:
        OutputError: there is no such folder, or it holds nothing that was shipped.
    """
    for folder in (path, path / ADAPTER, path / MODEL):
        if (folder / SIDE_FILE).is_file():
            return folder
    if not path.exists():
        raise OutputError(f"{path}: no such run folder")
    raise OutputError(
        f"{path}: neither a run folder nor an adapter of lorakit (no {SIDE_FILE}, no {ADAPTER}/{SIDE_FILE}); "
        "`lorakit import` adopts an adapter of peft's"
    )


def read_side(folder: Path) -> Side:
    """Read lorakit.json. Raises an AdapterError where it is damaged or of a newer format."""
    path = folder / SIDE_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if export := raw.get("export"):
            raise AdapterError(
                f"{folder}: an export to {export}, for other programs; lorakit answers from the run itself"
            )
        if raw["format"] != FORMAT:
            raise AdapterError(
                f"{path}: format {raw['format']} was written by a newer lorakit; this one reads {FORMAT}"
            )
        for name, sha256 in raw["files"].items():
            if file_sha256(folder / name) != sha256:
                raise AdapterError(
                    f"{folder / name}: changed since it was written (its sha256 is not the one in {SIDE_FILE})"
                )
        if raw["dtype"] not in DTYPES:
            raise ValueError(f"dtype = {raw['dtype']!r}")
        if (format := raw.get("quantize", "none")) not in ("none", *FORMATS):
            raise ValueError(f"quantize = {format!r}")
        return Side(
            task=TaskSection.model_validate(raw["task"]),
            labels=tuple(raw["labels"]),
            max_length=int(raw["max_length"]),
            tuned=dict(raw.get("tuned", {})),
            data=dict(raw.get("data", {})),
            columns=_columns(raw["columns"]),
            base=raw["base"]["name"],
            revision=raw["base"]["revision"],
            base_sha256=raw["base"]["sha256"],
            dtype=raw["dtype"],
            quantize=format,
            method=raw["method"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise AdapterError(f"{path}: damaged: {type(err).__name__} {err}") from err


def _columns(raw: Mapping[str, Any]) -> Columns:
    label = raw.get("label")  # JSON has no tuples
    return Columns(**{**raw, "label": tuple(label) if isinstance(label, list) else label})
