"""What `lorakit inspect` and `train --dry-run` show."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from lorakit.app.console import score_lines
from lorakit.engine.adapter import read_side, shipped_folder
from lorakit.engine.events import Report, ignore
from lorakit.engine.prepare import Prepared, prepare
from lorakit.errors import ModelError
from lorakit.lora import linear_layers, read_adapter_config
from lorakit.lora.geometry import matrix_shape
from lorakit.lora.layer import AdapterHost
from lorakit.models import load_base
from lorakit.recipe import Recipe


def recipe_lines(recipe: Recipe, report: Report = ignore) -> list[str]:
    """The resolved recipe, the targeting table, and the size of the run."""
    prepared = prepare(recipe, report)
    return [recipe.to_toml(), *target_lines(prepared), *size_lines(prepared)]


def target_lines(prepared: Prepared) -> list[str]:
    """One line a target: module, what matched it, rank, alpha, parameters."""
    if not prepared.targets:
        return [f"no LoRA layers: train.method = {prepared.recipe.train.method!r}"]
    width = max(len(target.path) for target in prepared.targets)
    lines = [f"{'module':<{width}}  matched by      r  alpha  parameters"]
    for path, by, r, alpha, _ in prepared.targets:
        host = prepared.model.get_submodule(path)
        assert isinstance(host, AdapterHost)
        count = sum(parameter.numel() for parameter in host.adapters.parameters())
        lines.append(f"{path:<{width}}  {by[:14]:<14} {r:>2}  {alpha:>5g}  {count:>10,}")
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
        f"steps: {plan.steps} ({plan.steps_per_epoch} an epoch), base in {str(prepared.dtype).removeprefix('torch.')}",
    ]


def run_lines(path: Path) -> list[str]:
    """What a run folder or an adapter folder holds."""
    folder = shipped_folder(path)
    side = read_side(folder)
    lines = [
        f"folder: {folder}",
        f"task: {side.task.name}, {len(side.labels)} labels: {', '.join(side.labels)}",
        f"base: {side.base}{f' at {side.revision}' if side.revision else ''}, sha256 {side.base_sha256[:12]}..., {side.dtype}",
        f"method: {side.method}, at most {side.max_length} tokens",
    ]
    if side.method != "full":
        config, _ = read_adapter_config(folder)
        lines.append(f"adapter: r {config.r}, alpha {config.lora_alpha:g}, {_shortened(config.target_modules)}")
    scores = path / "scores.json"
    if scores.is_file():
        lines += score_lines(json.loads(scores.read_text(encoding="utf-8")))
    return lines


def _shortened(names: str | tuple[str, ...]) -> str:
    if isinstance(names, str):
        return names
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{name} x{n}" if n > 1 else name for name, n in kinds.items())


def model_lines(name: str) -> list[str]:
    """The linear layers of a base model by name, which are the names for lora.target_modules."""
    try:
        model = load_base(name, "sequence_classification", labels=("0", "1")).model
    except ModelError:
        model = load_base(name, "text2text").model
    kinds = Counter((path.rpartition(".")[2], *matrix_shape(layer)) for path, layer in linear_layers(model).items())
    total = sum(p.numel() for p in model.parameters())
    lines = [f"{name}: {type(model).__name__}, {total:,} parameters, {sum(kinds.values())} linear layers"]
    lines += [f"  {kind:<14} x{n:<3} {d_in} -> {d_out}" for (kind, d_out, d_in), n in kinds.items()]
    return lines
