"""`lorakit export` and `merge`: a run's model or adapter in the form that another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lorakit.app.arguments import ALLOW_MISMATCH, RUN, check_free, folder_to_write
from lorakit.app.printing import Output, begin
from lorakit.errors import ConfigError

WHOLE = ("merged", "sentence-transformers", "onnx")  # what gets a whole model; the others are export_profiles.PROFILES
CONSUMERS = ("peft", *WHOLE, "vllm", "llamacpp")


@click.command()
@click.argument("run", type=RUN)
@click.option("--to", type=click.Choice(CONSUMERS), required=True, help="The program that will read it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--int8", is_flag=True, help="With onnx: also write an 8-bit model, and print how much it differs.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Approximate updates of higher rank (such as DoRA's) at this rank, with SVD.",
)
@click.option("--base-name", metavar="ID", help="The base model's name in that program. Default: as in training.")
@click.option("--dry-run", is_flag=True, help="Export and check, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was checked as JSON.")
@ALLOW_MISMATCH
def export(run: Path, to: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write RUN's model or adapter in another program's format.

    Lists what changed, and checks the result.

    \b
    peft      the adapter unchanged, for peft and programs built on it
    merged    a plain transformers model with the adapter merged
    sentence-transformers
              the same, for an embedding model, or a classifier that reads the mean over tokens
    onnx      the same, for onnxruntime without torch
    vllm, llamacpp
              factors A and B with one global alpha / r; the head in a separate file
    """
    begin(f"exporting {run}")
    with folder_to_write(out, dry_run) as place:
        lines, facts = export_run(run, to, place, **options)
    end = [] if dry_run else [f"exported for {to}: {out}"]
    Output([*lines, *end], {"to": to, "out": None if dry_run else str(out), "said": lines, **facts}).show(as_json)


def export_run(
    path: Path,
    to: str,
    out: Path,
    *,
    rank: int | None = None,
    base_name: str | None = None,
    int8: bool = False,
    allow_base_mismatch: bool = False,
) -> Output:
    """Write what the reader `to` takes of a run folder or an adapter folder; lines say what was changed.

    Raises:
        OutputError: `out` exists or cannot be written; nothing is left half written.
        AdapterError: the reader cannot use such an adapter.
    """
    if to in WHOLE and (rank is not None or base_name is not None):
        raise ConfigError(f"--rank and --base-name only work with adapters, not with --to {to}")
    if int8 and to != "onnx":
        raise ConfigError(f"--int8 only works with --to onnx, not with --to {to}")
    check_free(out)
    from lorakit.app.export.adapters import export_adapter, left_out, merge  # after mistakes in options: needs torch
    from lorakit.app.export.onnx import export_onnx
    from lorakit.inference.adapter_folder import read_side, shipped_folder

    if to not in WHOLE:
        return export_adapter(path, to, out, rank=rank, base_name=base_name, allow_base_mismatch=allow_base_mismatch)
    side = read_side(shipped_folder(path))
    if to == "sentence-transformers" and side.pooling != "mean" and side.task.info.wants != "related":
        raise ConfigError(
            f"--to {to}: {path} does not read the mean over tokens; use --to merged, or train with model.pooling=mean"
        )
    if to == "onnx":
        onnx = export_onnx(path, out, int8=int8, allow_base_mismatch=allow_base_mismatch)
        return Output(left_out(side), {}).plus(onnx)
    return merge(path, out, allow_base_mismatch=allow_base_mismatch)


@click.command()
@click.argument("run", type=RUN)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; must not exist.")
@click.option("--dry-run", is_flag=True, help="Merge and check, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was checked as JSON.")
@ALLOW_MISMATCH
def merge(run: Path, out: Path, dry_run: bool, as_json: bool, allow_base_mismatch: bool) -> None:
    """Merge RUN's adapter into its base: a plain transformers folder.

    The folder can be used without lorakit.
    """
    begin(f"merging {run}")
    with folder_to_write(out, dry_run) as place:
        lines, facts = export_run(run, "merged", place, allow_base_mismatch=allow_base_mismatch)
    end = [] if dry_run else [f"merged model: {out}"]
    Output([*lines, *end], {"merged": None if dry_run else str(out), "said": lines, **facts}).show(as_json)
