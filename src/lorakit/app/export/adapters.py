"""An adapter in the form that another program reads, with what was changed and a check of the result; and merged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.app.export.check import agree, check_exact, texts_of
from lorakit.app.printing import Output
from lorakit.errors import ConfigError
from lorakit.inference.adapter_folder import load_shipped, read_side, shipped_folder
from lorakit.inference.predictor import Predictor
from lorakit.inference.side import Side
from lorakit.lora import (
    BaseInfo,
    Layer,
    SavedModule,
    hosts,
    load_adapter,
    read_adapter_config,
    save_adapter,
    set_adapter,
)
from lorakit.lora.export_profiles import OWN, PROFILES, Profile, conform, left_behind
from lorakit.model_files import MINILM_HUB, find
from lorakit.models import BaseModel, load_base
from lorakit.pooling import save_layout
from lorakit.runtime.files import atomic_folder
from lorakit.tasks.registry import layout_of, make_task, task_layers

HEAD = Path("head") / "model.safetensors"  # not beside the adapter, where readers look for factors
PROBES = ("The quick brown fox jumps over the lazy dog.", "Ada Lovelace met Charles Babbage in London in 1833!")
TOLERANCE = 1e-4  # of the largest weight change: far above fp32 rounding, far below any real mistake
READ_BACK = "exported"  # the name under which the written adapter is loaded again
SERVED_RANKS = (8, 16, 32, 64, 128, 256)  # what vLLM takes for --max-lora-rank


class Parity(NamedTuple):
    """The largest differences between before and after, and the largest values they are to be seen against."""

    logits: float
    largest_logit: float
    weights: float
    largest_weight: float

    def line(self) -> str:
        return (
            f"check: read back from the files, logits differ by at most {self.logits:.2g} (largest {self.largest_logit:.3g}), "
            f"weight changes by at most {self.weights:.2g} (largest {self.largest_weight:.3g})"
        )


def export_adapter(
    path: Path,
    to: str,
    out: Path,
    *,
    rank: int | None = None,
    base_name: str | None = None,
    allow_base_mismatch: bool = False,
) -> Output:
    """Write the adapter of a run folder or an adapter folder as one of `PROFILES` reads it.

    `rank` cuts updates to it where the reader cannot take them whole; `base_name` is what it calls the base model.

    Raises:
        OutputError: `out` cannot be written; nothing is left half written.
        AdapterError: the reader cannot use such an adapter.
    """
    folder = shipped_folder(path)
    side = read_side(folder)
    if side.method == "full":
        raise ConfigError(f"{path}: fully fine-tuned: it has no adapter; use --to merged")
    base = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch)
    base.model.eval()
    make_task(side.task, base.tokenizer, side.labels, side.max_length, side.tuned)  # refuses what does not fit the task
    config, saved_as = read_adapter_config(folder)
    profile = PROFILES[to]
    name, notes = side.base.name, list[str]()  # what others call the base model
    if base_name is not None:
        name, notes = base_name, [f"base model: called {base_name}"]
    elif name == "minilm":
        name, notes = MINILM_HUB, [f"base model: called {MINILM_HUB}, where minilm comes from"]
    elif name == "t5-demo":
        name = str(find(name))
        notes = [f"base model: t5-demo is not on any hub, so it is named by its folder here, {name}"]
    with atomic_folder(out) as place:
        conformed = conform(base.model, config, profile, rank=rank)
        head = left_behind(base.model, conformed)
        task_type = None if head else saved_as.task_type  # with SEQ_CLS and the like peft insists on a head in the file
        info = BaseInfo(name, saved_as.revision, task_type)
        save_adapter(base.model, place, conformed.config, info, conformed.name)
        if head:  # modules that the reader does not read, in a file of their own
            (place / HEAD).parent.mkdir()
            save_file(dict(head), place / HEAD, metadata={"format": "pt"})
            names = ", ".join(sorted({key.rpartition(".")[0] for key in head}))
            notes.append(f"head: {names} split off into {HEAD}, because {profile.consumer} only reads LoRA factors")
        if profile.everything and side.task.info.model_kind == "embedding":
            save_layout(base.model, place, layout_of(side.task, side.max_length))
            base.tokenizer.save_pretrained(place)
            notes.append(f"layout: sentence_transformers.SentenceTransformer('{out}') loads it too, with its base")
        changes = [*conformed.changes, *notes]
        parity = _parity(base, place)
        _check(parity, exact=rank is None)
    r = conformed.config.r
    use = profile.use.format(out=out, r=r, served_r=next((n for n in SERVED_RANKS if n >= r), r))
    needed = [*_label_lines(side, profile), *left_out(side)]
    if profile.everything and side.task.info.model_kind == "reranker" and side.pooling != "mean":
        needed.append(
            f"use: sentence_transformers.CrossEncoder('{name}', num_labels=1), then its load_adapter('{out}')"
        )
    lines = [*(changes or ["nothing had to be changed"]), parity.line(), *needed, f"use: {use}"]
    return Output(lines, {"check": parity._asdict()})


def _label_lines(side: Side, profile: Profile) -> list[str]:
    names = side.task.info.outputs(side.labels)
    if side.task.info.model_kind == "embedding":
        return []
    if side.pooling == "mean":
        head = f"`classifier`, a linear layer to {len(names)} outputs" if profile.everything else f"the head in {HEAD}"
        labels = ", ".join(names)
        return [f"pooling: the base is AutoModel's; {head}, reads the mean over its tokens (docs/exports.md): {labels}"]
    if not profile.everything or side.task.info.model_kind == "text2text" or len(names) == 2:
        return []
    return [f"labels: load the base with num_labels={len(names)}; they are {', '.join(names)}"]


NO_CRF = "crf: its transitions are left out, so a plain model tags each word on its own"


def left_out(side: Side) -> list[str]:
    """What answers need besides the model's output, which others must do themselves."""
    task, tuned = side.task, side.tuned
    lines = [NO_CRF] * task.crf
    if "spread" in tuned:
        lines.append(f"units: value = {tuned['mean']:g} + {tuned['spread']:g} * the model's output")
    if task.info.outputs_are:
        lines.append(f"outputs: {task.info.outputs_are}")
    if thresholds := tuned.get("thresholds"):
        each = ", ".join(f"{label} {at:.3g}" for label, at in thresholds.items())
        lines.append(f"thresholds: a plain model uses 0.5 for each label; the tuned ones are {each}")
    if task.calibrate and tuned:  # what was combined is not tuned
        lines.append(f"temperature: divide the logits by {tuned['temperature']:.3g}")
    return lines


@torch.no_grad()
def _parity(base: BaseModel, written: Path) -> Parity:
    """What the written files do, read back beside the adapter they came from; a head split off is taken from there."""
    model = base.model
    load_adapter(model, written, READ_BACK)
    for _, host in hosts(model, OWN):
        if isinstance(host, SavedModule) and READ_BACK not in host.adapters:
            host.adapters[READ_BACK] = host.adapters[OWN]
    answers = []
    for adapter in (OWN, READ_BACK):
        set_adapter(model, adapter)
        answers.append(_logits(base))
    layers = [host for _, host in hosts(model) if isinstance(host, Layer)]
    changes = [  # what each adapter adds to a layer's weight, (d_out, d_in), or a single zero
        [layer.lora(a).delta_weight(layer) if a in layer.adapters else torch.zeros(1, 1) for a in (OWN, READ_BACK)]
        for layer in layers
    ]
    return Parity(
        _largest(answers[0] - answers[1]),
        _largest(answers[0]),
        max((_largest(before - after) for before, after in changes), default=0.0),
        max((_largest(before) for before, _ in changes), default=0.0),
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


@torch.no_grad()
def _logits(base: BaseModel) -> Tensor:
    """The answers to the probe sentences, cut to what the model has places for, in fp32 on the CPU."""
    device = next(base.model.parameters()).device
    encoded = base.tokenizer(
        list(PROBES), padding=True, truncation=True, max_length=base.max_length, return_tensors="pt"
    )
    batch = {key: ids.to(device) for key, ids in encoded.items()}
    if base.kind.peft_task_type == "SEQ_2_SEQ_LM":
        batch["labels"] = batch["input_ids"]
    logits: Tensor = base.model(**batch).logits
    return logits.float().cpu()


def _check(parity: Parity, exact: bool) -> None:
    """Raise where an export that should be exact is not: that would be our own fault, and must not go out."""
    if exact and parity.weights > TOLERANCE * max(parity.largest_weight, TOLERANCE):
        raise RuntimeError(f"the export differs from the adapter; nothing was written. {parity.line()}")


def merge(path: Path, out: Path, *, allow_base_mismatch: bool = False) -> Output:
    """Fold the adapter into its base model, in fp32: a plain transformers folder; lines say what of the answers is left out.

    Raises:
        OutputError: `out` cannot be written; nothing is left half written.
        RuntimeError: the folder's logits are not the run's; nothing is written.
    """
    folder = shipped_folder(path)
    side = read_side(folder)

    def loaded() -> Predictor:
        base = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch)
        task = make_task(side.task, base.tokenizer, side.labels, side.max_length, side.tuned)
        return Predictor(base.model.eval(), task, side, torch.device("cpu"), base.tokenizer)

    with atomic_folder(out) as place:
        loaded().merge_to(place)
        before = loaded()
        after = load_base(str(place), before.task.info.model_kind, pooling=side.pooling).model.eval()
        for name in task_layers(side.task, side.labels):
            after.add_module(name, before.model.get_submodule(name))
        agreement = agree(before.task, side, texts_of(path, side), before.model, after)
        check_exact(agreement)
    lines = left_out(side)
    if side.task.info.model_kind == "embedding":
        lines.append(
            f"layout: of sentence-transformers: SentenceTransformer('{out}').encode(texts) returns the vectors"
        )
    elif side.task.info.model_kind == "reranker" and side.pooling != "mean":
        lines.append(f"use: sentence_transformers.CrossEncoder('{out}').predict(pairs) gives the scores")
    elif side.pooling == "mean":
        lines.append(
            "layout: of sentence-transformers, whose `encode` gives the logits; transformers' classes have no such head"
        )
    return Output([*lines, agreement.line()], {"check": agreement.facts()})
