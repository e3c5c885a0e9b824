"""Whether a checkpoint belongs to the run that is to go on from it; what may differ is listed, and told."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit.digest import Fingerprint
from lorakit.engine.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from lorakit.engine.prepare import Prepared
from lorakit.engine.run_folder import CHECKPOINTS
from lorakit.errors import ConfigError
from lorakit.models import versions
from lorakit.recipe import Recipe, make_recipe
from lorakit.runtime.events import Note, Report

# Keys that a resumed run may change: no number of the steps done, or of those to come, depends on them.
MAY_CHANGE = (
    *("output.dir", "output.trackers", "output.project"),
    *("data.test", "train.checkpoint_every", "train.non_finite"),
)


def find_checkpoint(folder: Path, where: str, report: Report) -> Checkpoint | None:
    """The checkpoint to go on from: `auto` is the newest whole one of the run folder, None where there is none yet.

    Raises:
        OutputError: there are checkpoints, but none of them is whole.
    """
    if where != "auto":
        return load_checkpoint(Path(where))
    if not any((folder / CHECKPOINTS).glob("step-*")):
        report(Note(f"{folder}: no checkpoint there yet, so the run begins with the first step"))
        return None
    checkpoint, notes = newest_checkpoint(folder / CHECKPOINTS)
    for note in notes:
        report(Note(note))
    return checkpoint


def identity(prepared: Prepared) -> dict[str, Any]:
    """What makes a run the run it is; part of every checkpoint."""
    return {
        "recipe": prepared.recipe.to_toml(),
        "data": prepared.fingerprints,
        "base_sha256": prepared.base.fingerprint.weights,
        "base_config_sha256": prepared.base.fingerprint.config,
        "base_tokenizer_sha256": prepared.base.fingerprint.tokenizer,
        "items_sha256": prepared.parts["train"].sha256,
        "machine": {
            "device": prepared.device.type,
            "processes": prepared.ranks.size,
            "threads": torch.get_num_threads(),
            **versions(),
        },
    }


def same_recipe(checkpoint: Checkpoint, recipe: Recipe, report: Report) -> Recipe:
    """The recipe to go on with: its own, where dtype = auto takes what was measured when the run began.

    Raises:
        ConfigError: a key differs from the checkpoint's that may not.
    """
    saved = make_recipe(tomllib.loads(checkpoint.state["recipe"]))
    if recipe.model.dtype == "auto":
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": saved.model.dtype})})
    was, now = _flat(saved), _flat(recipe)
    changed = {key: f"{key} was {was[key]!r}, now {now[key]!r}" for key in now if was[key] != now[key]}
    if refused := [text for key, text in changed.items() if key not in MAY_CHANGE]:
        _refuse("the recipe", refused)
    for text in changed.values():
        report(Note(f"--resume: {text}"))
    return recipe


def check_identity(checkpoint: Checkpoint, prepared: Prepared, report: Report) -> None:
    """Compare what the checkpoint was trained on with what there is now, and tell what may differ.

    Raises:
        ConfigError: the data, the base model or its tokenizer changed.
    """
    saved, now = checkpoint.state, identity(prepared)
    same_recipe(checkpoint, prepared.recipe, lambda event: None)
    changed = _changed(saved["data"], now["data"])
    data = prepared.recipe.data
    is_test = {source: source == data.test and source not in (data.train, data.validation) for source in changed}
    gone = [source for source in changed if source not in now["data"]]  # data.test names another one now
    if refused := [source for source in changed if not is_test[source] and source not in gone]:
        _refuse("the data", [f"the sha256 of {source} differs" for source in refused])
    was = Fingerprint(saved["base_sha256"], saved.get("base_config_sha256"), saved.get("base_tokenizer_sha256"))
    if differences := was.differences(prepared.base.fingerprint):
        _refuse("the base model", differences)
    if None in was:
        report(
            Note("--resume: the checkpoint has no sha256 of the base's config and tokenizer: they were not compared")
        )
    if saved["items_sha256"] != now["items_sha256"]:
        how = "" if prepared.recipe.data.validation else ", or another share of them is held out than before"
        _refuse("the tokenizer", [f"the training texts have other tokens now{how}"])
    for source in changed:
        if source not in gone and source in saved["data"]:
            report(Note(f"--resume: the sha256 of {source} differs; it is scored at the end only"))
    if differs := _changed(saved["machine"], now["machine"]):
        told = ", ".join(f"{key} was {saved['machine'].get(key)}, now {now['machine'].get(key)}" for key in differs)
        report(Note(f"--resume: {told}: results may differ slightly from an uninterrupted run"))


def _flat(recipe: Recipe) -> dict[str, Any]:
    sections = recipe.model_dump(mode="json")
    return {f"{section}.{key}": value for section, table in sections.items() for key, value in table.items()}


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in {**saved, **now} if saved.get(key) != now.get(key)]


def _refuse(what: str, details: Iterable[str]) -> None:
    raise ConfigError(
        f"--resume: {what} changed since the checkpoint was written: {'; '.join(details)}; start a new run instead "
        f"(only {', '.join(MAY_CHANGE)} may change)"
    )
