"""The adapter that a run begins from (`model.adapter`): whether it can, and its way into the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lorakit.errors import ConfigError, OutputError
from lorakit.hashing import fingerprint_of
from lorakit.inference.adapter_folder import read_side, shipped_folder
from lorakit.inference.side import Side
from lorakit.lora import LoraConfig, Target, load_adapter, read_adapter_config
from lorakit.lora.inject import insert_adapter
from lorakit.lora.peft_files import reload_adapter
from lorakit.lora.targets import select_targets
from lorakit.model_files import find
from lorakit.recipe import PEFT_NAMES, LoraSection, Recipe

# what a run may say otherwise than the adapter that it begins from: dropout acts in training alone
FREE = ("dropout", "modules_to_save", "target_r")


@dataclass(frozen=True)
class Origin:
    """An adapter to begin from."""

    name: str  # as the user wrote it
    folder: Path
    side: Side
    config: LoraConfig
    keeps_head: bool = True

    def facts(self) -> dict[str, str]:
        """What the next adapter records of it."""
        sha256 = self.side.files.get("adapter_model.safetensors", "")
        return {"adapter": self.name, "sha256": sha256, "head": "kept" if self.keeps_head else "new"}

    def for_labels(self, recipe: Recipe, labels: Sequence[str]) -> Origin:
        """The same, with its head where it answers with these labels, else without.

        Raises:
            ConfigError: `model.adapter_head` is "keep" and it answers with others.
        """
        theirs, task = self.side.task, recipe.task
        agree = (theirs.name, theirs.crf, self.side.labels) == (task.name, task.crf, tuple(labels))
        if recipe.model.adapter_head == "keep" and not agree:
            raise ConfigError(
                f"model.adapter_head = 'keep': {self.name} is for {theirs.name} with the labels {_few(self.side.labels)}; "
                f"this run is for {task.name} with {_few(labels)}"
            )
        return replace(self, keeps_head=agree and recipe.model.adapter_head != "new")

    def kept_modules(self, model: nn.Module) -> tuple[str, ...]:
        """The modules that it saves in full and that this run goes on with."""
        names = self.config.modules_to_save
        return names if self.keeps_head else tuple(name for name in names if not _is_head(model, name))

    def load(self, model: nn.Module, saved: Sequence[str]) -> tuple[LoraConfig, list[Target]]:
        """Add it to the model, trainable. `saved` are the modules that an adapter of this run saves: where its head is not
        kept, those that it has not start as they are.

        Raises:
            AdapterError: it does not fit this model.
        """
        if self.keeps_head:
            config = load_adapter(model, self.folder)
        else:
            theirs = self.kept_modules(model)
            own = [name for name in saved if name not in theirs]
            config = replace(self.config, modules_to_save=(*theirs, *own))
            insert_adapter(model, config, "default")
            left = [name for name in self.config.modules_to_save if name not in theirs]
            reload_adapter(model, self.folder, without=(*left, *own))
        return config, select_targets(model, config)


def begin_from(recipe: Recipe) -> tuple[Recipe, Origin | None]:
    """The recipe with the settings of the adapter that it begins from, and that adapter; read before any weights.

    Raises:
        ConfigError: there is none, it belongs to another base, or the recipe says otherwise than it.
        AdapterError: it is damaged.
    """
    model, given, name = recipe.model, recipe.lora.model_fields_set, recipe.model.adapter
    if name is None:
        return recipe, None
    where = f"model.adapter = {name!r}"
    try:
        folder = shipped_folder(Path(name))
    except OutputError as err:
        raise ConfigError(f"{where}: {err}") from err
    side = read_side(folder)
    if side.method == "full":
        raise ConfigError(f"{where}: a whole model, not an adapter; use it as the base: model.base = {str(folder)!r}")
    if differences := side.base.fingerprint.differences(fingerprint_of(find(model.base, model.revision))):
        raise ConfigError(
            f"{where}: trained on {side.base.name!r}, of which {model.base!r} differs: {'; '.join(differences)}"
        )
    config = read_adapter_config(folder)[0]
    if not config.target_modules:
        raise ConfigError(f"{where}: only a head (train.method = 'head'), without adapted layers")
    own_names = {name: key for key, name in PEFT_NAMES.items()}
    settings = {own_names.get(key, key): value for key, value in vars(config).items()}
    section = LoraSection(**settings | {"modules_to_save": recipe.lora.modules_to_save})
    if "dropout" in given:
        section = section.model_copy(update={"dropout": recipe.lora.dropout})
    theirs = {f"lora.{key}": (getattr(recipe.lora, key), getattr(section, key)) for key in given if key not in FREE}
    for key, own in {"quantize": side.quantize, "pooling": side.pooling}.items():
        if key in model.model_fields_set and getattr(model, key) != "auto":
            theirs[f"model.{key}"] = (getattr(model, key), own)
        else:
            model = model.model_copy(update={key: own})
    for key, (ours, own) in sorted(theirs.items()):
        if ours != own:
            raise ConfigError(
                f"{key} = {ours!r}: {name}, which the run starts from, has {own!r}; leave this setting out"
            )
    return recipe.model_copy(update={"model": model, "lora": section}), Origin(name, folder, side, config)


def _is_head(model: nn.Module, name: str) -> bool:
    """Whether a saved module is the output layer, at the top of its model, or one that this model has not."""
    return not any((path == name and "." in path) or path.endswith("." + name) for path, _ in model.named_modules())


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "") or "none"
