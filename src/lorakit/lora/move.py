"""Let a model serve the adapters of several: each is built on a copy of the base model, and then moved into one."""

from __future__ import annotations

from torch import nn

from lorakit.lora.inject import check_known, check_new_name, check_unmerged, delete_adapter, hosted, routing_of
from lorakit.lora.layer import Routing, hosts
from lorakit.lora.places import set_fast_paths


def move_adapter(source: nn.Module, model: nn.Module, name: str, old: str = "default") -> None:
    """Take the adapter `old` out of one model and let it be the adapter `name` of another of the same architecture.

    Its tensors stay the same objects, trainable or not as they were; the layers of the two models must be alike.

    Raises:
        AdapterError: there is no such adapter, or one is merged.
        ConfigError: the name is taken or not usable, or a layer serves another adapter in another way.
    """
    check_known(source, old)
    check_new_name(model, name)
    check_unmerged(model)
    routing = routing_of(model) or Routing()
    for path, host in hosts(source, old):
        hosted(model, path, type(host), routing).adapters[name] = host.adapters[old]
    set_fast_paths(model)
    delete_adapter(source, old)
