"""What `lorakit.lora` offers. `lorakit.lora` itself imports this when one of the names is first used."""

from lorakit.lora.adapters import merge, merge_and_unload, move_adapter, swap_adapter, unmerge
from lorakit.lora.combination import Combined, combine
from lorakit.lora.config import ALL_LINEAR, LoraConfig
from lorakit.lora.inits_from_data import Data, Start, start_from_data
from lorakit.lora.inject import (
    ParameterCount,
    adapter_names,
    adapter_parameters,
    add_adapter,
    count_parameters,
    delete_adapter,
    disabled,
    rename_adapter,
    routed,
    set_adapter,
    unload,
)
from lorakit.lora.layers import Layer, LoRALinear, Routing, SavedModule, hosts
from lorakit.lora.peft_config import BaseInfo, read_adapter_config
from lorakit.lora.peft_files import load_adapter, save_adapter
from lorakit.lora.quantization import dequantize, loftq, quantize
from lorakit.lora.rank_budget import RankBudget
from lorakit.lora.speedups import Prefix, frozen_blocks, fuse, read_first_row
from lorakit.lora.targets import Target, adaptable_layers, linear_layers, select_targets
from lorakit.lora.updates import UPDATES, AdaLoRA, DoRA, LoRA, LoRAFA, VeRA

__all__ = [
    "ALL_LINEAR",
    "UPDATES",
    "AdaLoRA",
    "BaseInfo",
    "Combined",
    "Data",
    "DoRA",
    "Layer",
    "LoRA",
    "LoRAFA",
    "LoRALinear",
    "LoraConfig",
    "ParameterCount",
    "Prefix",
    "RankBudget",
    "Routing",
    "SavedModule",
    "Start",
    "Target",
    "VeRA",
    "adaptable_layers",
    "adapter_names",
    "adapter_parameters",
    "add_adapter",
    "combine",
    "count_parameters",
    "delete_adapter",
    "dequantize",
    "disabled",
    "frozen_blocks",
    "fuse",
    "hosts",
    "linear_layers",
    "load_adapter",
    "loftq",
    "merge",
    "merge_and_unload",
    "move_adapter",
    "quantize",
    "read_adapter_config",
    "read_first_row",
    "rename_adapter",
    "routed",
    "save_adapter",
    "select_targets",
    "set_adapter",
    "start_from_data",
    "swap_adapter",
    "unload",
    "unmerge",
]
