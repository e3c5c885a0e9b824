"""The matrix of interchange with peft: architectures x variants x checks, each cell run on a tiny random model, offline.

A new variant is a line in VARIANTS, a new architecture one in ARCHITECTURES. A check of a cell passes, has no place in the
model (`n/a`, found in the model itself) or differs for a reason in DIFFERENCES, which names the very error and shows that
peft or transformers makes it without us. Anything else is a failure. `python scripts/interop.py` runs the whole matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.lora import BaseInfo, LoraConfig, add_adapter, load_adapter, merge_and_unload, save_adapter
from lorakit.lora.weight_layouts import geometry_of
from tests.interop.architectures import ARCHITECTURES, LABELS, Architecture
from tests.lora.oracle import fill, peft_load
from tests.tiny import logits, tiny_batch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOLERANCE = 1e-6  # of answers: the CPU's kernels round by where tensors lie in memory; relative to values above 1
TOKENS = (6, 17, 40)  # rows of the vocabulary that the inputs hold

# Variants


class Variant(NamedTuple):
    """Settings, in the names that peft and lorakit share; for which models; and why an answer may not be exact."""

    settings: Callable[[Architecture], dict[str, Any]]
    needs: tuple[type[nn.Module], ...] = ()  # at least one of these modules
    needs_bias: bool = False  # in the adapted layers
    near: str = ""  # why values may differ by up to TOLERANCE


NORMS = "we compute DoRA's row norms by expanding the square, peft from the product B A"
START = (
    "in memory, peft takes the start of PiSSA off the base weight; in the file, and here, it is taken off the update"
)
ORDER = "the same numbers are added in another order"
BIASES = "we add a trained bias to the layer's output; in peft it is part of the layer"
VARIANTS: Mapping[str, Variant] = {
    "plain": Variant(lambda a: {"target_modules": a.targets}),
    "rsLoRA": Variant(lambda a: {"target_modules": a.targets, "use_rslora": True}),
    "DoRA": Variant(lambda a: {"target_modules": a.targets, "use_dora": True}, near=NORMS),
    "rank_pattern": Variant(lambda a: {"target_modules": a.targets, "rank_pattern": {a.targets[0]: 2}}),
    "alpha_pattern": Variant(lambda a: {"target_modules": a.targets, "alpha_pattern": {a.targets[1]: 3.0}}),
    "lora_bias": Variant(lambda a: {"target_modules": a.targets, "lora_bias": True}, near=BIASES),
    "bias lora_only": Variant(
        lambda a: {"target_modules": a.targets, "bias": "lora_only"}, needs_bias=True, near=BIASES
    ),
    "bias all": Variant(lambda a: {"target_modules": a.targets, "bias": "all"}, needs_bias=True, near=BIASES),
    "embedding": Variant(lambda a: {"target_modules": (a.embedding, a.targets[0])}),
    "DoRA embedding": Variant(lambda a: {"target_modules": (a.embedding,), "use_dora": True}, near=NORMS),
    "regex": Variant(lambda a: {"target_modules": rf".*\.({'|'.join(a.targets)})"}),
    "all-linear": Variant(lambda a: {"target_modules": "all-linear"}),
    "layer subset": Variant(lambda a: {"target_modules": a.targets, "layers_to_transform": (a.block,)}),
    "modules_to_save": Variant(lambda a: {"target_modules": a.targets, "modules_to_save": (*a.head, a.also_saved)}),
    "token rows": Variant(
        lambda a: {
            "target_modules": a.targets,
            "trainable_token_indices": TOKENS if a.model else {a.embedding: TOKENS},
        },
        near=ORDER,
    ),
    "conv": Variant(lambda a: {"target_modules": a.conv}, needs=(nn.Conv1d, nn.Conv2d), near=ORDER),
    "MHA": Variant(lambda a: {"target_modules": ("attention",)}, needs=(nn.MultiheadAttention,)),
    "PiSSA converted": Variant(lambda a: {"target_modules": a.targets, "init_lora_weights": "pissa"}, near=START),
}
FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}


class Mismatch(Exception):
    """Both sides answered, and not the same."""


class Case(NamedTuple):
    """One architecture with one variant, in a folder of its own."""

    architecture: Architecture
    variant: Variant
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What both libraries are told."""
        common = {"r": 4, "lora_alpha": 12, "modules_to_save": self.architecture.head}
        return common | self.variant.settings(self.architecture)

    def base(self) -> nn.Module:
        return self.architecture.build()

    def logits(self, model: nn.Module) -> Tensor:
        return logits(model, tiny_batch(base_model(self.architecture)))

    def ours(self) -> nn.Module:
        """Our model with an adapter off its start."""
        model = self.base()
        add_adapter(model, LoraConfig(**self.settings))
        return self.check_changed(fill(model))

    def peft(self, **kw: Any) -> peft.PeftModel:
        """peft's model of the same settings, at its start."""
        settings = json.loads(json.dumps(self.settings))  # lists for tuples
        settings["modules_to_save"] = settings["modules_to_save"] or None
        config = peft.LoraConfig(**settings | kw, task_type=self.architecture.task_type)
        return peft.get_peft_model(self.base(), config).eval()

    def check_changed(self, model: nn.Module) -> nn.Module:
        """The model; a Mismatch if it answers as the base does, so that a comparison would show nothing."""
        if torch.equal(self.logits(model), base_logits(self.architecture)):
            raise Mismatch("the adapter changes no answer")
        return model

    def save(self, model: nn.Module, name: str, config: LoraConfig | None = None, base: str | None = None) -> Path:
        """The folder `name` with our model's adapter."""
        info = BaseInfo(base, task_type=self.architecture.task_type)
        save_adapter(model, self.folder / name, config or LoraConfig(**self.settings), info)
        return self.folder / name

    def auto(self, folder: Path, model: str | None = None) -> nn.Module:
        """The folder as AutoModelFor... of transformers loads it."""
        labels = {"num_labels": LABELS} if self.architecture.head else {}
        loaded: nn.Module = getattr(transformers, self.architecture.auto).from_pretrained(folder, **labels).eval()
        return loaded

    def saved_base(self) -> str:
        folder = self.folder / "base"
        self.base().save_pretrained(folder)  # type: ignore[operator]
        return str(folder)

    def compare(self, have: Mapping[str, Tensor], want: Mapping[str, Tensor], *, exact: bool = False) -> float:
        """The largest difference; a Mismatch for other keys or dtypes, or more than rounding explains."""
        if have.keys() != want.keys():
            raise Mismatch(f"tensors under other names: {sorted(have.keys() ^ want.keys())[:3]}")
        worst = 0.0
        for key in have:
            if have[key].dtype != want[key].dtype:
                raise Mismatch(f"{key} is {have[key].dtype} against {want[key].dtype}")
            off = float((have[key] - want[key]).abs().max())
            if not off <= (0 if exact else TOLERANCE) * max(1, float(want[key].abs().max())):
                raise Mismatch(f"{key} differs by {off:.1e}")
            worst = max(worst, off)
        return worst

    def answers(self, have: nn.Module, want: nn.Module) -> float:
        return self.compare({"logits": self.logits(have)}, {"logits": self.logits(want)})


@functools.cache
def base_model(architecture: Architecture) -> nn.Module:
    """The plain model; not to be changed."""
    return architecture.build()


@functools.cache
def base_logits(architecture: Architecture) -> Tensor:
    """What the plain model answers to the inputs of every check."""
    model = base_model(architecture)
    return logits(model, tiny_batch(model))


# Checks: each gives the largest difference it allowed, and raises where more differs


def ours_to_peft(case: Case) -> float:
    """peft loads our folder, gives the same answers, and writes the same tensors and settings again."""
    model = case.ours()
    folder = case.save(model, "ours")
    theirs = peft_load(case.base(), folder)
    again = peft_write(theirs, case.folder / "ours-by-peft")
    case.compare(tensors(folder), tensors(again), exact=True)
    check_settings(folder, again)
    return case.answers(model, theirs)


def peft_to_ours(case: Case) -> float:
    """we load the folder that peft writes for the same settings, give the same answers, and write the same tensors."""
    theirs, folder = peft_trained(case)
    model = case.base()
    config = load_adapter(model, folder)
    again = case.save(model, "peft-by-ours", config)
    case.compare(tensors(again), tensors(folder), exact=True)
    return case.answers(model, theirs)


def merged_equal(case: Case) -> float:
    """our merged model and the one that peft merges from our folder have the same weights and answers."""
    model = case.ours()
    theirs = peft_load(case.base(), case.save(model, "to-merge")).merge_and_unload()
    merged = merge_and_unload(model)
    case.compare(merged.state_dict(), theirs.state_dict())
    return case.answers(merged, theirs)


def save_load_save(case: Case) -> float:
    """an adapter that is saved, loaded and saved again gives the same answers, and both files have the same bytes."""
    model, loaded = case.ours(), case.base()
    first = case.save(model, "first")
    second = case.save(loaded, "second", load_adapter(loaded, first))
    for name in (CONFIG, WEIGHTS):
        if (first / name).read_bytes() != (second / name).read_bytes():
            raise Mismatch(f"{name} has other bytes after loading and saving")
    return case.answers(loaded, model)


def auto_model(case: Case) -> float:
    """transformers' AutoModelFor... loads our folder and gives the same answers, if it is told the number of labels."""
    model = case.ours()
    return case.answers(case.auto(case.save(model, "auto", base=case.saved_base())), model)


CHECKS: Mapping[str, Callable[[Case], float]] = {
    "ours to peft": ours_to_peft,
    "peft to ours": peft_to_ours,
    "merged equal": merged_equal,
    "save-load-save": save_load_save,
    "AutoModelFor": auto_model,
}


def peft_trained(case: Case) -> tuple[peft.PeftModel, Path]:
    """peft's model moved off its start, and the folder that it writes (of a start like PiSSA's: converted)."""
    theirs = case.peft()
    options = {}
    if (init := case.settings.get("init_lora_weights")) is not None:
        theirs.peft_config["default"].init_lora_weights = True  # as peft's documentation says
        options["path_initial_model_for_weight_conversion"] = str(peft_write(theirs, case.folder / "start"))
        theirs.peft_config["default"].init_lora_weights = init
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.empty_like(parameter).normal_(generator=generator))
    case.check_changed(theirs)
    return theirs, peft_write(theirs, case.folder / "peft", **options)


def peft_write(model: peft.PeftModel, folder: Path, **options: Any) -> Path:
    """Save by peft, without a look at the hub and without a model card."""
    model.create_or_update_model_card = lambda folder: None
    model.save_pretrained(folder, save_embedding_layers=False, **options)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, without the copies of a head's bias that peft writes under its names in memory."""
    return {
        key: tensor
        for key, tensor in load_file(folder / WEIGHTS).items()
        if not re.search(r"\.(original_module|modules_to_save)\.", key)
    }


def check_settings(have: Path, want: Path) -> None:
    """A Mismatch unless both JSON files say the same, but for what peft adds by itself when it loads and saves."""
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (have, want))
    for raw in (ours, theirs):
        raw["base_model_name_or_path"] = None  # peft takes it from the model in memory
        for key in ("target_modules", "modules_to_save"):  # peft writes sets, in any order
            raw[key] = sorted(set(raw[key])) if isinstance(raw[key], list) else raw[key]
    if ours["task_type"] in ("SEQ_CLS", "TOKEN_CLS"):  # peft adds the names of heads that it knows
        ours["modules_to_save"] = sorted({*ours["modules_to_save"], "classifier", "score"})
    names = ours["target_modules"]
    if isinstance(names, list) and len(names) >= 20:  # peft shortens them to suffixes
        ours["target_modules"] = sorted({s for n in names for s in theirs["target_modules"] if n.endswith(s)})
    wrong = {key: (ours.get(key), theirs.get(key)) for key in ours | theirs if ours.get(key) != theirs.get(key)}
    if wrong:
        raise Mismatch(f"settings that peft read and wrote again differ: {wrong}")


# Differences that are known, each with its evidence


class Difference(NamedTuple):
    """Why a check of some cells cannot pass: the error it ends in, and what shows that this is the cause."""

    check: str
    error: str  # a pattern at the start of 'Type: message'
    shown: Callable[[Case], bool]  # mostly by running peft and transformers without us
    why: str


def auto_model_fails_for_peft(case: Case) -> bool:
    """Whether AutoModelFor... does not give peft's own answers from peft's own folder."""
    theirs, folder = peft_trained(case)
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | {"base_model_name_or_path": case.saved_base()}))
    return bool((case.logits(case.auto(folder)) - case.logits(theirs)).abs().max() > 100 * TOLERANCE)


def peft_merge_changes_answers(case: Case) -> bool:
    """Whether peft's model answers differently once it is merged, while ours does not."""
    theirs, _ = peft_trained(case)
    ours = case.ours()
    before, after = case.logits(theirs), case.logits(theirs.merge_and_unload())
    kept, merged = case.logits(ours), case.logits(merge_and_unload(ours))
    return bool((after - before).abs().max() > 100 * TOLERANCE > 10 * (merged - kept).abs().max())


def peft_cannot_load_its_own(case: Case) -> bool:
    """Whether peft refuses the folder that it wrote."""
    _, folder = peft_trained(case)
    try:
        peft_load(case.base(), folder)
    except KeyError:
        return True
    return False


def peft_adds_out_proj_twice(case: Case) -> bool:
    """Whether merging by peft changes the output projection of an attention by twice its update."""
    theirs, folder = peft_trained(case)
    (path, before), *_ = ((path, m.out_proj.weight) for path, m in case.base().named_modules() if is_attention(m))
    A, B = (tensors(folder)[f"base_model.model.{path}.base_layer.out_proj.lora_{factor}.weight"] for factor in "AB")
    change = theirs.merge_and_unload().get_submodule(path).out_proj.weight - before
    scaling = case.settings["lora_alpha"] / case.settings["r"]
    return torch.allclose(change, 2 * scaling * B @ A, atol=TOLERANCE)


def peft_adapts_out_proj_in_vain(case: Case) -> bool:
    """Whether peft adapts the output projection of an attention, and its factors change no answer."""
    theirs, _ = peft_trained(case)
    before = case.logits(theirs)
    idle = [p for path, p in theirs.named_parameters() if "out_proj.lora_" in path]
    with torch.no_grad():
        for parameter in idle:
            parameter.add_(1)
    return bool(idle) and torch.equal(case.logits(theirs), before)


def is_attention(module: nn.Module) -> bool:
    """Whether it is PyTorch's own attention."""
    return isinstance(module, nn.MultiheadAttention)


def we_cannot_merge(case: Case) -> bool:
    """Whether we refuse to merge, as peft does."""
    try:
        merge_and_unload(case.ours())
    except AdapterError:
        return True
    return False


DIFFERENCES: Sequence[Difference] = (
    Difference(
        *("AutoModelFor", "Mismatch: logits differs"),
        shown=lambda case: case.settings.get("use_dora", False) and auto_model_fails_for_peft(case),
        why="transformers leaves DoRA's magnitudes at their start (it looks for them under another name), "
        "so it gives wrong answers from peft's own folders too; PeftModel.from_pretrained reads ours exactly",
    ),
    Difference(
        *("merged equal", "Mismatch: .* differs"),
        shown=lambda case: (
            case.architecture.embedding in case.settings["target_modules"] and peft_merge_changes_answers(case)
        ),
        why="peft merges into a tied embedding in place, which changes the output layer and with it the answers; "
        "we give the embedding a weight of its own, and the merged model answers as before",
    ),
    Difference(
        *("peft to ours", "AdapterError: .* lacks"),
        shown=lambda case: "init_lora_weights" in case.settings and peft_cannot_load_its_own(case),
        why="when peft converts PiSSA it leaves the trained head out of the file, which peft itself cannot load then",
    ),
    *(
        Difference(
            *(check, "Mismatch: .* differs"),
            shown=lambda case: nn.MultiheadAttention in case.variant.needs and peft_adds_out_proj_twice(case),
            why="peft adds the update of an attention's output projection twice; the tensors in the files are the same",
        )
        for check in ("ours to peft", "peft to ours", "merged equal")
    ),
    Difference(
        *("peft to ours", "AdapterError: .* has unexpected .*out_proj.lora_A"),
        shown=peft_adapts_out_proj_in_vain,
        why="peft's all-linear adapts an attention's output projection, which nn.MultiheadAttention never calls, so the "
        "tensors do nothing; we leave it out, and refuse a file with tensors that have no place",
    ),
    Difference(
        *("merged equal", "RuntimeError: Impossible to merge LoRA with `lora_bias=True`"),
        shown=we_cannot_merge,
        why="the layers have no bias into which the trained one could be merged; both refuse it",
    ),
    *(
        Difference(
            *(check, "(ConfigError|AdapterError): .*bias = 'all': .*in_proj_bias cannot be trained by itself"),
            shown=lambda case: any(map(is_attention, base_model(case.architecture).modules())),
            why="the bias inside of nn.MultiheadAttention is trained together with its weights alone; bias = 'all' is "
            "refused here rather than done in part, bias = 'lora_only' works",
        )
        for check in ("ours to peft", "peft to ours", "merged equal", "save-load-save")
    ),
)


# Outcomes


class Outcome(NamedTuple):
    """How one check of one cell ended."""

    status: str  # pass, n/a, pending, differs, FAIL
    reason: str = ""
    difference: float = 0.0


def run_cell(architecture: str, variant: str, folder: Path) -> dict[str, Outcome]:
    """Every check of one cell, by name. `folder` is to be empty."""
    torch.manual_seed(0)  # peft draws what its adapters start from
    case = Case(ARCHITECTURES[architecture], VARIANTS[variant], folder)
    if reason := not_applicable(case):
        return dict.fromkeys(CHECKS, Outcome("n/a", reason))
    if missing := case.settings.keys() - FIELDS:
        return dict.fromkeys(CHECKS, Outcome("pending", f"LoraConfig has no {', '.join(sorted(missing))} yet"))
    if any(
        geometry_of(m) is None for m in base_model(case.architecture).modules() if isinstance(m, case.variant.needs)
    ):
        return dict.fromkeys(CHECKS, Outcome("pending", "no geometry of this layer yet"))
    return {name: run_check(name, case) for name in CHECKS}


def run_check(name: str, case: Case) -> Outcome:
    """One check of one cell."""
    if name == "AutoModelFor" and not case.architecture.model:
        return Outcome("n/a", "no model of transformers, so AutoModelFor... has no class for it")
    try:
        return Outcome("pass", difference=CHECKS[name](case))
    except Exception as err:
        message = " ".join(f"{type(err).__name__}: {err}".split())
    for known in DIFFERENCES:
        if known.check == name and re.match(known.error, message) and known.shown(case):
            return Outcome("differs", known.why)
    return Outcome("FAIL", message)


def not_applicable(case: Case) -> str:
    """Why the variant has no place in the model, found in the model; empty where it has one."""
    model, variant = base_model(case.architecture), case.variant
    if variant.needs and not any(isinstance(module, variant.needs) for module in model.modules()):
        return f"no {' or '.join(f'nn.{kind.__name__}' for kind in variant.needs)} in the model"
    targets = [m for path, m in model.named_modules() if path.endswith(case.architecture.targets)]
    if variant.needs_bias and not any(getattr(module, "bias", None) is not None for module in targets):
        return "the adapted layers have no bias"
    return ""
