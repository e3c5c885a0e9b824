"""A frozen base model shared by many adapters, which are added and removed; one forward answers rows of all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakit.data.example import Example
from lorakit.errors import AdapterError, ModelError
from lorakit.hashing import file_sha256
from lorakit.inference.adapter_folder import load_shipped, read_side
from lorakit.inference.answer import Adapter, Row, answer_rows, as_input
from lorakit.inference.side import SIDE_FILE, Side
from lorakit.lora import DoRA, Layer, Routing, fuse, hosts, load_adapter
from lorakit.lora.inject import put
from lorakit.lora.layers import AdapterHost, SavedModule
from lorakit.lora.peft_config import CONFIG_FILE, MAX_BYTES
from lorakit.lora.peft_files import WEIGHTS_FILE, reload_adapter
from lorakit.models import KINDS
from lorakit.runtime.device import DTYPES, cast_frozen_, pick_device
from lorakit.tasks.base import Item
from lorakit.tasks.registry import make_task, task_layers

Stamp = tuple[tuple[int, int, int], ...]  # of each file of a folder: inode, size, time of change in ns
IN_TEMPLATE = "template"  # an adapter's name in a template
MOST_TEMPLATES = 8
READ_AGAIN = 3  # attempts if a folder changes while it is read


class Part(NamedTuple):
    """An adapter's module at one place of the model."""

    path: str
    host: type[AdapterHost]  # the kind of host it needs there
    module: nn.Module

    def holds(self, path: str) -> bool:
        """Whether the adapter has its own copy of the module at a path."""
        return issubclass(self.host, SavedModule) and f"{path}.".startswith(f"{self.path}.")


@dataclass(frozen=True, eq=False, kw_only=True)
class Resident(Adapter):
    """One version of an adapter; each has a new key, so that no batch mixes two versions."""

    key: str
    shared: SharedModel  # that answers with it
    folder: Path
    stamp: Stamp
    side: Side
    parts: Sequence[Part]
    size: int  # bytes of its tensors


class SharedModel:
    """The base model of an adapter's folder, at first without adapters; `over` is one of another kind, whose weights it shares.

    `device` is a name that `pick_device` takes.

    An adapter is loaded into a *template*: a copy of the model's modules that shares the base's weights and holds one
    adapter, reused for all adapters with the same settings. Serving it then means an entry in a dict at each place.
    There are no locks: one thread may `build` while another answers, and `add` and `remove` may run during an answer
    without rows of that resident.

    Raises:
        AdapterError: the adapter's base is not that of `over`, or it is damaged.
    """

    def __init__(self, folder: Path, over: SharedModel | None = None, *, device: str = "auto") -> None:
        self.side = side = read_side(folder)
        _check_method(folder, side)
        if over is not None:
            over.check_base(folder, side)
        self.device: torch.device = over.device if over else pick_device(device)
        dtype = DTYPES[side.dtype]
        base = load_shipped(folder, side, with_adapter=False)
        info = side.task.info
        self.fingerprint, self.tokenizer = base.fingerprint, base.tokenizer
        cast_frozen_(base.model.requires_grad_(False), dtype)
        self.model: Any = base.model.to(self.device).eval()
        if over is not None:
            _share_weights_(self.model, over._plain)
        self._head, last = [(path, m) for path, m in self.model.named_modules() if isinstance(m, nn.Linear)][-1]
        self._width = len(info.outputs(side.labels))
        if info.has_head and last.out_features != self._width:
            raise ModelError(
                f"{side.base.name}: its output layer was not recognised: {self._head} has {last.out_features} rows"
            )
        self._plain: nn.Module = _copy(self.model)  # before it is changed
        self._templates: dict[tuple[int, bool, str], nn.Module] = {}  # the most recently used last
        self._keys = (f"version-{number}" for number in count(1))
        self.routing = Routing()
        base.speed_up(self.device)

    def build(self, folder: Path) -> Resident:
        """Read an adapter, while others serve.

        Raises:
            AdapterError: it has another base model or kind, or is damaged.
        """
        for _ in range(READ_AGAIN):
            stamp = stamp_of(folder)
            try:
                resident = self._build(folder, stamp)
            except AdapterError:
                if stamp_of(folder) == stamp:
                    raise
                continue  # it was being replaced: two versions were mixed
            if stamp_of(folder) == stamp:
                return resident
        raise AdapterError(f"{folder}: changed while it was read, several times in a row")

    def _build(self, folder: Path, stamp: Stamp) -> Resident:
        side = read_side(folder)
        _check_method(folder, side)
        if model_of(side) != model_of(self.side):
            raise AdapterError(
                f"{folder}: needs {' with pooling '.join(model_of(side))}, which it did not a moment ago"
            )
        self.check_base(folder, side)
        layers, outputs, template = (
            task_layers(side.task, side.labels),
            self._outputs(side),
            self._template(folder, side),
        )
        places = hosts(template, IN_TEMPLATE)
        # copied together, since tied places share their module
        parts = copy.deepcopy([Part(path, type(host), host.adapters[IN_TEMPLATE]) for path, host in places])
        if outputs != self._width and not any(part.holds(self._head) for part in parts):
            raise AdapterError(f"{folder}: has {outputs} outputs but no head; the shared head has {self._width}")
        modules = nn.ModuleList(part.module for part in parts).to(self.device).eval().requires_grad_(False)
        for module, (_, host) in zip(modules, places, strict=True):
            if isinstance(module, DoRA) and isinstance(host, Layer):
                module.fix(host)
        return Resident(
            key=next(self._keys),
            shared=self,
            folder=folder,
            stamp=stamp,
            side=side,
            tokenizer=self.tokenizer,
            task=make_task(side.task, self.tokenizer, side.labels, side.max_length, side.tuned),
            outputs=outputs if side.task.info.has_head else None,
            parts=[part for part in parts if part.path not in layers],
            layers={part.path: part.module for part in parts if part.path in layers},
            size=sum(tensor.nbytes for tensor in chain(modules.parameters(), modules.buffers())),
        )

    def _outputs(self, side: Side) -> int:
        info = side.task.info
        return len(info.outputs(side.labels)) if info.has_head else self._width

    def check_base(self, folder: Path, side: Side) -> None:
        """Raise an AdapterError unless an adapter's base has these weights, read and quantised as here."""
        if differences := side.base.fingerprint.differences(self.fingerprint):
            raise AdapterError(
                f"{folder}: trained on another base model ({side.base.name}) than that of the others: {'; '.join(differences)}"
            )
        for name in ("dtype", "quantize"):
            if getattr(side, name) != getattr(self.side, name):
                raise AdapterError(
                    f"{folder}: trained over a base with {name} = {getattr(side, name)!r}; "
                    f"the others share one with {getattr(self.side, name)!r}"
                )

    def _template(self, folder: Path, side: Side) -> nn.Module:
        """A template that holds this adapter."""
        outputs = self._outputs(side)
        try:
            settings = file_sha256(folder / CONFIG_FILE, MAX_BYTES)
        except OSError as err:
            raise AdapterError(f"{folder / CONFIG_FILE}: {err.strerror}") from err
        key = outputs, side.task.crf, settings
        template = self._templates.pop(key, None)
        if template is not None:
            reload_adapter(template, folder, IN_TEMPLATE)
        else:
            template = _copy(self._plain)
            if outputs != self._width:  # an output layer of another width, whose values come from the adapter
                old = template.get_submodule(self._head)
                assert isinstance(old, nn.Linear)
                new = nn.Linear(old.in_features, outputs, bias=old.bias is not None, device=old.weight.device)
                put(template, old, new.to(old.weight.dtype).requires_grad_(False))
            for name, layer in task_layers(side.task, side.labels).items():
                template.add_module(name, layer)
            load_adapter(template, folder, IN_TEMPLATE)
        self._templates[key] = template  # only now: a load that hangs or fails must leave no template
        if len(self._templates) > MOST_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        return template

    def add(self, resident: Resident) -> None:
        """Serve a resident. Raises an AdapterError, and serves nothing of it, if it conflicts with another."""
        places: list[AdapterHost] = []
        for part in resident.parts:
            module = self.model.get_submodule(part.path)
            if not isinstance(module, AdapterHost):
                module = put(self.model, module, part.host(module, self.routing))
            elif type(module) is not part.host:
                raise AdapterError(
                    f"{resident.folder}: {part.path} serves another adapter differently ({type(module).__name__})"
                )
            places.append(module)
        fuse(self.model)
        for host, part in zip(places, resident.parts, strict=True):
            host.adapters[resident.key] = part.module

    def remove(self, resident: Resident) -> None:
        """Remove a resident."""
        for part in resident.parts:
            del self.model.get_submodule(part.path).adapters[resident.key]

    @torch.inference_mode()
    def answer(self, queries: Sequence[tuple[Resident, Example]]) -> list[dict[str, Any]]:
        """Answer each example by its resident, as JSON; fastest if a resident's examples are neighbours."""
        inputs = [(resident, as_input(resident.task, example)) for resident, example in queries]
        items: list[list[Item]] = []
        for resident, own in groupby(inputs, key=itemgetter(0)):
            items += resident.task.encode([example for _, example in own])
        rows = [Row(resident, item) for (resident, _), some in zip(inputs, items, strict=True) for item in some]
        raws = iter(answer_rows(self.model, rows, self.device))
        return [
            resident.task.to_json(example, resident.task.answer(example, [next(raws) for _ in some]))
            for (resident, example), some in zip(inputs, items, strict=True)
        ]


def stamp_of(folder: Path) -> Stamp:
    """Changes whenever an adapter's files change."""
    stamp = []
    for name in (SIDE_FILE, CONFIG_FILE, WEIGHTS_FILE):
        try:
            stat = (folder / name).stat()
        except OSError:  # loading reports missing files
            continue
        stamp.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(stamp)


def model_of(side: Side) -> tuple[str, str]:
    """What an adapter's model is beside its base: adapters for which this is equal share a forward."""
    return KINDS[side.task.info.model_kind].auto_class, side.pooling


def _share_weights_(model: Any, other: Any) -> None:
    """Replace every tensor of a model's body by the one of another's at the same place, where they are equal."""
    model, other = model.base_model, other.base_model  # without the heads
    shared = {
        **dict(other.named_parameters(remove_duplicate=False)),
        **dict(other.named_buffers(remove_duplicate=False)),
    }
    for path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                same = shared.get(f"{path}.{name}" if path else name)
                if tensor is not None and same is not None and tensor.shape == same.shape and torch.equal(tensor, same):
                    own[name] = same


def _check_method(folder: Path, side: Side) -> None:
    if side.method == "full":
        raise AdapterError(f"{folder}: a fully fine-tuned model, which cannot share a base")


def _copy(model: nn.Module) -> nn.Module:
    """Copies of the modules that share the tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
