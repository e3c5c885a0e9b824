"""The picture of a model: its layers by what they do, equal blocks drawn once, and one adapted layer in detail."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from lorakit.app.report.charts import write_loss
from lorakit.app.report.page import METHODS, template
from lorakit.lora import Layer, LoraConfig, count_parameters, hosts
from lorakit.lora.layers import AdapterHost
from lorakit.lora.special_layers import BiasHost
from lorakit.lora.targets import plain, walk
from lorakit.lora.weight_layouts import CONVOLUTION, EMBEDDING, LINEAR, geometry_of, matrix_shape
from lorakit.runtime.files import atomic_text
from lorakit.training.prepare import Prepared
from lorakit.training.results import Result

FROZEN, ADAPTED, TRAINED = "frozen", "adapted", "trained"  # classes of the template's style

# By the names of modules in a block, the first that matches; what matches none is called by its own name.
GROUPS = {
    "cross-attention": re.compile("cross|encdec|encoder_attn", re.IGNORECASE),
    "self-attention": re.compile("att", re.IGNORECASE),
    "feed-forward": re.compile("ff|feed|mlp|intermediate|output|dense|fc|lin|^wi|^wo|expert|up|down", re.IGNORECASE),
}
ROLES = {
    "query, key, value": re.compile("qkv|query_key_value|c_attn|^attention$|^self_attn$", re.IGNORECASE),
    "query": re.compile("^w?q(uery)?(_|$)", re.IGNORECASE),
    "key": re.compile("^w?k(ey)?(_|$)", re.IGNORECASE),
    "value": re.compile("^w?v(alue)?(_|$)", re.IGNORECASE),
    "output": re.compile("^w?o(ut)?(_|$)|c_proj|dense$", re.IGNORECASE),
}
EMBEDDINGS = {
    "position": re.compile("pos|wpe", re.IGNORECASE),
    "segment": re.compile("token_type", re.IGNORECASE),
    "relative position": re.compile("rel", re.IGNORECASE),
}


class Box(NamedTuple):
    """One layer, or the same one in several blocks."""

    title: str
    name: str  # of the module, as target_modules has it
    shape: str
    kind: str
    ranks: tuple[int, ...] = ()  # of its updates
    trained: int = 0  # numbers, in each block
    copies: int = 1  # in a block, for example of experts

    @property
    def update(self) -> str:
        """What is trained of it."""
        if not self.ranks:
            return f"{self.trained:,} trained" if self.trained else ""
        low, high = min(self.ranks), max(self.ranks)
        return f"r {low} +{self.trained:,}" if low == high else f"r {low} to {high}"


class Part(NamedTuple):
    """The embeddings, some equal blocks, or the layers after them."""

    kind: str  # embeddings, encoder, decoder or output
    numbers: list[int]  # of its blocks
    groups: dict[str, list[Box]]
    passes: int = 1  # how often one block is used, as ALBERT's is

    @property
    def which(self) -> str:
        """The numbers of its blocks, in runs."""
        runs: list[list[int]] = []
        for number in self.numbers:
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


class Inset(NamedTuple):
    """One adapted layer in detail."""

    path: str
    n_layers: int  # that are adapted
    shape: tuple[int, int]  # of W
    A: tuple[int, ...]
    B: tuple[int, ...]
    trained: Mapping[str, int]  # parameters of the update, by name
    alpha: float
    scaling: float
    bias: bool
    root: bool  # whether it is alpha divided by the root of r


def write_figures(result: Result, lines: Sequence[Mapping[str, Any]], prepared: Prepared) -> None:
    """Write loss.png and architecture.svg into the run folder."""
    write_loss(result.folder / "loss.png", lines, result.scores)
    title = f"{prepared.base.name}: {METHODS.get(method := prepared.recipe.train.method, method)}"
    picture = architecture(prepared.model, title, prepared.adapter, prepared.config)
    atomic_text(result.folder / "architecture.svg", picture)


def architecture(
    model: nn.Module, title: str, adapter: str = "default", config: LoraConfig | None = None, *, wide: bool = False
) -> str:
    """An SVG of a model and what is trained of it, made for a phone's width, or twice that with the inset beside it."""
    count = count_parameters(model, adapter) if hosts(model) else None
    text: str = template("architecture.svg.jinja").render(
        title=title,
        total=sum(p.numel() for p in model.parameters()) if count is None else count.total,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad) if count is None else count.trainable,
        count=count,
        parts=parts_of(model, adapter),
        inset=_inset(model, adapter, config),
        tied=_is_tied(model),
        is_normed=any("Norm" in type(m).__name__ and _place(path)[1] is not None for path, m in walk(model)),
        wide=wide,
    )
    return text


def parts_of(model: nn.Module, adapter: str) -> list[Part]:
    """What a picture of the model shows, in the order of its data: blocks that differ in nothing but ranks stand there once."""
    main = getattr(model, "get_input_embeddings", lambda: None)()
    embeddings, after, seen = list[Box](), list[Box](), set[int]()
    blocks: dict[tuple[str, int], dict[str, list[Box]]] = {}
    for path, module in walk(model):
        base = plain(module)
        is_host = isinstance(module, AdapterHost) and adapter in module.adapters
        geometry = geometry_of(base)
        if not path or (geometry is None and not (is_host and not isinstance(module, BiasHost))):
            continue
        weight = getattr(base, "weight", None)
        if weight is not None and id(weight) in seen and not is_host:
            continue  # tied to one that is drawn already
        seen.add(id(weight))
        prefix, number, names = _place(path)
        if number is None and (geometry is EMBEDDING or not blocks):
            role = "token" if main is not None and base is plain(main) else _role(names[-1], EMBEDDINGS)
            embeddings.append(_box(module, names, role, adapter))
        elif number is None:
            after.append(_box(module, names, names[-2] if names[-1] == "dense" and names[:-1] else names[-1], adapter))
        elif geometry is not EMBEDDING or is_host:  # T5's table of relative positions is small
            groups = blocks.setdefault((prefix, number), {})
            inner = ".".join(names)
            group = "convolution" if geometry is CONVOLUTION else ""
            group = group or next((title for title, pattern in GROUPS.items() if pattern.search(inner)), names[0])
            _add(groups.setdefault(group, []), _box(module, names, _layer_role(base, group, names), adapter))
    decoder = next((prefix for prefix, _ in blocks if "decoder" in prefix.split(".")), "")
    passes = getattr(getattr(model, "config", None), "num_hidden_layers", 1) if len(blocks) == 1 else 1
    folded: dict[object, Part] = {}
    for (prefix, number), groups in blocks.items():
        for group, boxes in groups.items():
            if group.endswith("attention"):
                boxes.sort(key=lambda box: [*ROLES, box.title].index(box.title))
        looks = tuple((group, box.title, box.name, box.shape, box.kind) for group in groups for box in groups[group])
        part = folded.setdefault(
            (prefix, looks), Part("decoder" if prefix == decoder else "encoder", [], groups, passes)
        )
        part.numbers.append(number)
        for group, boxes in part.groups.items():
            part.groups[group] = [
                box._replace(ranks=box.ranks + other.ranks) for box, other in zip(boxes, groups[group], strict=True)
            ]
    first = [Part("embeddings", [], {"": embeddings})] if embeddings else []
    return [*first, *folded.values(), *([Part("output", [], {"": after})] if after else [])]


def _place(path: str) -> tuple[str, int | None, list[str]]:
    """A block's name and number, and the names below it without numbers; of a layer outside of blocks its names."""
    names = path.split(".")
    i = next((i for i, name in enumerate(names[:-1]) if name.isdigit()), None)
    below = [name for name in (names if i is None else names[i + 1 :]) if not name.isdigit()]
    return (path, None, below or names) if i is None else (".".join(names[:i]), int(names[i]), below or names)


def _role(name: str, roles: Mapping[str, re.Pattern[str]]) -> str:
    return next((role for role, pattern in roles.items() if pattern.search(name)), name)


def _layer_role(base: Any, group: str, names: list[str]) -> str:
    if group.endswith("attention"):
        return _role(names[-1], ROLES)
    if group != "feed-forward" or geometry_of(base) is None:
        return names[-1]
    d_out, d_in = matrix_shape(base)
    return (
        "gate" if re.search("gate|wi_0", names[-1]) else "up" if d_out > d_in else "down" if d_out < d_in else names[-1]
    )


def _box(module: nn.Module, names: list[str], title: str, adapter: str) -> Box:
    base, shape = plain(module), ""
    name = ".".join(names[-2:]) if names[-1] == "dense" else names[-1]  # which says nothing alone
    name = name.removesuffix("_embeddings")
    if geometry_of(base) is EMBEDDING:
        shape = f"{base.num_embeddings:,} \N{MULTIPLICATION SIGN} {base.embedding_dim:,}"
    elif geometry_of(base) is not None:
        d_out, d_in = matrix_shape(base)
        shape = f"{d_in:,} → {d_out:,}"
    if isinstance(module, AdapterHost) and adapter in module.adapters:
        update = module.adapters[adapter]
        trained = sum(p.numel() for p in update.parameters())
        ranks = (len(module.lora(adapter).lora_A),) if isinstance(module, Layer) else ()
        kind = TRAINED if trained >= sum(p.numel() for p in base.parameters()) and not ranks else ADAPTED
        return Box(title, name, shape, kind, ranks, trained)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Box(title, name, shape, TRAINED if trained else FROZEN, (), trained)


def _add(boxes: list[Box], box: Box) -> None:
    """Add a box, or count it where it is another copy, as those of experts are."""
    for i, other in enumerate(boxes):
        if other[:4] == box[:4]:
            boxes[i] = other._replace(copies=other.copies + 1, ranks=other.ranks + box.ranks)
            return
    boxes.append(box)


def _is_tied(model: nn.Module) -> bool:
    """Whether the output layer is the token embedding."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    first, last = (None if module is None else plain(module).weight for module in ends)
    return first is not None and first is last


def _inset(model: nn.Module, adapter: str, config: LoraConfig | None) -> Inset | None:
    adapted = [(path, host) for path, host in hosts(model, adapter) if isinstance(host, Layer)]
    if not adapted:
        return None
    in_block = [(path, host) for path, host in adapted if host.geometry is LINEAR and _place(path)[1] is not None]
    path, host = (in_block or adapted)[0]
    update, root = host.lora(adapter), config is not None and config.use_rslora
    r = len(update.lora_A)
    return Inset(
        path=path.replace(".base.", "."),  # of an nn.MultiheadAttention
        n_layers=len(adapted),
        shape=matrix_shape(host.base),
        A=tuple(update.lora_A.shape),
        B=tuple(update.lora_B.shape),
        trained={name: p.numel() for name, p in update.named_parameters()},
        alpha=update.scaling * (r**0.5 if root else r),
        scaling=update.scaling,
        bias=getattr(host.base, "bias", None) is not None,
        root=root,
    )
