"""`lorakit combine`: one adapter from several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import BaseModel

from lorakit.app.arguments import RUN, check_free
from lorakit.app.printing import Output
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lorakit.inference.side import Side

INTO = "combined"
SAME = ("task", "labels", "quantize", "max_length", "dtype")  # of the adapters


def _weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(word) for word in text.split(","))
    except ValueError as err:
        raise click.BadParameter(f"{text!r}: numbers with commas, for example 0.7,0.3") from err


@click.command()
@click.argument("runs", type=RUN, nargs=-1, metavar="RUN RUN [RUN ...]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write the adapter to. Default: only print.")
@click.option("--weights", callback=_weights, metavar="W,W,...", help="A weight for each run. Default: equal weights.")
@click.option("--method", default="linear", show_default=True, help="linear, ties, dare, dare_ties, magnitude_prune.")
@click.option("--density", type=float, help="Share of entries to keep, for all methods except linear.")
@click.option("--rank", type=click.IntRange(min=1), help="Approximate the result at this rank. Default: exact.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for dare's random drops.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--allow-base-mismatch", is_flag=True, help="Load adapters onto a base model they were not trained on.")
def combine(
    runs: tuple[Path, ...], out: Path | None, weights: tuple[float, ...] | None, as_json: bool, **options: Any
) -> None:
    """Combine RUNs into one adapter: a weighted sum, TIES or DARE.

    They must have the same task and base model.

    \b
    lorakit combine runs/a runs/b --weights 0.7,0.3 --out runs/ab
    lorakit compare runs/a runs/ab --on validation.csv
    """
    way = Way(options["method"], options["density"], options["rank"], options["seed"])
    combine_runs(runs, weights, way, out, allow_base_mismatch=options["allow_base_mismatch"]).show(as_json)


@dataclass(frozen=True)
class Way:
    """How adapters are combined, apart from their weights; see `lorakit.lora.combine`."""

    method: str = "linear"
    density: float | None = None
    r: int | None = None
    seed: int = 0


def combine_runs(
    runs: Sequence[Path],
    weights: Sequence[float] | None = None,
    way: Way = Way(),
    out: Path | None = None,
    *,
    allow_base_mismatch: bool = False,
) -> Output:
    """Combine runs, by their mean where no weights are given, into an adapter folder that records its parts.

    Raises:
        ConfigError: the adapters cannot be combined.
        OutputError: `out` exists or cannot be written.
    """
    from lorakit.inference.adapter_folder import load_shipped, read_side, shipped_folder, write_side
    from lorakit.lora import combine, load_adapter, read_adapter_config, rename_adapter, save_adapter
    from lorakit.runtime.device import DTYPES, cast_frozen_, pick_device
    from lorakit.runtime.files import atomic_folder

    if out is not None:
        check_free(out)
    weights = list(weights) if weights is not None else [1 / max(1, len(runs))] * len(runs)
    if len(weights) != len(runs):
        raise ConfigError(f"--weights: {len(weights)} weights for {len(runs)} runs")
    if runs and not any(weights):
        raise ConfigError("--weights: all weights are 0")
    if len(runs) < 2:
        raise ConfigError("combine takes at least two runs")
    folders = [shipped_folder(run) for run in runs]
    sides = [read_side(folder) for folder in folders]
    _check_alike(runs, sides)
    # what was tuned on a run's answers does not hold for the combination; the units of numbers belong to the heads
    units = dict(sides[0].tuned) if sides[0].task.info.wants == "number" else {}
    base = load_shipped(folders[0], sides[0], allow_base_mismatch=allow_base_mismatch)
    names = [f"a{i}" for i in range(len(runs))]
    rename_adapter(base.model, "default", names[0])
    for folder, side, name in zip(folders[1:], sides[1:], names[1:], strict=True):
        load_adapter(base.model, folder, name)
        if units:
            _convert_units(base.model, name, side.tuned, units)
    cast_frozen_(base.model, DTYPES[sides[0].dtype])
    base.model.to(pick_device()).eval()
    shares = {name: weight for name, weight in zip(names, weights, strict=True) if weight}  # 0 adds nothing to the rank
    made = combine(base.model, list(shares), list(shares.values()), INTO, **asdict(way))
    if out is not None:
        parts = {"runs": [str(run) for run in runs], "weights": weights, **asdict(way)}
        data = {name: sha256 for side in sides for name, sha256 in side.data.items()}
        side = sides[0].model_copy(update={"tuned": units, "scores": {}, "data": data, "combined": parts})
        with atomic_folder(out) as folder:
            save_adapter(base.model, folder, made.config, read_adapter_config(folders[0])[1], INTO)
            base.tokenizer.save_pretrained(folder)
            write_side(folder, side)
    error = max(made.errors.values(), default=0.0)  # of a layer, where a rank was cut
    cut = f", at most {error:.1%} of a layer's update lost" if error else ""
    lines = [f"combined adapter: r {made.r}{cut}", *([f"adapter: {out}"] if out else [])]
    return Output(lines, {"out": out and str(out), "weights": weights, "r": made.r, "largest_error": error})


def _convert_units(model: nn.Module, adapter: str, units: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Let an adapter's head for numbers, which answers (y - mean) / spread, do so in the units of another one."""
    from torch import nn

    from lorakit.lora import SavedModule, hosts

    saved = [host.adapters[adapter] for _, host in hosts(model) if isinstance(host, SavedModule)]
    head = [layer for module in saved for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    scale = units["spread"] / target["spread"]
    head.weight.data.mul_(scale)
    head.bias.data.mul_(scale).add_((units["mean"] - target["mean"]) / target["spread"])


def _check_alike(runs: Sequence[Path], sides: Sequence[Side]) -> None:
    for run, side in zip(runs, sides, strict=True):
        if side.method == "full":
            raise ConfigError(f"{run}: fully fine-tuned: it has no adapter to combine")
        for key in SAME:
            ours, theirs = getattr(sides[0], key), getattr(side, key)
            if isinstance(ours, BaseModel) and ours != theirs:  # name the setting, rather than print the whole section
                unequal = ((f"{key}.{name}", a, b) for (name, a), (_, b) in zip(ours, theirs, strict=True) if a != b)
                key, ours, theirs = next(unequal)
            if ours != theirs:
                raise ConfigError(
                    f"{run}: its {key} is {theirs!r}, but that of {runs[0]} is {ours!r}; only adapters with the same "
                    "task and base can be combined"
                )
        if differences := sides[0].base.fingerprint.differences(side.base.fingerprint):
            raise ConfigError(f"{run}: trained on a different base than {runs[0]}: {'; '.join(differences)}")
