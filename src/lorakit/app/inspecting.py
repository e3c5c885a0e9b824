"""What `lorakit inspect` and `train --dry-run` show."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lorakit.app.console import score_lines
from lorakit.app.printing import Output
from lorakit.app.trackers import check_trackers
from lorakit.errors import AdapterError, ModelError, OutputError, first_line
from lorakit.hashing import read_object
from lorakit.inference.adapter_folder import read_side, shipped_folder
from lorakit.inference.side import MOST_BYTES
from lorakit.lora import LoraConfig, linear_layers, read_adapter_config
from lorakit.lora.layers import hosts
from lorakit.lora.peft_files import PREFIX, WEIGHTS_FILE, read_header
from lorakit.lora.safe_regex import Pattern
from lorakit.lora.targets import has_suffix, suffix_pattern
from lorakit.lora.weight_layouts import matrix_shape
from lorakit.models import load_base
from lorakit.recipe import Recipe
from lorakit.runtime.events import Report, ignore
from lorakit.training.prepare import Prepared, prepare


class Row(NamedTuple):
    """A line of the targeting table."""

    module: str
    matched_by: str
    r: int
    alpha: float
    parameters: int


def inspect_path(what: str) -> Output:
    """A run, an adapter or a model, told apart by what is there."""
    path = Path(what)
    if (path / "adapter").is_dir() or (path / "lorakit.json").is_file() or (path / "scores.json").is_file():
        return inspect_run(path)
    if (path / "adapter_config.json").is_file():
        return inspect_adapter(path)
    return inspect_model(what)


def inspect_recipe(recipe: Recipe, report: Report = ignore) -> Output:
    """What a recipe would train."""
    check_trackers(recipe)
    prepared = prepare(recipe, report)
    rows = target_rows(prepared)
    table = table_lines(rows) if rows else [f"no LoRA layers: train.method = {recipe.train.method!r}"]
    counts = prepared.parameters
    facts = {
        "recipe": recipe.model_dump(mode="json"),
        "targets": [row._asdict() for row in rows],
        "parameters": {**counts._asdict(), "trainable": counts.trainable},
        "steps": prepared.plan.steps,
    }
    return Output([recipe.to_toml(), *table, *size_lines(prepared)], facts)


def target_rows(prepared: Prepared) -> list[Row]:
    """A row for each layer that the recipe adapts."""
    layers = dict(hosts(prepared.model))
    return [
        Row(target.path, target.matched_by, target.r, target.alpha, _trained(layers[target.path]))
        for target in prepared.targets
    ]


def _trained(host: nn.Module) -> int:
    return sum(p.numel() for p in host.get_submodule("adapters").parameters())


def table_lines(rows: Sequence[Row]) -> list[str]:
    """One line a layer: module, what matched it, rank, alpha, parameters."""
    width = max(len("module"), *(len(row.module) for row in rows))
    by = {row: "its whole path" if row.matched_by == row.module else row.matched_by for row in rows}
    by_width = max(len("matched by"), *map(len, by.values()))
    lines = [f"{'module':<{width}}  {'matched by':<{by_width}}    r  alpha  parameters"]
    for row in rows:
        lines.append(
            f"{row.module:<{width}}  {by[row]:<{by_width}}  {row.r:>3}  {row.alpha:>5g}  {row.parameters:>10,}"
        )
    return lines


def size_lines(prepared: Prepared) -> list[str]:
    """Parameters, examples and steps."""
    counts, plan = prepared.parameters, prepared.plan
    saved = ", ".join(prepared.config.modules_to_save) if prepared.config else "everything"
    sizes = ", ".join(f"{len(part.examples):,} {name}" for name, part in prepared.parts.items())
    return [
        "",
        f"trained in full: {saved or 'nothing'}",
        f"parameters: {counts.trainable:,} trained ({counts.lora:,} LoRA, {counts.saved:,} in whole modules) "
        f"of {counts.total:,} ({counts.trainable / counts.total:.2%})",
        f"examples: {sizes}; labels: {len(prepared.task.labels)}",
        f"steps: {plan.steps} ({plan.steps_per_epoch} an epoch), base in {str(prepared.dtype).removeprefix('torch.')}"
        f"{_quantized(prepared.recipe.model.quantize)}",
        f"kernels: {prepared.kernels}",
    ]


def _quantized(format: str) -> str:
    return "" if format == "none" else f", its linear layers in {format}"


def inspect_run(path: Path) -> Output:
    """What a run folder or an adapter folder holds; the base model is not needed."""
    folder = shipped_folder(path)
    side = read_side(folder)
    lines = [
        f"folder: {folder}",
        f"task: {side.task.name}" + (f", {len(side.labels)} labels: {', '.join(side.labels)}" if side.labels else ""),
        f"base: {side.base.name}{f' at {side.base.revision}' if side.base.revision else ''}, "
        f"sha256 {side.base.sha256[:12]}..., "
        f"{side.dtype}{_quantized(side.quantize)}",
        f"method: {side.method}, at most {side.max_length} tokens",
    ]
    facts: dict[str, Any] = {
        "folder": str(folder),
        **side.model_dump(exclude={"files", "scores", "versions", "combined"}),
        "base": side.base.name,
        "revision": side.base.revision,
        "base_sha256": side.base.sha256,
    }
    if side.method != "full":
        more = inspect_adapter(folder)
        lines, facts = [*lines, *more.lines], {**facts, **more.facts}
    scores = path / "scores.json"
    if scores.is_file():
        try:
            facts["scores"] = read_object(scores, MOST_BYTES)
            lines += score_lines(facts["scores"])
        except OSError as err:
            raise OutputError(f"{scores}: cannot be read: {err.strerror}") from err
        except (ArithmeticError, AttributeError, IndexError, LookupError, TypeError, ValueError) as err:
            raise OutputError(f"{scores}: damaged: {first_line(err)}") from err
    return Output(lines, facts)


def inspect_adapter(folder: Path) -> Output:
    """The targeting table of peft's two files, told from the file's header alone: no tensor and no base is loaded."""
    config, info = read_adapter_config(folder)
    sizes = {key.removeprefix(PREFIX): found.shape for key, found in read_header(folder / WEIGHTS_FILE).items()}
    rows = []
    for key, shape in sizes.items():
        path = re.sub(r"\.(lora_A\.weight|lora_embedding_A)$", "", key)
        if path != key:
            count = sum(math.prod(size) for other, size in sizes.items() if _is_of(other, path))
            rows.append(Row(path, _matched_by(path, config), shape[0], _alpha(path, config), count))
    rows.sort(
        key=lambda row: [(part.isdigit(), int(part) if part.isdigit() else part) for part in row.module.split(".")]
    )
    whole = {key: math.prod(size) for key, size in sizes.items() if not any(_is_of(key, row.module) for row in rows)}
    lora = sum(row.parameters for row in rows)
    facts = {
        "base": info.name_or_path,
        "task_type": info.task_type,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "targets": [row._asdict() for row in rows],
        "whole": whole,
        "parameters": {"lora": lora, "saved": sum(whole.values())},
    }
    kind = " ".join(["rsLoRA"] * config.use_rslora + ["DoRA"] * config.use_dora) or "LoRA"
    lines = [f"adapter: {kind}, r {config.r}, alpha {config.lora_alpha:g}, {_shortened(config.target_modules)}"]
    lines += ["", *table_lines(rows)] if rows else []
    modules = sorted({key.rpartition(".")[0] for key in whole})
    lines += ["", f"trained in full: {', '.join(modules) or 'nothing'}"]
    lines.append(f"parameters: {lora:,} LoRA, {sum(whole.values()):,} in whole modules")
    return Output(lines, facts)


OF_UPDATE = re.compile(r"(lora_|base_layer\.bias)")


def _is_of(key: str, path: str) -> bool:
    """Whether a tensor belongs to the update at this path."""
    return key.startswith(f"{path}.") and OF_UPDATE.match(key[len(path) + 1 :]) is not None


def _matched_by(path: str, config: LoraConfig) -> str:
    """The entry of target_modules that chose this layer."""
    names = config.target_modules
    return names if isinstance(names, str) else next((name for name in names if has_suffix(path, name)), "?")


def _alpha(path: str, config: LoraConfig) -> float:
    """The layer's own alpha: that of the first pattern which matches it, as peft reads it."""
    for name, alpha in config.alpha_pattern.items():
        try:
            if Pattern(suffix_pattern(name)).fullmatch(path):
                return alpha
        except re.error as err:
            raise AdapterError(f"alpha_pattern: {name[:80]!r} cannot be used: {err}") from err
    return config.lora_alpha


def _shortened(names: str | tuple[str, ...]) -> str:
    if isinstance(names, str):
        return names
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{name} x{n}" if n > 1 else name for name, n in kinds.items())


def inspect_model(name: str) -> Output:
    """The linear layers of a base model by name, which are the names for lora.target_modules."""
    try:
        model = load_base(name, "sequence_classification", labels=("0", "1")).model
    except ModelError:
        model = load_base(name, "text2text").model
    kinds = Counter((path.rpartition(".")[2], *matrix_shape(layer)) for path, layer in linear_layers(model).items())
    total = sum(p.numel() for p in model.parameters())
    lines = [f"{name}: {type(model).__name__}, {total:,} parameters, {sum(kinds.values())} linear layers"]
    lines += [f"  {kind:<14} x{n:<3} {d_in} -> {d_out}" for (kind, d_out, d_in), n in kinds.items()]
    facts = {
        "model": name,
        "class": type(model).__name__,
        "parameters": total,
        "linear": [
            {"name": kind, "count": n, "d_in": d_in, "d_out": d_out} for (kind, d_out, d_in), n in kinds.items()
        ],
    }
    return Output(lines, facts)
