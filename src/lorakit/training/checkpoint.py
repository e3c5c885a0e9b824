"""Checkpoints: the state from which a run continues as if it had never stopped, written atomically."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import ConfigError, NumericsError, OutputError
from lorakit.hashing import Fingerprint, file_sha256
from lorakit.models import versions
from lorakit.recipe import Recipe, make_recipe
from lorakit.runtime.device import random_state, seed_rank
from lorakit.runtime.events import Note, Report
from lorakit.runtime.files import atomic_folder, remove_folder
from lorakit.training.loop import Member
from lorakit.training.prepare import Prepared
from lorakit.training.progress import History, Interval
from lorakit.training.run_files import CHECKPOINTS
from lorakit.training.schedule import as_if_alone

MANIFEST = "manifest.json"
TENSORS = "state.safetensors"
STATE = "state.json"
FOLD = "fold-"  # and a number, begins the names of a fold's tensors
FORMAT = 2
KEEP = 2  # checkpoints to keep; each holds the best parameters as well as the current ones


@dataclass(frozen=True)
class Checkpoint:
    """Tensors (parameters, optimizer moments, random state) and plain values."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder`/step-N with a manifest of sha256 sums, and remove all but the KEEP newest checkpoints.

    Raises:
        NumericsError: a tensor is not finite; nothing was written.
        OutputError: it cannot be written; no checkpoint was removed.
    """
    for name, value in checkpoint.tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NumericsError(f"step {checkpoint.step}: {name} is not finite, so no checkpoint was written")
    own = folder / f"step-{checkpoint.step:08d}"
    size = sum(value.nbytes for value in checkpoint.tensors.values())
    with atomic_folder(own, size, replace=True) as place:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()}, place / TENSORS
        )
        (place / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}), encoding="utf-8")
        sums = {name: file_sha256(place / name) for name in (TENSORS, STATE)}
        (place / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sums}), encoding="utf-8")
    paths = sorted(folder.glob("step-*"), reverse=True)
    keep = paths[paths.index(own) :][:KEEP]  # newer ones are damaged
    for path in set(paths) - set(keep):
        remove_folder(path)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint with correct sums, and a note for each newer, damaged one.

    Raises:
        OutputError: there is none.
    """
    notes: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load_checkpoint(path), notes
        except OutputError as err:
            notes.append(f"{err}; using the one before")
    raise OutputError(f"{folder}: no complete checkpoint to resume from")


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint and check its sums. Raises an OutputError that names the damaged file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (format := manifest.get("format")) != FORMAT:
            raise OutputError(
                f"{path}: format {format} was written by another version of lorakit; this one reads {FORMAT}"
            )
        for name in (TENSORS, STATE):
            if file_sha256(path / name) != manifest["files"][name]:
                raise OutputError(f"{path / name}: damaged (its sha256 is not the manifest's)")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(state.pop("step"), load_file(path / TENSORS), state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as err:
        raise OutputError(f"{path}: not a complete checkpoint: {type(err).__name__} {err}") from err


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and their optimizer state under the parameters' names."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            tensors[f"parameter/{name}"] = parameter
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
    return tensors


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the tensors of `optimizer_tensors`.

    Raises:
        OutputError: a tensor is missing or has another shape than the parameter it belongs to.
    """
    keys = {key.partition("/")[0] for key in tensors}
    named = [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
    for name, parameter in named:
        for kind in keys & {"best", "exp_avg", "exp_avg_sq"} | {"parameter"}:
            tensor = tensors.get(f"{kind}/{name}")
            if tensor is None and kind.startswith("exp"):
                continue  # no loss has reached it yet
            if tensor is None or tensor.shape != parameter.shape:
                shape = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise OutputError(f"checkpoint: {kind}/{name} is {shape}, not {tuple(parameter.shape)}")
    for name, parameter in named:
        parameter.copy_(tensors[f"parameter/{name}"])
        optimizer.state[parameter] = {
            key: tensors[f"{key}/{name}"].to(parameter.device)
            for key in keys - {"parameter"}
            if f"{key}/{name}" in tensors
        }


# From a run to a checkpoint, and back.


class Progress(NamedTuple):
    """The state of a run apart from its members'."""

    history: History
    interval: Interval


def checkpoint_of(prepared: Prepared, members: Sequence[Member], progress: Progress) -> Checkpoint:
    """A checkpoint of the current step of a run's own member and those of its folds; call it on every rank."""
    tensors: dict[str, Tensor] = {}
    for prefix, own, member in _each(prepared, members):
        every = own.ranks.gather(dict(member.random_state))  # the generators of dropout, one for each rank and device
        of_member = {
            **optimizer_tensors(member.optimizer),
            **{f"start/{name}": value for name, value in _starts(own).items()},
            **{f"best/{name}": value for name, value in member.best.items()},
            **({"loss_scale": torch.tensor(member.loss_scale)} if member.loss_scale != 1 else {}),
            **{f"rng/{rank}/{kind}": state for rank, states in enumerate(every) for kind, state in states.items()},
        }
        tensors |= {prefix + name: value for name, value in of_member.items()}
    history = {**vars(progress.history)}
    if not members[0].best:
        history["best"] = None  # JSON has no -inf
    state = {"history": history, "interval": vars(progress.interval), **identity(prepared)}
    return Checkpoint(members[0].done, tensors, state)


def _each(prepared: Prepared, members: Sequence[Member]) -> Iterator[tuple[str, Prepared, Member]]:
    """The members, with what the names of their tensors begin with in a checkpoint."""
    prefixes = ["", *(f"{FOLD}{number}/" for number in range(len(prepared.folds)))]
    return zip(prefixes, (prepared, *prepared.folds), members, strict=True)


def _starts(prepared: Prepared) -> dict[str, Tensor]:
    """The tensors that the adapter subtracts or keeps frozen; they are saved since another machine's SVD may
    differ in sign."""
    ends, adapter = (".start_A", ".start_B", ".lora_A"), prepared.adapter
    return {
        as_if_alone(name, adapter): value
        for name, value in prepared.model.named_buffers()
        if name.endswith(ends) and f".adapters.{adapter}." in name
    }


def restore(checkpoint: Checkpoint, prepared: Prepared, members: Sequence[Member], report: Report) -> Progress:
    """Restore a checkpoint's tensors and random states in a run's own member and those of its folds; returns the
    rest of it.

    With a different number of ranks, dropout is seeded anew; the order of the examples is the same.

    Raises:
        ConfigError: it belongs to another recipe, other data or another base model.
    """
    ranks = prepared.ranks
    with ranks.together():
        check_identity(checkpoint, prepared, report)
    processes = 0
    for prefix, own, member in _each(prepared, members):
        tensors = {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}
        restore_optimizer(member.optimizer, tensors)
        member.done = min(checkpoint.step, member.plan.steps)
        for name, value in _starts(own).items():
            value.copy_(tensors[f"start/{name}"])
        best: dict[str, Tensor] = {}
        random_states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            what, _, name = key.partition("/")
            if what == "best":
                best[name] = value.to(prepared.device)
            elif what == "rng":
                rank, kind = name.split("/")
                random_states.setdefault(int(rank), {})[kind] = value
        if "loss_scale" in tensors:
            member.loss_scale = float(tensors["loss_scale"])
        member.best, processes = best, len(random_states)
        if processes == ranks.size:
            member.random_state = random_states[ranks.rank]
        else:
            seed_rank(prepared.recipe.train.seed + checkpoint.step, ranks.rank)
            member.random_state = random_state(prepared.device)
    if processes != ranks.size:
        report(
            Note(f"{processes} processes before, {ranks.size} now; each step has the same examples, but other dropout")
        )
    history = checkpoint.state["history"]
    history = History(**{**history, "best": float("-inf") if history["best"] is None else history["best"]})
    return Progress(history, Interval(**checkpoint.state["interval"]))


# Whether a checkpoint belongs to the run that continues from it. What may differ is listed, and reported.


# Keys that a resumed run may change, since they do not influence training.
BUDGET = ("epochs", "batch_size", "lr", "eval_every")  # keys that are chosen where the recipe does not set them
MAY_CHANGE = (
    *("output.dir", "output.trackers", "output.project"),
    *("data.test", "train.checkpoint_every", "train.non_finite", "train.device"),
)


def find_checkpoint(folder: Path, where: str, report: Report) -> Checkpoint | None:
    """The checkpoint to continue from: `auto` is the newest complete one of the run folder, None if there is none yet.

    Raises:
        OutputError: there are checkpoints, but none is complete.
    """
    if where != "auto":
        return load_checkpoint(Path(where))
    if not any((folder / CHECKPOINTS).glob("step-*")):
        report(Note(f"{folder}: no checkpoint yet, so starting from the first step"))
        return None
    checkpoint, notes = newest_checkpoint(folder / CHECKPOINTS)
    for note in notes:
        report(Note(note))
    return checkpoint


def identity(prepared: Prepared) -> dict[str, Any]:
    """What identifies a run; part of every checkpoint."""
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
    """The recipe to continue with: `recipe`, with unset keys and dtype and pooling = auto as chosen when the run began.

    Raises:
        ConfigError: a key differs from the checkpoint's and may not.
    """
    raw = tomllib.loads(checkpoint.state["recipe"])
    raw["model"].setdefault("pooling", "cls")  # as in older versions
    raw["train"].setdefault("head_start", "random")
    raw["data"].setdefault("folds", 0)
    raw["data"].setdefault("label_names", False)
    saved = make_recipe(raw)
    chosen = {key: getattr(saved.model, key) for key in ("dtype", "pooling") if getattr(recipe.model, key) == "auto"}
    if recipe.model.dropout is None:
        chosen["dropout"] = saved.model.dropout
    data: dict[str, Any] = {"folds": saved.data.folds} if recipe.data.folds == "auto" else {}
    if recipe.data.label_names is None:
        data["label_names"] = saved.data.label_names
    budget = {key: getattr(saved.train, key) for key in BUDGET if getattr(recipe.train, key) is None}
    if recipe.train.head_start == "auto":
        budget["head_start"] = saved.train.head_start
    unset = [key for key, value in recipe.task if value is None]
    task = {key: getattr(saved.task, key) for key in unset}
    sections = {"model": chosen, "data": data, "task": task, "train": budget}
    recipe = recipe.with_keys(**sections)
    was, now = saved.flat(), recipe.flat()
    changed = {key: f"{key} was {was[key]!r}, now {now[key]!r}" for key in now if was[key] != now[key]}
    if refused := [text for key, text in changed.items() if key not in MAY_CHANGE]:
        _refuse("the recipe", refused)
    for text in changed.values():
        report(Note(f"--resume: {text}"))
    return recipe


def check_identity(checkpoint: Checkpoint, prepared: Prepared, report: Report) -> None:
    """Compare the checkpoint's data and base model with the current ones, and report permitted differences.

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
        how = "" if prepared.recipe.data.validation else ", or a different share of them is held out"
        _refuse("the tokenizer", [f"the training texts have different tokens now{how}"])
    for source in changed:
        if source not in gone and source in saved["data"]:
            report(Note(f"--resume: the sha256 of {source} differs; it is only scored at the end"))
    if differs := _changed(saved["machine"], now["machine"]):
        text = ", ".join(f"{key} was {saved['machine'].get(key)}, now {now['machine'].get(key)}" for key in differs)
        report(Note(f"--resume: {text}: results may differ slightly from an uninterrupted run"))


def _changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in {**saved, **now} if saved.get(key) != now.get(key)]


def _refuse(what: str, details: Iterable[str]) -> None:
    raise ConfigError(
        f"--resume: {what} changed since the checkpoint was written: {'; '.join(details)}; start a new run instead "
        f"(only {', '.join(MAY_CHANGE)} may change)"
    )
