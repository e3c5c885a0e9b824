"""Everything a run needs before its first step, checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import torch
from torch import nn

from lorakit.data.example import Example
from lorakit.errors import ConfigError, ModelError
from lorakit.lora import (
    ALL_LINEAR,
    Data,
    LoraConfig,
    ParameterCount,
    Start,
    Target,
    add_adapter,
    count_parameters,
    delete_adapter,
    loftq,
    quantize,
    start_from_data,
)
from lorakit.lora.config import DATA_INIT_NAMES
from lorakit.lora.targets import passed_by
from lorakit.models import BaseModel, depends_on_batch, has_dropout, load_base
from lorakit.recipe import LOFTQ, Recipe
from lorakit.runtime.device import DTYPE_NAMES, cast_frozen_, pick_device, pick_dtype, shard_frozen_, to_device
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.events import Note, Report, ignore
from lorakit.tasks.base import Fit, Item, Task, rows_of
from lorakit.tasks.embedding import form_of
from lorakit.tasks.registry import make_task, task_layers
from lorakit.training.begin import Origin, begin_from
from lorakit.training.budget import DROPOUT_FROM, choose, choose_head_start
from lorakit.training.encode import encode
from lorakit.training.head_start import States, probe
from lorakit.training.parts import Part, count_cut, in_folds, label_texts, labels_in, read_parts, with_usual_columns
from lorakit.training.run_files import keeps_last
from lorakit.training.schedule import Plan

T = TypeVar("T")
INIT_STEPS = 8  # steps whose batches an initialisation from data sees


class Once:
    """What several recipes have in common, made for the first of them: results by what they depend on."""

    def __init__(self, several: bool = False) -> None:
        """`several` says that there is more than one recipe, so that base models are kept as well."""
        self.several = several
        self._made: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when it was first called for this key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


@dataclass(frozen=True)
class Prepared:
    """A model with its adapter in place, a task, encoded data and a plan."""

    recipe: Recipe
    base: BaseModel
    task: Task
    labels: tuple[str, ...]
    tuned: Mapping[str, Any]  # what answers need besides the model
    config: LoraConfig | None  # None with train.method = full
    targets: Sequence[Target]
    parameters: ParameterCount
    parts: dict[str, Part]  # train, validation, and test where there is one
    plan: Plan
    fingerprints: dict[str, str]  # source -> sha256
    left_out: dict[str, int]  # source -> records that could not be used, where there are some
    cut: dict[str, int]  # part -> texts that are not read to their end, where there are some
    device: torch.device
    dtype: torch.dtype
    kernels: tuple[str, ...]  # the speed-ups in use, in words
    has_new_head: bool = False
    probed: bool = False  # whether its head starts at the linear probe
    ranks: Ranks = ALONE
    origin: Origin | None = None  # the adapter that it begins from
    adapter: str = "default"  # its name in the model, which others may share
    draws: bool = True  # whether anything is dropped at random in training
    folds: tuple[Prepared, ...] = ()  # over the same model: trained without a fold each, which is their validation part
    fold_of: Sequence[int] = ()  # the fold of each training example; together the folds are the validation part

    @property
    def model(self) -> nn.Module:
        return self.base.model

    @property
    def n_folds(self) -> int:
        """The folds of the cross-validation; 0 without one."""
        return max(self.fold_of, default=-1) + 1

    @property
    def contrasts(self) -> bool:
        """Whether its adapter is to learn from pairs of texts before the first step."""
        return self.probed and self.recipe.train.head_start == "contrast"

    @property
    def scores_first(self) -> bool:
        """Whether it is scored before the first step: at the linear probe, or as the untouched base."""
        return self.probed or (self.task.info.contrasts and not self.has_new_head)

    @property
    def keeps_last(self) -> bool:
        """Whether the last step is kept and not the best; see `run_files.keeps_last`."""
        data, train = self.recipe.data, self.recipe.train
        return keeps_last(data.validation, data.folds, train.patience, len(self.parts["validation"].examples))


def prepare(
    recipe: Recipe,
    report: Report = ignore,
    ranks: Ranks = ALONE,
    once: Once | None = None,
    fold: int | None = None,
) -> Prepared:
    """Read the data, load the model, put the adapter in place; on all ranks the same.

    With `once`, what an earlier recipe has read and encoded in the same way is taken from it. With `fold`, a number from 0,
    the examples of that fold are not trained on but are the validation part; without, all are both where there are folds.

    Raises:
        LorakitError: a DataError, ModelError or ConfigError for whatever cannot be used; nothing was written.
    """
    recipe.check_processes(ranks.size)
    device = pick_device(recipe.train.device, "train.device")
    # by measurement, so by one of them
    dtype = ranks.first(pick_dtype, recipe.model.dtype, recipe.train.method, device)
    with ranks.together():
        prepared = _prepare(with_usual_columns(recipe, report), report, device, dtype, once or Once(), fold)
    _check_alike(prepared, ranks)
    model = prepared.model  # of which the first rank has what is trained, and what adapters start from or keep frozen
    buffers = [buffer for name, buffer in model.named_buffers() if ".adapters." in name]
    ranks.copy_first_([*(p for p in model.parameters() if p.requires_grad), *buffers])
    if recipe.train.shard_base:
        if ranks.size > 1:
            shard_frozen_(prepared.model)
        else:
            report(Note("train.shard_base = true: a run of one process keeps the whole base"))
    prepared.model.to(device)
    return replace(prepared, ranks=ranks)


def _prepare(
    recipe: Recipe, report: Report, device: torch.device, dtype: torch.dtype, once: Once, fold: int | None
) -> Prepared:
    recipe, origin = begin_from(recipe)
    train, info = recipe.train, recipe.task.info
    split_by = (train.seed, train.method, train.shard_base) if recipe.data.validation is None else None
    source = (recipe.data.model_dump_json(), recipe.task.name, split_by)
    examples, fingerprints, left_out = once(source, lambda: read_parts(recipe, report, again=True))
    examples, fold_of = in_folds(recipe, examples, fold)
    folds = max(fold_of, default=-1) + 1
    recipe = recipe.with_keys(data={"folds": folds})
    without_dropout = recipe.model.dropout is None and len(examples["train"]) < DROPOUT_FROM
    if without_dropout:
        recipe = recipe.with_keys(model={"dropout": 0.0})
    labels = labels_in(recipe, examples, report)
    origin = origin and origin.for_labels(recipe, labels)
    base = _load(recipe, labels, once if once.several or folds else None)
    names = label_texts(recipe, labels, examples["train"], base.tokenizer)
    if names and recipe.data.label_names is None:
        report(Note(f"the names of the {len(names)} labels are trained on as texts too (data.label_names)"))
    recipe = recipe.with_keys(data={"label_names": bool(names)})
    recipe, dtype = _complete(recipe, base, dtype, examples["train"], report)
    max_length = recipe.data.max_length or base.max_length

    def encoded() -> tuple[Fit, dict[str, Part], dict[str, int]]:
        fit = make_task(recipe.task, base.tokenizer, labels, max_length).fit(examples["train"])
        cache = None if recipe.data.cache is None else Path(recipe.data.cache)
        # all fingerprints, since what a task takes from train (a mean) is in the items of every part
        made_of = [labels, recipe.task.model_dump(mode="json"), max_length, sorted(fingerprints.values())]
        parts = {
            name: Part(part, encode(fit.task, part, cache, base.tokenizer, made_of)) for name, part in examples.items()
        }
        cut = count_cut(fit.task, parts, max_length, report)
        parts.setdefault("validation", parts["train"])
        if names:
            parts["train"] = replace(parts["train"], names=[item for (item,) in fit.task.encode(names)])
        return fit, parts, cut

    made_for = (source, fold, bool(names), recipe.task.model_dump_json(), base.fingerprint, max_length)
    (task, head_bias, tuned), parts, cut = once(made_for, encoded)
    items = parts["train"].drawn(info)
    head = None if origin and origin.keeps_head else base.new_head()
    n = len(items) - len(parts["train"].names)
    head_start = recipe.train.head_start if head is None else choose_head_start(recipe, items[:n] if names else items)
    probed = head is not None and head_start != "random"
    if head is not None and probed:
        over = (recipe.task.model_dump_json(), base.fingerprint, max_length, recipe.model.model_dump_json(), train.seed)
        known: States | None = once(("states", source, *over), dict) if folds else None
        probed_head = once(
            ("probe", source, fold, bool(names), *over),
            lambda: _probe(base.model.to(device), head, task, parts["train"].flat, origin, known),
        )
        head.load_state_dict(probed_head)
    elif head is not None and head_bias is not None:
        head.bias.data.copy_(head_bias)
    others = {"model.dropout": 0.0} if without_dropout else {}
    is_binary = info.model_kind in ("sequence_classification", "regression") and len(labels) <= 2
    started = train.model_copy(update={"head_start": head_start})
    is_last = keeps_last(recipe.data.validation, folds, train.patience, len(parts["validation"].examples))
    chosen = choose(started, n, is_binary, report, others, is_last)
    recipe = recipe.model_copy(update={"train": chosen})
    written = [len(item["labels"]) for item in items] if info.model_kind == "text2text" else ()
    lengths = [sum(len(row["input_ids"]) for row in rows_of(info, [each])) for each in items]
    is_paired = info.wants == "related" and form_of(parts["train"].examples[0]) == "classes"
    plan = Plan(lengths, chosen, written, [each[0]["labels"][0] for each in items] if is_paired else ())
    if recipe.lora.init in DATA_INIT_NAMES:
        base.model.to(device)
    config, targets = _adapt(recipe, base, _first_batches(base.model, task, items, plan, device), report, origin)
    cast_frozen_(base.model, dtype)
    # with shard_base weights come and go around a module's own call
    plain = recipe.model.kernels == "plain" or recipe.train.shard_base
    total = sum(p.numel() for p in base.model.parameters())
    return Prepared(
        recipe=recipe,
        base=base,
        task=task,
        labels=labels,
        tuned=tuned,
        config=config,
        targets=targets,
        parameters=count_parameters(base.model) if config else ParameterCount(lora=0, saved=total, total=total),
        parts=parts,
        plan=plan,
        fingerprints=fingerprints,
        left_out=left_out,
        cut=cut,
        device=device,
        dtype=dtype,
        has_new_head=head is not None,
        probed=probed,
        kernels=() if plain else base.speed_up(device),
        draws=has_dropout(base.model),
        fold_of=fold_of,
        origin=origin,
    )


def _load(recipe: Recipe, labels: tuple[str, ...], once: Once | None) -> BaseModel:
    """The base model with the layers that the task adds; with `once`, over weights that recipes alike in this share."""
    model, info, outputs = recipe.model, recipe.task.info, recipe.task.info.outputs(labels)

    def load() -> BaseModel:
        return load_base(
            model.base,
            info.model_kind,
            labels=outputs,
            revision=model.revision,
            dropout=model.dropout,
            seed=recipe.train.seed,
            pooling=model.pooling,
        )

    if once is not None and recipe.train.method != "full":
        settings = (model.base, model.revision, model.dropout, info.model_kind)
        form = ("base", settings, tuple(outputs), recipe.train.seed)
        first = once((*form, model.pooling), load)
        base = once((*form, first.pooling), lambda: first).copy()  # a fold's recipe says what "auto" was
    else:
        base = load()
    return base.with_layers(task_layers(recipe.task, labels))


def _complete(
    recipe: Recipe, base: BaseModel, dtype: torch.dtype, examples: Sequence[Example], report: Report
) -> tuple[Recipe, torch.dtype]:
    """The recipe with dtype, pooling and task settings that depend on the base model filled in, and the dtype."""
    info = recipe.task.info
    if dtype == torch.float16 and "t5" in (family := str(base.model.config.model_type)):  # type: ignore[union-attr]
        if recipe.model.dtype == "fp16":
            raise ConfigError(f"model.dtype = 'fp16': {base.name} ({family}) computes numbers beyond fp16; use 'fp32'")
        dtype = torch.float32
    for note in base.notes:
        report(Note(note))
    is_head = info.model_kind != "embedding"  # which pools as its checkpoint says
    if recipe.model.pooling == "auto" and is_head and base.own_pooling not in ("", "cls"):
        own = f"{base.name}: its checkpoint turns a text into a vector by {base.own_pooling} (1_Pooling)"
        same = base.pooling == base.own_pooling
        does = "so does the classifier" if same else "the classifier uses the head of its model family"
        report(Note(f"{own}; {does} (model.pooling = {base.pooling!r})"))
    recipe = recipe.with_keys(model={"dtype": DTYPE_NAMES[dtype], "pooling": base.pooling})
    if (recipe.data.max_length or 0) > base.max_length:
        raise ConfigError(
            f"data.max_length = {recipe.data.max_length}: {base.name} reads at most {base.max_length} tokens"
        )
    if depends_on_batch(base.model):
        apart = "only texts of the same length are predicted together"
        report(Note(f"{base.name}: its predictions depend on padding; {apart}"))
    if info.complete:
        section = resolve_name(info.complete)(recipe.task, base.layout, examples)
        recipe = recipe.model_copy(update={"task": section})
    return recipe, dtype


def _probe(
    model: nn.Module, head: nn.Linear, task: Task, items: Sequence[Item], origin: Origin | None, known: States | None
) -> Any:
    """The linear probe over the frozen base, or over the adapter that the run begins from."""
    if origin is None:
        return probe(model, head, task, items, known)
    origin.load(model, ())
    state = probe(model, head, task, items, known)
    delete_adapter(model, "default")
    return state


def _check_alike(prepared: Prepared, ranks: Ranks) -> None:
    """Refuse ranks that would train different things: each of them has read the files of its own machine."""
    facts: dict[str, Any] = {
        "recipe": prepared.recipe.to_toml(),
        "data": prepared.fingerprints,
        "base model": prepared.base.fingerprint,
        "adapter": [(name, tuple(p.shape)) for name, p in prepared.model.named_parameters() if p.requires_grad],
    }
    every = ranks.gather(facts)
    with ranks.together():
        for rank, theirs in enumerate(every):
            for what, value in theirs.items():
                if value != every[0][what]:
                    raise ConfigError(f"rank {rank} has another {what} than rank 0")


def _first_batches(model: nn.Module, task: Task, items: Sequence[Any], plan: Plan, device: torch.device) -> Data:
    """The first batches of training, for an initialisation that looks at data; collated as they are asked for."""
    size = plan.micro_batch_size
    batches = (
        to_device(task.collate(rows_of(task.info, [items[i] for i in positions[j : j + size]])), device)
        for positions in islice(plan.batches(0), INIT_STEPS)
        for j in range(0, len(positions), size)
    )
    return Data(batches, lambda batch: task.losses(model, dict(batch)).sum())


def _adapt(
    recipe: Recipe, base: BaseModel, data: Data, report: Report, origin: Origin | None
) -> tuple[LoraConfig | None, Sequence[Target]]:
    """Make trainable what the method trains: look at data and quantise the base if the recipe says so, and add the
    adapter."""
    model, method = base.model, recipe.train.method
    if method == "full":
        model.requires_grad_(True)
        return None, ()
    if origin is not None:
        if recipe.model.quantize != "none":
            quantize(model, recipe.model.quantize, skip=(*origin.kept_modules(model), *base.saved_modules))
        head = "" if not base.saved_modules else "; its head is kept" if origin.keeps_head else "; the head is new"
        report(
            Note(f"starts from {origin.name}, trained on {', '.join(origin.side.data) or 'data not recorded'}{head}")
        )
        return origin.load(model, base.saved_modules)
    config = recipe.lora.config(modules_to_save=base.saved_modules)
    if method == "head":
        if not config.modules_to_save:
            raise ModelError(f"train.method = 'head': {base.name} has no head to train for {recipe.task.name}")
        config = LoraConfig(target_modules=(), modules_to_save=config.modules_to_save)
    elif small := passed_by(model, config):
        more = "" if len(small) == 1 else f" and {len(small) - 1} more"
        report(Note(f"lora.target_modules = '{ALL_LINEAR}' leaves out {small[0]}{more} (too small for r = {config.r})"))
    starts_by_loftq, seed = recipe.lora.init == LOFTQ, recipe.train.seed
    original = model.state_dict() if starts_by_loftq else {}
    start = Start(config, {})
    if config.init_lora_weights in DATA_INIT_NAMES:
        start = start_from_data(model, config, data, seed)
    if recipe.model.quantize != "none":
        quantize(model, recipe.model.quantize, skip=config.modules_to_save)
    targets = add_adapter(model, start.config, seed=seed, factors=start.factors)
    if starts_by_loftq and targets:
        loftq(model, original)
    return start.config, targets
