"""`lorakit import`: check an adapter written by another program, and convert it to a folder that every command reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import click

from lorakit.app.arguments import TaskType, check_free, folder_to_write
from lorakit.app.printing import Output
from lorakit.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from lorakit.lora import BaseInfo
    from lorakit.lora.peft_files import TensorInfo
    from lorakit.models import BaseModel

MEAN = "FEATURE_EXTRACTION"  # the task_type of adapters over AutoModel, whose classifier reads the mean over tokens
HEAD = re.compile(r".*\.(?:classifier|score|classifier\.out_proj)\.weight")  # the layer with one row a label


@click.command(name="import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--base", help="Its base model, if the adapter does not name it or it has moved.")
@click.option("--task", type=TaskType(), help="Its task, if its task_type does not determine it.")
@click.option("--labels", metavar="A,B,...", help="The labels, in the order of its head's rows.")
@click.option("--pair", metavar="COLUMN", help="Column of the second text, if it was trained on pairs.")
@click.option("--dry-run", is_flag=True, help="Check the adapter, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print its facts as JSON.")
def import_(folder: Path, out: Path, labels: str | None, dry_run: bool, as_json: bool, **options: str | None) -> None:
    """Check an adapter trained with peft, and convert it.

    The result works with predict, evaluate, merge and export.
    """
    names = tuple(name.strip() for name in labels.split(",") if name.strip()) if labels else ()
    with folder_to_write(out, dry_run) as place:
        lines = import_adapter(folder, place, labels=names, **options)
    end = [] if dry_run else [f"adapter: {out}"]
    Output([*lines, *end], {"adapter": None if dry_run else str(out), "said": lines}).show(as_json)


def import_adapter(
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    task: str | None = None,
    labels: tuple[str, ...] = (),
    pair: str | None = None,
) -> list[str]:
    """Write `out` from peft's adapter in `source`: loaded onto its base, checked, and saved again; lines say what it is.

    What the adapter's own files do not say is given: base, task, labels, and the name of the second text's column for an
    adapter trained on pairs.

    Raises:
        AdapterError: the adapter is damaged, does not fit the base, or leaves a layer of the model random.
        ConfigError: base, task or labels cannot be read from the files.
        OutputError: `out` exists or cannot be written; nothing is left half written.
    """
    from lorakit.data.example import Columns, Example
    from lorakit.inference.adapter_folder import write_side
    from lorakit.inference.side import Base, Side
    from lorakit.lora import BaseInfo, count_parameters, load_adapter, read_adapter_config, save_adapter
    from lorakit.lora.peft_files import WEIGHTS_FILE, read_header
    from lorakit.models import KINDS, versions
    from lorakit.recipe import TaskSection
    from lorakit.runtime.files import atomic_folder
    from lorakit.task_info import TASKS

    check_free(out)
    _, info = read_adapter_config(source)
    header = read_header(source / WEIGHTS_FILE)
    name = base or info.name_or_path
    if name is None:
        raise ConfigError(f"{source}: the adapter does not name its base model; pass --base")
    task_type = "SEQ_CLS" if info.task_type == MEAN else info.task_type
    # several tasks may share one of peft's task_types; the first of them is meant unless --task says otherwise
    usual = (name for name, kind in TASKS.items() if task_type == KINDS[kind.model_kind].peft_task_type is not None)
    task = task or next(usual, None)
    if task is None:
        known = ", ".join(TASKS)
        raise ConfigError(f"{source}: task_type {info.task_type!r} does not determine the task; pass --task ({known})")
    # its tags may be IOB1 or IO, under whose rules most of what IOB2 forbids is right
    section = TaskSection.model_validate({"name": task})
    if "decoding" in section.info.keys:
        section = section.model_copy(update={"decoding": "argmax"})
    model = _load_base(source, BaseInfo(name, None if base else info.revision, info.task_type), task, labels, header)
    if model.kind == KINDS["embedding"] and section.info.complete:  # pooled, normalised and prompted as the base says
        section = resolve_name(section.info.complete)(section, model.layout, [Example("", pair="")])
    labels = labels or (_own_labels(model) if section.info.names_labels else ())
    _check_nothing_random(source, model, header)
    config = load_adapter(model.model, source)
    with atomic_folder(out) as folder:
        save_adapter(model.model, folder, config, BaseInfo(name, model.revision, model.kind.peft_task_type))
        model.tokenizer.save_pretrained(folder)
        side = Side(
            task=section,
            labels=labels,
            max_length=model.max_length,
            base=Base.of(name, model.revision, model.fingerprint),
            dtype="fp32",
            method="lora" if config.target_modules else "head",
            pooling=model.pooling,
            columns=Columns(pair=pair),
            versions=versions(),
        )
        write_side(folder, side)
    counts = count_parameters(model.model)
    names = config.target_modules
    targets = names if isinstance(names, str) else ", ".join(sorted(names))
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    lines = [
        f"base: {model.name}, sha256 {model.fingerprint.weights[:12]}...; predictions will refuse any other base",
        f"task: {task} (task_type {info.task_type})",
        f"adapter: {kind}, r {config.r}, alpha {config.lora_alpha:g}, over {targets or 'no layer'}; {counts.lora:,} parameters",
        f"trained in full: {', '.join(config.modules_to_save) or 'nothing'}; {counts.saved:,} parameters",
        *([f"labels: {', '.join(labels)}"] if labels else []),
    ]
    if any(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        lines.append("the labels are only numbered; name them with --labels")
    return lines


def _load_base(
    source: Path, info: BaseInfo, task: str, labels: tuple[str, ...], header: Mapping[str, TensorInfo]
) -> BaseModel:
    """The base model with an output for each label: the given ones, else those of its own config."""
    from lorakit.models import load_base
    from lorakit.task_info import TASKS

    name, revision, kind = str(info.name_or_path), info.revision, TASKS[task].model_kind
    if kind == "embedding":
        return load_base(name, kind, revision=revision, pooling="auto")
    if kind == "text2text":
        if not labels:
            raise ConfigError(f"{source}: name the entity types that the adapter writes with --labels PER,LOC,...")
        return load_base(name, kind, revision=revision)
    if "order" in TASKS[task].keys and not labels:
        raise ConfigError(f"{source}: name the labels from lowest to highest with --labels 1,2,3,...")
    base = load_base(
        name,
        kind,
        labels=TASKS[task].outputs(labels),
        revision=revision,
        pooling="mean" if info.task_type == MEAN else "cls",
    )
    known = TASKS[task].outputs(labels) or _own_labels(base)
    outputs = next((info.shape[0] for key, info in header.items() if HEAD.fullmatch(key)), None)  # of its own head
    if outputs is not None and len(known) != outputs:
        whose = "--labels has" if labels else f"{name} names"
        raise ConfigError(
            f"{source}: its head has {outputs} labels, {whose} {len(known)} ({', '.join(known[:5])}); "
            f"pass {outputs} with --labels, in the order of the head's rows"
        )
    return base


def _own_labels(base: BaseModel) -> tuple[str, ...]:
    names: Mapping[int, str] = getattr(base.model.config, "id2label", None) or {}
    return tuple(names[i] for i in sorted(names))


def _check_nothing_random(source: Path, base: BaseModel, header: Mapping[str, TensorInfo]) -> None:
    """Raise where neither the base's checkpoint nor the adapter has a layer of the model: it would answer at random."""
    from lorakit.lora.peft_files import PREFIX

    brought = {key.removeprefix(PREFIX) for key in header}
    if random := sorted(set(base.missing) - brought):
        raise AdapterError(
            f"{source}: neither the adapter nor {base.name} has {random[0]}"
            f"{f' and {len(random) - 1} more tensors' if len(random) > 1 else ''}, so answers would be random; "
            "pass the base it was trained on with --base"
        )
