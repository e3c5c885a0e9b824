"""`lorakit inspect`: what is in a model, a run or an adapter, and what a recipe would train."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from lorakit.app.arguments import Change
from lorakit.app.printing import Output, begin
from lorakit.errors import AdapterError, ModelError, OutputError, first_line

if TYPE_CHECKING:
    from lorakit.lora import LoraConfig
    from lorakit.recipe import Recipe
    from lorakit.runtime.events import Report
    from lorakit.training.prepare import Prepared


@click.command()
@click.argument("what")
@click.argument("changes", type=Change(), nargs=-1, metavar="[KEY=VALUE ...]")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def inspect(what: str, changes: tuple[str, ...], as_json: bool) -> None:
    """Show what is in a MODEL or RUN, or what a RECIPE would train.

    Prints one line for each adapted layer: the module, the pattern it matched, rank, alpha and parameters.
    """
    from lorakit.recipe import read_recipe, recipe_file

    if recipe := recipe_file(what):
        begin(f"reading {what}")
        output = inspect_recipe(read_recipe(recipe, changes))
    else:
        path = Path(what)
        if (path / "adapter").is_dir() or (path / "lorakit.json").is_file() or (path / "scores.json").is_file():
            output = inspect_run(path)
        else:
            output = inspect_adapter(path) if (path / "adapter_config.json").is_file() else inspect_model(what)
    output.show(as_json)


class Row(NamedTuple):
    """A line of the table of adapted layers."""

    module: str
    matched_by: str
    r: int
    alpha: float
    parameters: int


def inspect_recipe(recipe: Recipe, report: Report | None = None, *, is_brief: bool = False) -> Output:
    """What a recipe would train: its model is loaded, its data are read, nothing is written.

    `is_brief` is for `train --dry-run`: instead of every key and layer their sums, and a time measured over two steps.
    """
    from lorakit.app.trackers import check_trackers
    from lorakit.lora.layers import hosts
    from lorakit.runtime.events import ignore
    from lorakit.training.prepare import prepare

    check_trackers(recipe)
    prepared = prepare(recipe, report or ignore)
    adapters = {path: host.get_submodule("adapters") for path, host in hosts(prepared.model)}
    rows = [
        Row(t.path, t.matched_by, t.r, t.alpha, sum(p.numel() for p in adapters[t.path].parameters()))
        for t in prepared.targets
    ]
    counts, plan, folds = prepared.parameters, prepared.plan, prepared.n_folds
    whole = ", ".join(prepared.config.modules_to_save) if prepared.config else "everything"
    lines = [
        recipe.to_toml(),
        *(_table(rows) if rows else [f"no LoRA layers: train.method = {recipe.train.method!r}"]),
        "",
        f"trained in full: {whole or 'nothing'}",
        f"parameters: {counts.trainable:,} trained ({counts.lora:,} LoRA, {counts.saved:,} in whole modules) "
        f"of {counts.total:,} ({counts.trainable / counts.total:.2%})",
        f"examples: {', '.join(f'{len(part.examples):,} {name}' for name, part in prepared.parts.items())}"
        f"{f' (the same, in {folds} folds)' if folds else ''}; "
        f"labels: {len(prepared.labels)}",
        f"steps: {plan.steps} ({plan.steps_per_epoch} an epoch), base in {str(prepared.dtype).removeprefix('torch.')}"
        f"{_quantized(recipe.model.quantize)}",
        f"kernels: {'; '.join(prepared.kernels) or 'plain'}",
    ]
    if is_brief:
        kinds = Counter(row.module.rpartition(".")[2] for row in rows)
        names = ", ".join(f"{name} x{n}" for name, n in kinds.items())
        config = plan.config
        lines = [
            f"{recipe.model.base} on {recipe.data.train}: {recipe.task.name.replace('_', ' ')}",
            *lines[-3:-2],
            f"adapted: {names} (r {recipe.lora.r}, alpha {recipe.lora.alpha:g})" if rows else "no LoRA layers",
            *lines[-5:-3],
            f"{lines[-2]}, {config.batch_size} examples each, lr {config.lr:g}",
            f"time: {_time_of(prepared)}",
            f"run folder: {recipe.output.dir}",
            "for every key and every layer, add --json",
        ]
    facts = {
        "recipe": recipe.model_dump(mode="json"),
        "targets": [row._asdict() for row in rows],
        "parameters": {**counts._asdict(), "trainable": counts.trainable},
        "steps": plan.steps,
    }
    return Output(lines, facts)


def _time_of(prepared: Prepared) -> str:
    """About how long training takes on this machine, from its second step."""
    from lorakit.app.report.page import duration
    from lorakit.training.loop import train
    from lorakit.training.run import member_of

    member = member_of(prepared)
    clock, steps = time.perf_counter(), train(prepared.model, [member])
    for _, step in zip(range(min(2, prepared.plan.steps)), steps, strict=False):
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        rate = step[member].tokens / seconds
    plan = prepared.plan
    passes = prepared.n_folds or 1  # each of n folds reads n - 1 of n parts, and what ships reads all
    tokens = passes * sum(plan.lengths) * plan.steps / plan.steps_per_epoch
    return f"about {duration(tokens / rate)} for the steps on this machine, plus evaluations"


def _table(rows: Sequence[Row]) -> list[str]:
    """One line a layer: module, what matched it, rank, alpha, parameters."""
    by = ["its whole path" if row.matched_by == row.module else row.matched_by for row in rows]
    width = max(len("module"), *(len(row.module) for row in rows))
    by_width = max(len("matched by"), *map(len, by))
    return [
        f"{'module':<{width}}  {'matched by':<{by_width}}    r  alpha  parameters",
        *(
            f"{row.module:<{width}}  {matched:<{by_width}}  {row.r:>3}  {row.alpha:>5g}  {row.parameters:>10,}"
            for row, matched in zip(rows, by, strict=True)
        ),
    ]


def _quantized(form: str) -> str:
    return "" if form == "none" else f", its linear layers in {form}"


def inspect_run(path: Path) -> Output:
    """What a run folder or an adapter folder holds; the base model is not needed."""
    from lorakit.app.console import score_lines
    from lorakit.hashing import read_object
    from lorakit.inference.adapter_folder import read_side, shipped_folder
    from lorakit.inference.side import MOST_BYTES

    folder = shipped_folder(path)
    side = read_side(folder)
    base = side.base
    lines = [
        f"folder: {folder}",
        f"task: {side.task.name}" + (f", {len(side.labels)} labels: {', '.join(side.labels)}" if side.labels else ""),
        f"base: {base.name}{f' at {base.revision}' if base.revision else ''}, sha256 {base.sha256[:12]}..., "
        f"{side.dtype}{_quantized(side.quantize)}",
        f"method: {side.method}, at most {side.max_length} tokens"
        + (", read by their mean" if side.pooling == "mean" else ""),
    ]
    facts = side.model_dump(exclude={"files", "scores", "versions", "combined"})
    names = {"base": base.name, "revision": base.revision, "base_sha256": base.sha256}
    output = Output(lines, {"folder": str(folder), **facts, **names})
    if side.method != "full":
        output = output.plus(inspect_adapter(folder))
    scores = path / "scores.json"
    if scores.is_file():
        try:
            values = read_object(scores, MOST_BYTES)
            return output.plus(Output(score_lines(values), {"scores": values}))
        except OSError as err:
            raise OutputError(f"{scores}: cannot be read: {err.strerror}") from err
        except (ArithmeticError, AttributeError, IndexError, LookupError, TypeError, ValueError) as err:
            raise OutputError(f"{scores}: damaged: {first_line(err)}") from err
    return output


def inspect_adapter(folder: Path) -> Output:
    """The table of peft's two files, read from the tensors' header alone: neither a tensor nor a base is loaded."""
    from lorakit.lora import read_adapter_config
    from lorakit.lora.peft_files import PREFIX, WEIGHTS_FILE, read_header

    config, info = read_adapter_config(folder)
    shapes = {key.removeprefix(PREFIX): tensor.shape for key, tensor in read_header(folder / WEIGHTS_FILE).items()}
    ranks = {factor[1]: shape[0] for key, shape in shapes.items() if (factor := FACTOR_A.fullmatch(key))}
    counts: Counter[str] = Counter()
    whole = {}
    for key, shape in shapes.items():
        update = OF_UPDATE.fullmatch(key)
        if update and update[1] in ranks:
            counts[update[1]] += math.prod(shape)
        else:
            whole[key] = math.prod(shape)
    rows = [Row(path, _matched_by(path, config), r, _alpha(path, config), counts[path]) for path, r in ranks.items()]
    rows.sort(
        key=lambda row: [(part.isdigit(), int(part) if part.isdigit() else part) for part in row.module.split(".")]
    )
    lora = counts.total()
    facts = {
        "base": info.name_or_path,
        "task_type": info.task_type,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "targets": [row._asdict() for row in rows],
        "whole": whole,
        "parameters": {"lora": lora, "saved": sum(whole.values())},
    }
    names = config.target_modules
    if not isinstance(names, str):
        kinds = Counter(name.rpartition(".")[2] for name in names)
        names = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in kinds.items())
    kind = " ".join(["rsLoRA"] * config.use_rslora + ["DoRA"] * config.use_dora) or "LoRA"
    modules = sorted({key.rpartition(".")[0] for key in whole})
    lines = [
        f"adapter: {kind}, r {config.r}, alpha {config.lora_alpha:g}, {names}",
        *(["", *_table(rows)] if rows else []),
        "",
        f"trained in full: {', '.join(modules) or 'nothing'}",
        f"parameters: {lora:,} LoRA, {sum(whole.values()):,} in whole modules",
    ]
    return Output(lines, facts)


FACTOR_A = re.compile(r"(.*)\.(lora_A\.weight|lora_embedding_A)")
OF_UPDATE = re.compile(r"(.*)\.(lora_.*|base_layer\.bias)")


def _matched_by(path: str, config: LoraConfig) -> str:
    """The entry of target_modules that chose this layer."""
    from lorakit.lora.targets import has_suffix

    names = config.target_modules
    return names if isinstance(names, str) else next((name for name in names if has_suffix(path, name)), "?")


def _alpha(path: str, config: LoraConfig) -> float:
    """The layer's own alpha: that of the first pattern which matches it, as peft reads it."""
    from lorakit.lora.safe_regex import Pattern
    from lorakit.lora.targets import suffix_pattern

    for name, alpha in config.alpha_pattern.items():
        try:
            if Pattern(suffix_pattern(name)).fullmatch(path):
                return alpha
        except re.error as err:
            raise AdapterError(f"alpha_pattern: {name[:80]!r} cannot be used: {err}") from err
    return config.lora_alpha


def inspect_model(name: str) -> Output:
    """The linear layers of a base model by name, which are the names for lora.target_modules."""
    from lorakit.lora import linear_layers
    from lorakit.lora.weight_layouts import matrix_shape
    from lorakit.models import load_base

    try:
        model = load_base(name, "sequence_classification", labels=("0", "1"), pooling="auto").model
    except ModelError:
        model = load_base(name, "text2text").model
    kinds = Counter((path.rpartition(".")[2], *matrix_shape(layer)) for path, layer in linear_layers(model).items())
    total = sum(p.numel() for p in model.parameters())
    lines = [f"{name}: {type(model).__name__}, {total:,} parameters, {kinds.total()} linear layers"]
    lines += [f"  {kind:<14} x{n:<3} {d_in} -> {d_out}" for (kind, d_out, d_in), n in kinds.items()]
    linear = [{"name": kind, "count": n, "d_in": d_in, "d_out": d_out} for (kind, d_out, d_in), n in kinds.items()]
    return Output(lines, {"model": name, "class": type(model).__name__, "parameters": total, "linear": linear})
