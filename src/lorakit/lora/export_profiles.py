"""What each reader of LoRA files supports, and conversion of an adapter to that form. A new reader is one line.

Outside peft most readers support only factors A and B with one global scaling lora_alpha / r. Here every update is converted
to that form exactly, or by a truncated SVD with its error stated, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.lora.config import LoraConfig
from lorakit.lora.inits import Factors, truncated
from lorakit.lora.inject import insert_adapter
from lorakit.lora.layers import Layer, SavedModule, hosts
from lorakit.lora.peft_files import PREFIX, adapter_tensors
from lorakit.lora.targets import has_suffix, plain, saved_modules, walk
from lorakit.lora.updates import DoRA
from lorakit.lora.weight_layouts import CONVOLUTION, geometry_of

FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
OWN, CONFORMED = "default", "conformed"  # names of adapters in the model: the one to export, and what is made of it


@dataclass(frozen=True)
class Profile:
    """A reader, and what it supports of peft's format."""

    consumer: str
    use: str  # how to use the exported folder; {out}, {r} and {served_r} (the next rank that vLLM supports) are filled in
    everything: bool = False  # each layer's own r and alpha, rsLoRA, DoRA, biases, whole modules: nothing is converted


PROFILES: Mapping[str, Profile] = {
    "peft": Profile("peft", "PeftModel.from_pretrained(base, '{out}')", everything=True),
    "vllm": Profile("vLLM", "vllm serve BASE --enable-lora --max-lora-rank {served_r} --lora-modules NAME={out}"),
    "llamacpp": Profile("llama.cpp", "python convert_lora_to_gguf.py {out} --base FOLDER_OF_THE_BASE"),
}


class Conformed(NamedTuple):
    """An adapter in the form that a reader supports."""

    name: str  # of the adapter in the model
    config: LoraConfig
    changes: Sequence[str]  # a line for each change
    errors: Mapping[str, float]  # path -> |lost| / |update| in the Frobenius norm, of truncated SVDs


class _Plain(NamedTuple):
    """One layer's update as s B A. Shapes: A (r, d_in), B (d_out, r)."""

    factors: Factors
    scaling: float
    error: float | None = None  # None if nothing was truncated


@torch.no_grad()
def conform(model: nn.Module, config: LoraConfig, profile: Profile, *, rank: int | None = None) -> Conformed:
    """Add an adapter that is equivalent to the model's own ("default"), in a form that the reader supports.

    If the reader supports all of that, nothing is added. Modules trained in full are left out if the
    reader supports none. With `rank`, updates of higher rank (DoRA's have full rank) are truncated to it.

    Raises:
        AdapterError: the adapter has parts that the reader does not support and that cannot be converted.
    """
    if profile.everything and rank is None:
        return Conformed(OWN, config, [], {})
    _check_readable(model, profile, rank)
    parts = {path: _plain(layer, rank) for path, layer in _layers(model)}
    r = max(len(part.factors.A) for part in parts.values())
    scalings = {part.scaling for part in parts.values()}
    keeps_alpha = not config.use_rslora and len(scalings) == 1 and {len(p.factors.A) for p in parts.values()} == {r}
    # with alpha = r the scaling is 1, and the old one goes into B
    alpha = next(iter(scalings)) * r if keeps_alpha else r
    saved = config.modules_to_save if profile.everything else ()
    written = LoraConfig(
        r=r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_names(model, set(parts), saved),
        modules_to_save=saved,
    )
    insert_adapter(model, written, CONFORMED)
    _fill(model, parts, fold=not keeps_alpha)
    errors = {path: part.error for path, part in parts.items() if part.error is not None}
    changes = []
    if errors:
        worst = max(errors, key=lambda path: errors[path])
        changes.append(
            f"cut by SVD to rank {r}: {len(errors)} of {len(parts)} updates; {sum(errors.values()) / len(errors):.2%} of an "
            f"update's norm is lost on average, at most {errors[worst]:.2%} ({worst})"
        )
    if not keeps_alpha:
        values = " to ".join(f"{scaling:g}" for scaling in dict.fromkeys((min(scalings), max(scalings))))
        rule = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
        changes.append(
            f"scaling: {rule} of each layer ({values}) folded into B; lora_alpha = r = {r}, so that alpha / r is 1"
        )
    if padded := sum(len(part.factors.A) < r for part in parts.values()):
        changes.append(f"rank: {padded} of {len(parts)} layers padded with zeros to r = {r}")
    listed = not isinstance(config.target_modules, str) and sorted(config.target_modules)
    names = written.target_modules
    if listed != sorted(names) or config.layers_to_transform is not None or config.exclude_modules:
        shown = f"{len(names)} whole paths" if any("." in name for name in names) else ", ".join(names)
        changes.append(f"target_modules: written as {shown}")
    return Conformed(CONFORMED, written, changes, errors)


def left_behind(model: nn.Module, conformed: Conformed) -> dict[str, Tensor]:
    """The tensors of modules trained in full but left out of the converted form, under the plain model's names."""
    tensors: dict[str, Tensor] = {}
    for path, host in hosts(model, OWN):
        if isinstance(host, SavedModule) and conformed.name not in host.adapters:
            for key, tensor in host.adapters[OWN].state_dict().items():
                tensors[f"{path}.{key}"] = tensor.detach().cpu().contiguous()
    return tensors


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    yield from ((path, host) for path, host in hosts(model, OWN) if isinstance(host, Layer))


def _check_readable(model: nn.Module, profile: Profile, rank: int | None) -> None:
    """Raise unless every tensor of the adapter is a factor of a layer, or belongs to a whole module."""
    layers = dict(_layers(model))
    if not layers:
        raise AdapterError(f"{profile.consumer} reads LoRA factors only, and this adapter has none")
    if path := next((path for path, layer in layers.items() if layer.geometry is CONVOLUTION), None):
        raise AdapterError(f"{profile.consumer} does not support LoRA over {path}, a convolution; --to merged keeps it")
    whole = [path for path, host in hosts(model, OWN) if isinstance(host, SavedModule)]
    readable = {f"{PREFIX}{path}.{factor}" for path in layers for factor in FACTORS}
    readable |= {f"{PREFIX}{path}.{MAGNITUDE}" for path in layers if rank is not None}
    for key in adapter_tensors(model, OWN):
        if key in readable or any(key.startswith(f"{PREFIX}{path}.") for path in whole):
            continue
        if key.endswith(MAGNITUDE):
            raise AdapterError(
                f"{profile.consumer} does not support DoRA, whose update has full rank: "
                "--to merged keeps it exactly, --rank N approximates it at rank N and prints the error"
            )
        raise AdapterError(f"{profile.consumer} reads factors A and B only, not {key!r}; --to merged keeps it")


def _plain(layer: Layer, rank: int | None) -> _Plain:
    update = layer.lora(OWN)
    factors = update.factors()
    if rank is None or (not isinstance(update, DoRA) and len(factors.A) <= rank):
        return _Plain(factors, update.scaling)
    cut, error = truncated(update.delta_weight(layer), rank)
    return _Plain(cut, 1.0, error)


def _fill(model: nn.Module, parts: Mapping[str, _Plain], *, fold: bool) -> None:
    """Write factors, padded with zeros to the new rank, with the scaling in B if `fold`."""
    for path, host in hosts(model, CONFORMED):
        if isinstance(host, Layer):
            update = host.lora(CONFORMED)
            update.lora_A.zero_()
            update.lora_B.zero_()
            A, B = parts[path].factors
            update.lora_A[: len(A)] = A
            update.lora_B[:, : len(A)] = B * parts[path].scaling if fold else B
        elif isinstance(host, SavedModule):
            host.adapters[CONFORMED].load_state_dict(host.adapters[OWN].state_dict())


def _names(model: nn.Module, paths: set[str], saved: Sequence[str]) -> tuple[str, ...]:
    """The last names of these layers if they select exactly these in the plain model; otherwise the full paths."""
    saved_paths = saved_modules(model, saved)
    last = sorted({path.rpartition(".")[2] for path in paths})
    chosen = {
        path
        for path in _plain_paths(model)
        if any(has_suffix(path, name) for name in last) and not any(f"{path}.".startswith(f"{s}.") for s in saved_paths)
    }
    return tuple(last) if chosen == paths else tuple(sorted(paths))


def _plain_paths(model: nn.Module) -> Iterator[str]:
    """The layers of the plain model, including those inside modules trained in full."""
    for path, module in walk(model):
        inside = walk(plain(module), path) if isinstance(module, SavedModule) else [(path, plain(module))]
        yield from (place for place, layer in inside if geometry_of(layer) is not None)
