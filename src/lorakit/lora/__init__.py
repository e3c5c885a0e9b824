"""LoRA over any torch model; needs torch and safetensors alone, and imports them when a name is first used.

So `lorakit.lora.config`, and with it a recipe, can do without them. No module here may have the name of something public.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.lora.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name != "__all__" and name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module("lorakit.lora.public"), name)
