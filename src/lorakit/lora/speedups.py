"""Changes to a model that make it do less work for the same results (up to rounding), without reimplementing models."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.lora.kernels import draw, dropout, fits, library, rms_norm
from lorakit.lora.layers import Layer, hosts


class Family(NamedTuple):
    """The module paths of a family of encoders, as suffixes."""

    blocks: str
    after_attention: str  # in a block: the module after attention, from which on tokens are independent


BERT = Family("encoder.layer", ".attention.output")
FAMILIES: Mapping[str, Family] = {  # by config.model_type
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    "distilbert": Family("transformer.layer", ".sa_layer_norm"),
    "modernbert": Family("layers", ".mlp_norm"),
}
# Families whose blocks are built as BERT's behind their attention; what comes before differs, so that no block is looked up.
LIKE_BERT = {
    *(
        "convbert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "ernie",
        "esm",
        "layoutlm",
        "luke",
        "markuplm",
        "megatron-bert",
    ),
    *("rembert", "roberta-prelayernorm", "roc_bert", "roformer", "tapas", "xlm-roberta-xl"),
}


class Changes:
    """What calling a model does beyond its class, by name, each with what undoes it; one object a model (`changes_of`).

    Whoever hooks, replaces or swaps a part of a model's forward registers it here. Adapters are no such thing: they are
    modules in the tree, which `hosts` lists and `unload` removes.
    """

    def __init__(self) -> None:
        self._undo: dict[str, Callable[[], object]] = {}

    def add(self, name: str, undo: Callable[[], object]) -> None:
        """Register a change. A copy of the model has its own where `undo` is a bound method or a partial."""
        self._undo[name] = undo

    def __iter__(self) -> Iterator[str]:
        return iter(self._undo)

    def remove(self) -> None:
        """Undo all of them, the last one first."""
        while self._undo:
            self._undo.popitem()[1]()


def changes_of(model: nn.Module) -> Changes:
    """The changes of a model's forward."""
    changes: Changes = model.__dict__.setdefault("forward_changes", Changes())
    return changes


def fuse(model: nn.Module) -> int:
    """Compute plain updates of linear layers in one fused function; returns the number of such layers.

    Layers with a quantised weight are unchanged, as are steps with dropout or updates that are not plain.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query", "value")))
    >>> fuse(model)
    6
    """
    layers = [host for _, host in hosts(model) if isinstance(host, Layer)]
    plain = [layer for layer in layers if type(layer.base) is nn.Linear and type(layer.weight) is nn.Parameter]
    for layer in plain:
        layer.fused = True
    if plain:
        changes_of(model).add("fused LoRA layers", partial(_separate, model))
    return len(plain)


def _separate(model: nn.Module) -> None:
    for _, host in hosts(model):
        if isinstance(host, Layer):
            host.fused = False


def read_first_row(model: Any) -> bool:
    """In the last block compute only token 0, if a classifier's head reads nothing else.

    Keys and values need every token; the output projection and the feed-forward net, nine twelfths of a block's matrix
    products, need one. The model then returns one hidden state per text, (B, 1, d), or with a residual around it
    (ModernBERT) T, of which only the first is correct. The caller must know that the head reads token 0.

    Returns whether the family is known.

    >>> read_first_row(model)
    True
    """
    kind = model.config.model_type
    family = FAMILIES.get(kind, BERT if kind in LIKE_BERT else None)
    if family is None or getattr(model.config, "classifier_pooling", "cls") != "cls":
        return False
    places = [module for path, module in model.named_modules() if path.endswith(family.after_attention)]
    hook = places[-1].register_forward_pre_hook(first_row)
    changes_of(model).add("last block: first token only", hook.remove)
    return True


def first_row(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the module reads, of token 0 alone. Shapes: each (B, T, d) to (B, 1, d)."""
    return tuple(rows[:, :1] for rows in inputs)


def pass_once(model: Any) -> int:
    """Compute dropout and T5's norms in one pass over memory each; returns how many such modules there are.

    >>> pass_once(model)
    15
    """
    if library(model.dtype) is None:
        return 0
    modules = [(module, _drop) for module in model.modules() if type(module) is nn.Dropout]
    modules += [(module, _norm) for module in model.modules() if type(module).__name__.endswith("T5LayerNorm")]
    for module, forward in modules:
        module.__dict__["forward"] = partial(forward, module)
    if modules:
        changes_of(model).add("fused dropout and norms", partial(_restore, [module for module, _ in modules]))
    return len(modules)


def _restore(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        del module.forward


def _drop(module: nn.Dropout, x: Tensor) -> Tensor:
    if module.training and 0 < module.p < 1 and fits(x):
        return dropout(x, draw(module.p))
    return nn.Dropout.forward(module, x)


def _norm(module: Any, x: Tensor) -> Tensor:
    gain = module.weight
    if gain.dtype == x.dtype and not gain.requires_grad and fits(x):
        return rms_norm(x, gain, module.variance_epsilon)
    y: Tensor = type(module).forward(module, x)
    return y


# The blocks below the lowest adapter: computed once per text, looked up in later epochs.


Inputs = Mapping[str, Tensor]  # of the model's forward: input_ids, attention_mask and perhaps token_type_ids (B, T)


def frozen_blocks(model: Any) -> list[nn.Module]:
    """The encoder's blocks below the lowest trained one; none if the family is unknown or embeddings are trained.

    >>> targets = add_adapter(model, LoraConfig(r=4, target_modules=("query",), layers_to_transform=(2,)))
    >>> len(frozen_blocks(model))
    2
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return []
    path, blocks = next((path, m) for path, m in model.named_modules() if path.endswith(family.blocks))
    body = model.get_submodule(path.removesuffix(family.blocks).rstrip("."))
    if any(p.requires_grad for p in body.embeddings.parameters()):
        return []
    assert isinstance(blocks, nn.ModuleList)
    return list(takewhile(lambda block: not any(p.requires_grad for p in block.parameters()), blocks))


class Prefix:
    """The outputs of the first blocks, by the texts' token ids, in a memory-mapped temporary file.

    The file lives as long as the process and belongs to this model, whose first blocks are frozen. A batch with a text that
    is not stored is computed as usual. Dropout in the blocks must be off, and padding at the end. Values are stored in the
    model's own dtype, from batches that do not depend on training, so a resumed run reads the same bits.

    >>> prefix = Prefix(model, frozen_blocks(model))
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module]) -> None:
        self.depth = len(blocks)
        self._model, self._blocks = model, blocks
        self._places: dict[bytes, tuple[int, int]] = {}  # text -> its first row in the file, and number of rows
        self._rows = torch.empty(0)  # (rows of all texts, d)
        self._end = 0  # rows in use
        self._texts: Sequence[bytes] = ()  # of the current batch
        self._lengths: Sequence[int] = ()  # in tokens
        self._is_stored = False  # whether all of them are stored
        self._one_row = False  # whether the last of these blocks outputs one row per text

    def __str__(self) -> str:
        size = self._rows.numel() * self._rows.element_size() / 2**20
        return f"the {self.depth} blocks below the adapters answer each text once; {size:.0f} MiB are kept"

    @torch.no_grad()
    def fill(self, batches: Iterable[Inputs], n_tokens: int) -> None:
        """Store the outputs for these batches, with `n_tokens` tokens in total without padding; from now on they are looked up.

        Raises:
            OSError: the disk is full; the model is unchanged.
        """
        d, dtype = self._model.config.hidden_size, self._model.dtype
        with tempfile.NamedTemporaryFile() as file:  # a deleted file lasts as long as the mapping
            _reserve(file.fileno(), n_tokens * d * dtype.itemsize)
            self._rows = torch.from_file(file.name, shared=True, size=n_tokens * d, dtype=dtype).view(n_tokens, d)
        look = self._model.register_forward_pre_hook(self._look, with_kwargs=True)
        for i, block in enumerate(self._blocks):
            block.forward = partial(self._answer, i)
        changes_of(self._model).add("blocks below the adapters looked up", partial(self._release, look))
        ends = self._blocks[-1].register_forward_hook(self._keep)
        was_training = self._model.training
        self._model.eval()
        for batch in batches:
            with suppress(_Stored):
                self._model(**batch)
        self._model.train(was_training)
        ends.remove()

    def _release(self, look: RemovableHandle) -> None:
        look.remove()
        for block in self._blocks:
            del block.forward

    def _look(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Before the model's forward: its texts, and whether all of them are stored."""
        columns = [inputs[key].tolist() for key in ("input_ids", "token_type_ids") if key in inputs]
        self._lengths = inputs["attention_mask"].sum(1).tolist()
        rows = zip(self._lengths, *columns, strict=True)
        self._texts = [array("q", (id for ids in of_text for id in ids[:n])).tobytes() for n, *of_text in rows]
        self._is_stored = all(text in self._places for text in self._texts)

    def _answer(self, i: int, hidden: Tensor, *args: Any, **options: Any) -> Any:
        """Replaces block i's forward. Shapes: hidden (B, T, d)."""
        if not self._is_stored:
            block = self._blocks[i]
            return type(block).forward(block, hidden, *args, **options)
        return self._stored(hidden.shape[1]).to(hidden.device) if i == 0 else hidden

    def _stored(self, length: int) -> Tensor:
        """The last block's outputs for the batch; padding positions are masked later. Shapes: (B, T, d)."""
        first, count = torch.tensor([self._places[text] for text in self._texts]).T
        offsets = torch.arange(1 if self._one_row else length)
        return self._rows[first[:, None] + torch.minimum(offsets, count[:, None] - 1)]

    def _keep(self, block: nn.Module, args: tuple[Tensor, ...], hidden: Tensor) -> None:
        """After the last block while the file is filled. Shapes: hidden (B, T, d), or (B, 1, d)."""
        self._one_row = hidden.shape[1] < args[0].shape[1]
        for text, n, rows in zip(self._texts, self._lengths, hidden, strict=True):
            if text not in self._places:
                rows = rows[:n]
                self._rows[self._end : self._end + len(rows)] = rows
                self._places[text] = (self._end, len(rows))
                self._end += len(rows)
        raise _Stored


def _reserve(descriptor: int, size: int) -> None:
    """Reserve space on disk: writing to a hole in a mapped file on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


class _Stored(Exception):
    """The first blocks are done; the rest of the forward is not needed."""
