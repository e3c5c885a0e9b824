"""LoRA over any torch model; needs torch and safetensors alone, and imports them when a name is first used.

So `lorakit.lora.config`, and with it a recipe, can do without them. No module here may have the name of something public.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.lora.public import *  # noqa: F403


def __dir__() -> list[str]:
    names: list[str] = importlib.import_module("lorakit.lora.public").__all__
    return sorted(names)


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name):
        if name != "__all__" and name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module("lorakit.lora.public"), name)
