"""`lorakit import`: check an adapter that something else has written, and make it a folder that every command here reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit import models
from lorakit.app.arguments import check_free
from lorakit.data.example import Columns
from lorakit.errors import AdapterError, ConfigError
from lorakit.inference.adapter_folder import write_side
from lorakit.inference.side import Base, Side
from lorakit.lora import BaseInfo, LoraConfig, count_parameters, load_adapter, read_adapter_config, save_adapter
from lorakit.lora.peft_files import PREFIX, WEIGHTS_FILE, TensorInfo, read_header
from lorakit.models import BaseModel, load_base, save_tokenizer, versions
from lorakit.recipe import Pooling, TaskSection
from lorakit.runtime.files import atomic_folder
from lorakit.tasks.registry import TASKS

# peft's task_type -> ours; several may share one, and the first of them is meant unless one is asked for
USUAL = {models.KINDS[kind.model].peft_task_type: task for task, kind in list(TASKS.items())[::-1]}
MEAN = "FEATURE_EXTRACTION"  # the task_type of adapters over AutoModel, whose classifier reads the mean over tokens
USUAL[MEAN] = USUAL["SEQ_CLS"]
HEAD = re.compile(r".*\.(?:classifier|score|classifier\.out_proj)\.weight")  # the layer with one row a label


@dataclass(frozen=True)
class Asked:
    """What the user says of the adapter where its own files do not."""

    base: str | None = None
    task: str | None = None
    labels: tuple[str, ...] = ()
    pair: str | None = None  # name of the second text's column, for an adapter trained on pairs


def import_adapter(source: Path, out: Path, asked: Asked = Asked()) -> list[str]:
    """Write `out` from peft's adapter in `source`: loaded onto its base, checked, and saved again; says what was found.

    Raises:
        AdapterError: the adapter is damaged, does not fit the base, or leaves a layer of the model random.
        ConfigError: base, task or labels cannot be told from the files.
        OutputError: `out` exists or cannot be written; nothing is left half written.
    """
    check_free(out)
    _, info = read_adapter_config(source)
    header = read_header(source / WEIGHTS_FILE)
    name = asked.base or info.name_or_path
    if name is None:
        raise ConfigError(f"{source}: the adapter does not name its base model; say it with --base")
    task = _task(source, info, asked)
    base = _base(
        source, BaseInfo(name, None if asked.base else info.revision, info.task_type), task, asked.labels, header
    )
    labels = asked.labels or (() if task.name == "sequence_regression" else _own_labels(base))
    _check_nothing_random(source, base, header)
    config = load_adapter(base.model, source)
    with atomic_folder(out) as folder:
        save_adapter(base.model, folder, config, BaseInfo(name, base.revision, base.kind.peft_task_type))
        save_tokenizer(base.tokenizer, folder)
        side = Side(
            task=task,
            labels=labels,
            max_length=base.max_length,
            base=Base.of(name, base.revision, base.fingerprint),
            dtype="fp32",
            method="lora" if config.target_modules else "head",
            pooling=base.pooling,
            columns=Columns(pair=asked.pair),
            versions=versions(),
        )
        write_side(folder, side)
    return _found(base, task, labels, config, info)


def _task(source: Path, info: BaseInfo, asked: Asked) -> TaskSection:
    name = asked.task or USUAL.get(info.task_type or "")
    if name is None:
        known = ", ".join(TASKS)
        raise ConfigError(f"{source}: task_type {info.task_type!r} tells no task; say it with --task ({known})")
    # its tags may be IOB1 or IO, under whose rules most of what IOB2 forbids is right
    free = {"decoding": "argmax"} if name == "token_classification" else {}
    return TaskSection.model_validate({"name": name, **free})


def _outputs(header: Mapping[str, TensorInfo]) -> int | None:
    """How many labels the adapter's own head tells apart; None where it brings no head."""
    return next((info.shape[0] for key, info in header.items() if HEAD.fullmatch(key)), None)


def _base(
    source: Path, info: BaseInfo, task: TaskSection, labels: tuple[str, ...], header: Mapping[str, TensorInfo]
) -> BaseModel:
    """The base model with an output for each label: those asked for, else those of its own config."""
    name, revision, outputs = str(info.name_or_path), info.revision, _outputs(header)
    pooling: Pooling = "mean" if info.task_type == MEAN else "cls"
    kind = TASKS[task.name].model
    if kind == "text2text":
        if not labels:
            raise ConfigError(f"{source}: name the entity types that the adapter writes with --labels PER,LOC,...")
        return load_base(name, kind, revision=revision)
    if task.name == "ordinal_classification" and not labels:
        raise ConfigError(f"{source}: name the labels from lowest to highest with --labels 1,2,3,...")
    base = load_base(name, kind, labels=TASKS[task.name].outputs(labels), revision=revision, pooling=pooling)
    found = TASKS[task.name].outputs(labels) or _own_labels(base)
    if outputs is not None and len(found) != outputs:
        whose = "--labels has" if labels else f"{name} names"
        raise ConfigError(
            f"{source}: its head tells {outputs} labels apart, {whose} {len(found)} ({', '.join(found[:5])}); "
            f"give {outputs} with --labels, in the order of the head's rows"
        )
    return base


def _own_labels(base: BaseModel) -> tuple[str, ...]:
    names: Mapping[int, str] = getattr(base.model.config, "id2label", None) or {}
    return tuple(names[i] for i in sorted(names))


def _check_nothing_random(source: Path, base: BaseModel, header: Mapping[str, TensorInfo]) -> None:
    """Raise where neither the base's checkpoint nor the adapter has a layer of the model: it would answer at random."""
    brought = {key.removeprefix(PREFIX) for key in header}
    if random := sorted(set(base.missing) - brought):
        raise AdapterError(
            f"{source}: neither the adapter nor {base.name} has {random[0]}"
            f"{f' and {len(random) - 1} more tensors' if len(random) > 1 else ''}, so answers would be random; "
            "give the base that it was trained on with --base"
        )


def _found(
    base: BaseModel, task: TaskSection, labels: tuple[str, ...], config: LoraConfig, info: BaseInfo
) -> list[str]:
    counts = count_parameters(base.model)
    targets = (
        config.target_modules if isinstance(config.target_modules, str) else ", ".join(sorted(config.target_modules))
    )
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    lines = [
        f"base: {base.name}, sha256 {base.fingerprint.weights[:12]}...; from now on no other is taken for it",
        f"task: {task.name} (task_type {info.task_type})",
        f"adapter: {kind}, r {config.r}, alpha {config.lora_alpha:g}, over {targets or 'no layer'}; {counts.lora:,} parameters",
        f"trained in full: {', '.join(config.modules_to_save) or 'nothing'}; {counts.saved:,} parameters",
        f"labels: {', '.join(labels)}",
    ]
    if any(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        lines.append("the labels are numbered, not named: --labels gives them names")
    return lines
