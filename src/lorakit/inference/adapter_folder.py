"""The folder that a run ships (peft's two files, the tokenizer, lorakit.json): how it is written, checked and loaded."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from lorakit.data.example import OF_TRAINING
from lorakit.errors import AdapterError, OutputError
from lorakit.hashing import file_sha256, fingerprint_of
from lorakit.inference.side import FORMAT, GUARDED, SIDE_FILE, Side, read_facts
from lorakit.lora import load_adapter, quantize, read_adapter_config
from lorakit.lora.peft_config import MAX_BYTES
from lorakit.lora.peft_files import WEIGHTS_FILE, read_header
from lorakit.model_files import find
from lorakit.models import BaseModel, load_base
from lorakit.runtime.events import Note, Report, ignore
from lorakit.tasks.registry import task_layers

MOST_WEIGHTS = 2**32  # the most bytes of an adapter; one with XLM-R's embeddings has 1 GB
ADAPTER, MODEL = "adapter", "model"  # names in the run folder


def write_side(folder: Path, side: Side) -> None:
    """Write lorakit.json, with the sha256 of the files beside it."""
    sums = {name: file_sha256(folder / name) for name in GUARDED if (folder / name).is_file()}
    content = side.model_dump(exclude={"columns": set(OF_TRAINING)})
    for key in ("begins_from", "combined", "pooling"):  # a default is left out
        if content[key] == Side.model_fields[key].default:
            del content[key]
    text = json.dumps({**content, "format": FORMAT, "files": sums}, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / SIDE_FILE).write_text(text + "\n", encoding="utf-8")


def shipped_in(path: Path) -> Path | None:
    """The folder of an adapter or a fully fine-tuned model: this one, or a run's; None of any other, or without permission."""
    with suppress(OSError):
        for folder in (path, path / ADAPTER, path / MODEL):
            if (folder / SIDE_FILE).is_file():
                return folder
    return None


def shipped_folder(path: Path) -> Path:
    """The folder to load, given a run folder, an adapter folder or a fully fine-tuned model's folder.

    Raises:
        OutputError: there is no such folder, or it holds no adapter or model.
    """
    if folder := shipped_in(path):
        return folder
    if not path.exists():
        raise OutputError(f"{path}: no such run folder")
    if runs := sorted(side.parent.parent for name in (ADAPTER, MODEL) for side in path.glob(f"*/{name}/{SIDE_FILE}")):
        raise OutputError(
            f"{path}: contains {len(runs)} runs, of several seeds or a sweep; choose one, for example {runs[0]}"
        )
    raise OutputError(
        f"{path}: neither a run folder nor a lorakit adapter (no {SIDE_FILE}, no {ADAPTER}/{SIDE_FILE}); "
        "`lorakit import` converts a peft adapter"
    )


def read_side(folder: Path) -> Side:
    """Read lorakit.json, and check the sha256 of the files beside it.

    Raises:
        AdapterError: it is damaged or of a newer format, or a file beside it changed since it was written.
    """
    side = read_facts(folder)
    for name, sha256 in side.files.items():
        path = folder / name
        if name == WEIGHTS_FILE:
            read_header(path)  # refuses other files before reading all of them
        try:
            actual = file_sha256(path, MOST_WEIGHTS if name == WEIGHTS_FILE else MAX_BYTES)
        except OSError as err:
            raise AdapterError(f"{path}: cannot be read: {err.strerror}") from err
        if actual != sha256:
            raise AdapterError(f"{path}: changed since it was written (its sha256 is not the one in {SIDE_FILE})")
    return side


def load_shipped(
    folder: Path, side: Side, *, allow_base_mismatch: bool = False, with_adapter: bool = True, report: Report = ignore
) -> BaseModel:
    """The base model with or without the adapter, or the fully fine-tuned model; in fp32 and on the CPU.

    Raises:
        AdapterError: the base model differs from the one trained on and not `allow_base_mismatch` (checked before loading
            anything); or the adapter is damaged.
    """
    info, name, fingerprint = side.task.info, str(folder), None
    if side.method != "full":
        name, recorded = side.base.name, side.base.fingerprint
        fingerprint = fingerprint_of(find(name, side.base.revision))
        if (differences := recorded.differences(fingerprint)) and not allow_base_mismatch:
            raise AdapterError(
                f"{folder}: trained on a different {name}: {'; '.join(differences)}; predictions would differ (use "
                "--allow-base-mismatch to load it anyway)"
            )
        if None in recorded:
            report(Note(f"{folder}: written by an older lorakit: the base's config and tokenizer cannot be compared"))
    base = load_base(
        name,
        info.model_kind,
        labels=info.outputs(side.labels),
        revision=side.base.revision,
        fingerprint=fingerprint,
        pooling=side.pooling,
    )
    for note in base.notes:
        report(Note(note))
    if side.method == "full" and base.missing:
        raise AdapterError(f"{folder}: damaged: {base.missing[0]} is missing")
    if with_adapter:
        base = base.with_layers(task_layers(side.task, side.labels))
    if side.quantize != "none":
        quantize(base.model, side.quantize, skip=read_adapter_config(folder)[0].modules_to_save)
    if with_adapter and side.method != "full":
        load_adapter(base.model, folder)
    return base
