"""What is changed in a model so that it does less work for the same answers (to rounding): no second model zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.lora.layer import Layer, hosts


class Family(NamedTuple):
    """Where a family of encoders keeps its parts, as ends of paths."""

    blocks: str
    after_attention: str  # in a block: all that attention needs of the other tokens has been computed here


BERT = Family("encoder.layer", ".attention.output")
FAMILIES: Mapping[str, Family] = {  # by config.model_type
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    "distilbert": Family("transformer.layer", ".sa_layer_norm"),
    "modernbert": Family("layers", ".mlp_norm"),
}


def fuse(model: nn.Module) -> int:
    """Let plain updates of linear layers be computed in one function of their own; how many layers can be.

    Layers whose weight is kept as codes stay as they are, and at each step those that dropout or a mixed batch meets.
    """
    layers = [host for _, host in hosts(model) if isinstance(host, Layer)]
    plain = [layer for layer in layers if type(layer.base) is nn.Linear and type(layer.weight) is nn.Parameter]
    for layer in plain:
        layer.fused = True
    return len(plain)


def read_first_row(model: Any) -> bool:
    """Compute of the last block only what token 0 needs, where the head of a classifier reads nothing else.

    Keys and values need every token; the output projection and the feed-forward net, nine twelfths of a block's matrix
    products, need one. The model then gives one hidden state a text, (B, 1, d), or where a residual runs around the place
    (ModernBERT) T of which the first alone is right. Whether the head reads token 0 the caller must know.

    Returns whether the family is known.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None or getattr(model.config, "classifier_pooling", "cls") != "cls":
        return False
    places = [module for path, module in model.named_modules() if path.endswith(family.after_attention)]
    places[-1].register_forward_pre_hook(_first_row)
    return True


def _first_row(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Shapes: (B, T, d) to (B, 1, d)."""
    return tuple(rows[:, :1] for rows in inputs)
