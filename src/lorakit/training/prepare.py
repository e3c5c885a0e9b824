"""Everything a run needs before its first step, checked before anything is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import torch
from torch import nn

from lorakit.data.audit import alike
from lorakit.data.batches import number_folds, split
from lorakit.data.example import OF_TRAINING, Dataset, Example, columns_of
from lorakit.data.files import means_files
from lorakit.data.read import find_choices, read, usual_pair
from lorakit.errors import ConfigError, ModelError
from lorakit.inference.answer import chunks
from lorakit.lora import (
    ALL_LINEAR,
    Data,
    LoraConfig,
    ParameterCount,
    SavedModule,
    Start,
    Target,
    add_adapter,
    count_parameters,
    delete_adapter,
    hosts,
    loftq,
    quantize,
    start_from_data,
)
from lorakit.lora.config import DATA_INIT_NAMES
from lorakit.lora.targets import passed_by
from lorakit.models import BaseModel, depends_on_batch, has_dropout, load_base
from lorakit.recipe import LOFTQ, DataSection, Recipe
from lorakit.runtime.device import DTYPE_NAMES, cast_frozen_, pick_device, pick_dtype, shard_frozen_, to_device
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.events import Note, Report, ignore
from lorakit.task_info import TaskInfo
from lorakit.tasks.base import Fit, Item, Task, rows_of
from lorakit.tasks.embedding import form_of
from lorakit.tasks.metrics.bootstrap import FEW
from lorakit.tasks.registry import check_labels, find_labels, make_task, task_layers
from lorakit.training.begin import Origin, begin_from
from lorakit.training.budget import DROPOUT_FROM, choose, choose_head_start
from lorakit.training.encode import CachedItems, encode
from lorakit.training.head_start import States, probe
from lorakit.training.run_files import keeps_last
from lorakit.training.schedule import Plan

T = TypeVar("T")
# Below so many examples a share of them says little, and is missed in training: so many folds. More of them take more time.
FOLDS = ((200, 3), (500, 2))
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
        found: T = self._made[key]
        return found


@dataclass(frozen=True)
class Part:
    """One part of the data, encoded."""

    examples: Sequence[Example]
    items: Sequence[Sequence[Item]]  # of each example

    @cached_property
    def sha256(self) -> str:
        """Of what the tokenizer made of the examples."""
        digest = hashlib.sha256()
        for item in self.flat:
            digest.update(repr(sorted(item.items())).encode())
        return digest.hexdigest()

    def drawn(self, info: TaskInfo) -> Sequence[Any]:
        """What training draws from, for `rows_of`: items or, where the task contrasts, those of whole examples."""
        return self.items if info.contrasts else self.flat

    @cached_property
    def flat(self) -> Sequence[Item]:
        """All items in a row."""
        if isinstance(self.items, CachedItems):
            return self.items.flat
        return [item for of_example in self.items for item in of_example]


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
    if ranks.size > 1 and recipe.task.info.contrasts:
        raise ConfigError(
            f"task.name = {recipe.task.name!r} compares the texts of a whole batch, so it trains in one process, "
            f"not in {ranks.size}; use train.micro_batch_size for a large batch"
        )
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
    train = recipe.train
    split_by = (train.seed, train.method, train.shard_base) if recipe.data.validation is None else None
    source = (recipe.data.model_dump_json(), recipe.task.name, split_by)
    examples, fingerprints, left_out = once(source, lambda: read_parts(recipe, report, again=True))
    folds = 0
    fold_of: Sequence[int] = ()
    if "validation" not in examples:
        every = examples["train"]
        folds = count_folds(recipe, len(every))
        fold_of = number_folds(every, folds, recipe.train.seed, by_group=recipe.data.group is not None)
        if fold is not None:
            numbered = list(zip(every, fold_of, strict=True))
            examples = {
                "train": [example for example, number in numbered if number != fold],
                "validation": [example for example, number in numbered if number == fold],
            }
    recipe = recipe.with_keys(data={"folds": folds})
    without_dropout = recipe.model.dropout is None and len(examples["train"]) < DROPOUT_FROM
    if without_dropout:
        recipe = recipe.with_keys(model={"dropout": 0.0})
    labels = _labels_in(recipe, examples, report)
    origin = origin and origin.for_labels(recipe, labels)
    outputs = recipe.task.info.outputs(labels)

    def loaded() -> BaseModel:
        return load_base(
            recipe.model.base,
            recipe.task.info.model_kind,
            labels=outputs,
            revision=recipe.model.revision,
            dropout=recipe.model.dropout,
            seed=train.seed,
            pooling=recipe.model.pooling,
        )

    if (once.several or folds) and train.method != "full":
        settings = (recipe.model.base, recipe.model.revision, recipe.model.dropout, recipe.task.info.model_kind)
        form = ("base", settings, tuple(outputs), train.seed)
        kept = once((*form, recipe.model.pooling), loaded)
        base = once((*form, kept.pooling), lambda: kept).copy()  # a fold's recipe says what "auto" was
    else:
        base = loaded()
    base = base.with_layers(task_layers(recipe.task, labels))
    if dtype == torch.float16 and "t5" in (family := str(base.model.config.model_type)):  # type: ignore[union-attr]
        if recipe.model.dtype == "fp16":
            raise ConfigError(f"model.dtype = 'fp16': {base.name} ({family}) computes numbers beyond fp16; use 'fp32'")
        dtype = torch.float32
    recipe = recipe.with_keys(model={"dtype": DTYPE_NAMES[dtype]})
    for note in base.notes:
        report(Note(note))
    is_head = recipe.task.info.model_kind != "embedding"  # which pools as its checkpoint says
    if recipe.model.pooling == "auto" and is_head and base.own_pooling not in ("", "cls"):
        own = f"{base.name}: its checkpoint turns a text into a vector by {base.own_pooling} (1_Pooling)"
        does = (
            "so does the classifier"
            if base.pooling == base.own_pooling
            else "the classifier uses the head of its model family"
        )
        report(Note(f"{own}; {does} (model.pooling = {base.pooling!r})"))
    recipe = recipe.with_keys(model={"pooling": base.pooling})
    max_length = recipe.data.max_length or base.max_length
    if max_length > base.max_length:
        raise ConfigError(f"data.max_length = {max_length}: {base.name} reads at most {base.max_length} tokens")
    if depends_on_batch(base.model):
        apart = "only texts of the same length are predicted together"
        report(Note(f"{base.name}: its predictions depend on padding; {apart}"))

    if complete := recipe.task.info.complete:
        task_section = resolve_name(complete)(recipe.task, base.layout, examples["train"])
        recipe = recipe.model_copy(update={"task": task_section})

    def encoded() -> tuple[Fit, dict[str, Part], dict[str, int]]:
        fit = make_task(recipe.task, base.tokenizer, labels, max_length).fit(examples["train"])
        cache = None if recipe.data.cache is None else Path(recipe.data.cache)
        # all fingerprints, since what a task takes from train (a mean) is in the items of every part
        made_of = [labels, recipe.task.model_dump(mode="json"), max_length, sorted(fingerprints.values())]
        parts = {
            name: Part(part, encode(fit.task, part, cache, base.tokenizer, made_of)) for name, part in examples.items()
        }
        cut = _count_cut(fit.task, parts, max_length, report)
        parts.setdefault("validation", parts["train"])
        return fit, parts, cut

    made_for = (source, fold, recipe.task.model_dump_json(), base.fingerprint, max_length)
    (task, head_bias, tuned), parts, cut = once(made_for, encoded)
    items = parts["train"].drawn(recipe.task.info)
    head = None if origin and origin.keeps_head else base.new_head()
    head_start = recipe.train.head_start if head is None else choose_head_start(recipe, items)
    probed = head is not None and head_start != "random"
    if head is not None and probed:
        over = (recipe.task.model_dump_json(), base.fingerprint, max_length, recipe.model.model_dump_json(), train.seed)
        known: States | None = once(("states", source, *over), dict) if folds else None
        found = once(
            ("probe", source, fold, *over),
            lambda: _probe(base.model.to(device), head, task, parts["train"].flat, origin, known),
        )
        head.load_state_dict(found)
    elif head is not None and head_bias is not None:
        head.bias.data.copy_(head_bias)
    others = {"model.dropout": 0.0} if without_dropout else {}
    is_binary = recipe.task.info.model_kind in ("sequence_classification", "regression") and len(labels) <= 2
    started = train.model_copy(update={"head_start": head_start})
    is_last = keeps_last(recipe.data.validation, folds, train.patience, len(parts["validation"].examples))
    chosen = choose(started, len(items), is_binary, report, others, is_last)
    recipe = recipe.model_copy(update={"train": chosen})
    info = recipe.task.info
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


def _probe(
    model: nn.Module, head: nn.Linear, task: Task, items: Sequence[Item], origin: Origin | None, known: States | None
) -> Any:
    """The linear probe over the frozen base, or over the adapter that the run begins from."""
    if origin is None:
        return probe(model, head, task, items, known)
    origin.load(model, ())
    found = probe(model, head, task, items, known)
    delete_adapter(model, "default")
    return found


def _labels_in(recipe: Recipe, examples: Mapping[str, Sequence[Example]], report: Report) -> tuple[str, ...]:
    """The labels of the training examples, which every other example has to have; a note where some look alike."""
    held_out = examples.get("validation", ()) if recipe.data.validation is None else ()
    every = chain(examples["train"], held_out)  # a rare label may be held out by chance
    labels = find_labels(recipe.task.name, every, recipe.task.order)
    for part in examples.values():
        check_labels(recipe.task.name, part, labels)
    if groups := [" / ".join(map(repr, group)) for group in alike(labels)]:
        shown = ", ".join(groups[:5])
        report(Note(f"labels that differ only in case, number format or invisible characters: {shown}"))
    return labels


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


def with_usual_columns(recipe: Recipe, report: Report = ignore) -> Recipe:
    """The recipe with data.pair where neither it nor data.text is named and two columns have the usual names of pairs.

    Where the task wants choices it is data.choices: answers to unlabelled records read these columns too.
    """
    data, task = recipe.data, recipe.task.info
    if task.wants == "choices":
        if data.train is None or data.choices is not None:
            return recipe
        if (choices := find_choices(data.train, columns_of(data), data.format)) is not None:
            names = (choices,) if isinstance(choices, str) else choices
            report(Note(f"{data.train}: choices are column {', '.join(map(repr, names))}"))
            return recipe.with_keys(data={"choices": choices})
        return recipe
    if data.train is None or task.wants == "words" or task.model_kind == "text2text":
        return recipe
    if (pair := usual_pair(data.train, columns_of(data), data.format)) is None:
        return recipe
    report(Note(f"{data.train}: pair is column {pair!r}; to read a single text, set data.text"))
    return recipe.with_keys(data={"pair": pair})


def read_parts(
    recipe: Recipe, report: Report = ignore, *, again: bool = False
) -> tuple[dict[str, Sequence[Example]], dict[str, str], dict[str, int]]:
    """The examples of train, validation and (where named) test, the sources' fingerprints, and how many records of each
    source were left out where some were. In cross-validation there is no part for validation.

    With `again`, and a cache for what they are encoded to, those of train are read again for each pass over them.
    """
    data = recipe.data
    if data.train is None:
        raise ConfigError("data.train is missing; give a file, a folder or a data set")
    again = again and data.cache is not None
    if again and data.validation is None and means_files(data.train):
        raise ConfigError(
            f"data.train = {data.train!r}: with data.cache it is not kept in memory, so no share of it can be held "
            "out; set data.validation"
        )
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    found = {
        name: read_part(recipe, source, name, report, again=again and name == "train" and data.validation is not None)
        for name, source in sources.items()
        if source
    }
    examples: dict[str, Sequence[Example]] = {name: dataset.examples for name, dataset in found.items()}
    if "validation" not in examples:
        every, share, seed = examples["train"], data.validation_share, recipe.train.seed
        if len(every) < 2:
            raise ConfigError(f"{data.train}: a single example cannot be split; set data.validation")
        apart = f", and no {data.group} is on both sides" if data.group else ""
        chosen = f"chosen by seed {seed}, the same share of each label{apart}"
        if folds := count_folds(recipe, len(every)):
            how = (
                f"{folds}-fold cross-validation, {chosen}; data.folds = 0 is faster, and holds out {share:.0%} instead"
            )
            ships = f"the adapter is trained on all {len(every)} examples"
            report(Note(f"no data.validation: {ships}; its score comes from {how}"))
        else:
            examples["train"], examples["validation"] = split(every, share, seed, by_group=data.group is not None)
            n = len(examples["validation"])
            is_last = keeps_last(None, 0, recipe.train.patience, n)
            few = (
                f"; they are too few (below {FEW}) to choose the best step, so the last one is kept" if is_last else ""
            )
            report(Note(f"no data.validation: {n} examples ({n / len(every):.0%}) are held out, {chosen}{few}"))
    left_out = {dataset.source: dataset.left_out for dataset in found.values() if dataset.left_out}
    return examples, {dataset.source: dataset.sha256 for dataset in found.values()}, left_out


def count_folds(recipe: Recipe, n: int) -> int:
    """The folds of a cross-validation over `n` examples; 0 where a share of them is held out.

    Raises:
        ConfigError: data.folds is more than `n`.
    """
    data, train = recipe.data, recipe.train
    if recipe.task.info.wants == "related":  # answers of several models cannot be ranked together
        return 0
    if data.folds == "auto":
        is_share = "validation_share" in data.model_fields_set or data.cache is not None
        if is_share or train.method == "full" or train.shard_base:
            return 0
        return min(n, next((folds for most, folds in FOLDS if n < most), 0))
    if data.folds > n:
        raise ConfigError(f"data.folds = {data.folds}: {data.train} has {n} examples")
    return data.folds


def read_part(recipe: Recipe, source: str, split_name: str, report: Report = ignore, *, again: bool = False) -> Dataset:
    """One source, read as the recipe says; with `again`, anew for each pass over it where its format allows that."""
    data: DataSection = recipe.data
    dataset = read(
        source,
        wants=recipe.task.info.wants,
        columns=replace(columns_of(data), **{key: getattr(data, key) for key in OF_TRAINING}),
        format=data.format,
        split=split_name,
        folder=None if data.cache is None else Path(data.cache),
        again=again,
    )
    for note in dataset.notes:
        report(Note(note))
    return dataset


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


def trained_parameters(
    model: nn.Module, adapter: str = "default"
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The trainable parameters of an adapter by path: LoRA factors, and parameters of modules trained in full.

    The paths are those that it has as the only adapter of a model, named `default`.
    """
    saved_hosts = [path for path, host in hosts(model) if isinstance(host, SavedModule)]
    has_lora = any(True for _ in hosts(model))
    lora: dict[str, nn.Parameter] = {}
    saved: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and (not has_lora or f".adapters.{adapter}." in path):
            whole = not has_lora or any(path.startswith(host + ".") for host in saved_hosts)
            (saved if whole else lora)[as_if_alone(path, adapter)] = parameter
    return lora, saved


def as_if_alone(path: str, adapter: str) -> str:
    """The path of an adapter's tensor in a model that has no other one."""
    return path.replace(f".adapters.{adapter}.", ".adapters.default.")


def _count_cut(task: Task, parts: dict[str, Part], max_length: int, report: Report) -> dict[str, int]:
    texts: dict[str, int] = {}
    for name, part in parts.items():
        cut, longer, n, read = Counter[str](), 0, 0, 0
        for examples, items in zip(chunks(part.examples), chunks(part.items), strict=True):
            cut.update(task.cut(examples, items)._asdict())
            read += task.info.texts_read(items)
            if task.info.reads_windows:
                windows = [len(own) for own in items if len(own) > 1]
                longer, n = longer + len(windows), n + sum(windows)
        if cut["texts"]:
            texts[name] = cut["texts"]
        if cut.total():
            counts = {"texts": cut["texts"], "targets": cut["targets"], "entities lost": cut["entities"]}
            shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            share = cut["texts"] / read
            report(Note(f"{name}: cut at {max_length} tokens: {shown}, of {read} texts ({share:.1%})"))
        if longer:
            report(Note(f"{name}: longer than {max_length} tokens: {longer} texts, read in {n} overlapping windows"))
    return texts
