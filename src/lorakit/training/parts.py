"""The parts of a run's data: read, held out or folded, with their labels; and as they are encoded."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from lorakit.data.audit import alike
from lorakit.data.batches import number_folds, split
from lorakit.data.example import OF_TRAINING, Dataset, Example, columns_of
from lorakit.data.files import means_files
from lorakit.data.read import find_choices, read, usual_pair
from lorakit.errors import ConfigError
from lorakit.inference.answer import chunks
from lorakit.recipe import DataSection, Recipe
from lorakit.runtime.events import Note, Report, ignore
from lorakit.task_info import TaskInfo
from lorakit.tasks.base import Item, Task
from lorakit.tasks.metrics.bootstrap import FEW
from lorakit.tasks.registry import check_labels, find_labels
from lorakit.training.encode import CachedItems
from lorakit.training.run_files import keeps_last

# Below so many examples a share of them says little, and is missed in training: so many folds. More of them take more time.
FOLDS = ((200, 3), (500, 2))


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
    datasets = {
        name: read_part(recipe, source, name, report, again=again and name == "train" and data.validation is not None)
        for name, source in sources.items()
        if source
    }
    examples: dict[str, Sequence[Example]] = {name: dataset.examples for name, dataset in datasets.items()}
    if "validation" not in examples:
        every, share, seed = examples["train"], data.validation_share, recipe.train.seed
        if len(every) < 2:
            raise ConfigError(f"{data.train}: a single example cannot be split; set data.validation")
        apart = f", and no {data.group} is on both sides" if data.group else ""
        chosen = f"chosen by seed {seed}, the same share of each label{apart}"
        if folds := count_folds(recipe, len(every)):
            report(
                Note(
                    f"no data.validation: the score comes from {folds}-fold cross-validation: {folds} models, each scored on "
                    f"examples that it has not seen, {chosen}; the saved model is trained on all {len(every)} examples; "
                    f"data.folds = 0 is faster, and holds out {share:.0%} instead"
                )
            )
        else:
            examples["train"], examples["validation"] = split(every, share, seed, by_group=data.group is not None)
            n = len(examples["validation"])
            is_last = keeps_last(None, 0, recipe.train.patience, n)
            few = (
                f"; they are too few (below {FEW}) to choose the best step, so the last one is kept" if is_last else ""
            )
            report(Note(f"no data.validation: {n} examples ({n / len(every):.0%}) are held out, {chosen}{few}"))
    left_out = {dataset.source: dataset.left_out for dataset in datasets.values() if dataset.left_out}
    return examples, {dataset.source: dataset.sha256 for dataset in datasets.values()}, left_out


def in_folds(
    recipe: Recipe, examples: dict[str, Sequence[Example]], fold: int | None
) -> tuple[dict[str, Sequence[Example]], Sequence[int]]:
    """The examples of each part, and the fold of each training example; nothing changes where there are validation data.

    Otherwise the examples of this fold become the validation part. With `fold` None, all are for training.
    """
    if "validation" in examples:
        return examples, ()
    every = examples["train"]
    by_group = recipe.data.group is not None
    fold_of = number_folds(every, count_folds(recipe, len(every)), recipe.train.seed, by_group=by_group)
    if fold is not None:
        numbered = list(zip(every, fold_of, strict=True))
        examples = {
            "train": [example for example, number in numbered if number != fold],
            "validation": [example for example, number in numbered if number == fold],
        }
    return examples, fold_of


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


def labels_in(recipe: Recipe, examples: Mapping[str, Sequence[Example]], report: Report) -> tuple[str, ...]:
    """The labels of the training examples, which every other example has to have; a note where some look alike."""
    held_out = examples.get("validation", ()) if recipe.data.validation is None else ()
    every = chain(examples["train"], held_out)  # a rare label may be held out by chance
    labels = find_labels(recipe.task.name, every, recipe.task.order)
    for part in examples.values():
        check_labels(recipe.task.name, part, labels)
    if groups := [" / ".join(map(repr, group)) for group in alike(labels)]:
        shown = ", ".join(groups[:5])
        alone = "each is learned as a label of its own"
        report(Note(f"labels that differ only in case, number format or invisible characters: {shown}; {alone}"))
    return labels


WORD = re.compile(r"[^\W\d_]{2,}")  # of a label's name
FEW_PER_LABEL = 20  # examples, on average, up to which the names of labels are trained on


def label_texts(recipe: Recipe, labels: Sequence[str], examples: Sequence[Example], tokenizer: Any) -> list[Example]:
    """The name of each label as a text that has it, which says more than a few texts do (docs/LOG.md, 2026-11-30).

    Where the recipe leaves it open: for at most FEW_PER_LABEL examples per label, if all names are words that the
    tokenizer tells apart.

    Raises:
        ConfigError: data.label_names is true, and the examples are pairs of texts.
    """
    use, wants, is_pair = recipe.data.label_names, recipe.task.info.wants, examples[0].pair is not None
    if use and is_pair:
        raise ConfigError("data.label_names = true: a label's name is one text, and these examples are pairs of texts")
    words = {name: " ".join(WORD.findall(name)) for name in labels}
    are_few = wants in ("label", "labels") and not is_pair and len(examples) <= FEW_PER_LABEL * len(labels)
    if use is None and are_few and all(words.values()):
        use = len({tuple(ids) for ids in tokenizer([*words.values()])["input_ids"]}) == len(words)
    if not use:
        return []
    return [
        Example(text=words[name] or name, label=(name,) if wants == "labels" else name, where="data.label_names")
        for name in labels
    ]


# Encoded


@dataclass(frozen=True)
class Part:
    """One part of the data, encoded."""

    examples: Sequence[Example]
    items: Sequence[Sequence[Item]]  # of each example
    names: Sequence[Item] = ()  # those of labels, which are trained on as texts

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
        """All items in a row, with those of names at the end."""
        if isinstance(self.items, CachedItems) and not self.names:
            return self.items.flat
        return [*chain.from_iterable(self.items), *self.names]


def count_cut(task: Task, parts: dict[str, Part], max_length: int, report: Report) -> dict[str, int]:
    """How many texts of each part are not read to their end, where there are some; notes on all that the limits take."""
    texts: dict[str, int] = {}
    for name, part in parts.items():
        cut, longer, n, n_read = Counter[str](), 0, 0, 0
        for examples, items in zip(chunks(part.examples), chunks(part.items), strict=True):
            cut.update(task.cut(examples, items)._asdict())
            n_read += task.info.texts_read(items)
            if task.info.reads_windows:
                windows = [len(own) for own in items if len(own) > 1]
                longer, n = longer + len(windows), n + sum(windows)
        if cut["texts"]:
            texts[name] = cut["texts"]
        if cut.total():
            counts = {"texts": cut["texts"], "targets": cut["targets"], "entities lost": cut["entities"]}
            shown = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
            share = cut["texts"] / n_read
            report(Note(f"{name}: cut at {max_length} tokens: {shown}, of {n_read} texts ({share:.1%})"))
        if longer:
            report(Note(f"{name}: longer than {max_length} tokens: {longer} texts, read in {n} overlapping windows"))
    return texts
