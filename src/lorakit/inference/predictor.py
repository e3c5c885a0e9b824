"""Answers from a run folder or an adapter folder alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from lorakit.data.example import Columns, Dataset, Example, of_text, of_words
from lorakit.data.read import read
from lorakit.data.tags import entities, to_tags
from lorakit.errors import AdapterError, DataError
from lorakit.fingerprints import fingerprint_of
from lorakit.hashing import Fingerprint
from lorakit.inference.adapter_folder import read_side, shipped_folder
from lorakit.inference.answer import answer_all, chunks
from lorakit.inference.side import Side
from lorakit.inference.speed_up import speed_up
from lorakit.lora import adapter_names, load_adapter, merge_and_unload, quantize, read_adapter_config
from lorakit.models import BaseModel, find, load_base, save_model
from lorakit.runtime.device import DTYPES, cast_frozen_, pick_device
from lorakit.runtime.events import Note, Report, ignore
from lorakit.tasks.base import Task
from lorakit.tasks.metrics.bootstrap import Scores, with_intervals
from lorakit.tasks.registry import TASKS, check_labels, make_task, task_layers


@dataclass(frozen=True)
class Predictor:
    """A trained model that answers texts and scores labelled examples."""

    model: nn.Module
    task: Task
    side: Side
    device: torch.device

    @overload
    def predict(self, texts: str) -> dict[str, Any]: ...  # type: ignore[overload-overlap]  # a str is a Sequence[str]

    @overload
    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]: ...

    def predict(self, texts: str | Sequence[str | tuple[str, str]]) -> dict[str, Any] | list[dict[str, Any]]:
        """An answer for each text, in order: `{"text", "label", "score", "probabilities"}`, with several labels
        `{"text", "labels", "probabilities"}`, of regression `{"text", "value"}`, else `{"text", "entities"}`. A text that is
        given by itself has one answer, which is not in a list.

        Texts are pairs where the run was trained on pairs.

        Raises:
            DataError: a text is empty, or is no pair where pairs are needed (or the reverse).
        """
        if isinstance(texts, str):
            return self.predict([texts])[0]
        return list(self.stream([Example(*parts(text)) for text in texts]))

    def stream(self, unlabelled: Sequence[Example]) -> Iterator[dict[str, Any]]:
        """The same for examples, one answer after the other: all are checked first, and few are held at a time."""
        for number, example in enumerate(unlabelled, start=1):
            check_asked(example, self.side, example.where or f"text {number} of {len(unlabelled)}")
        return chain.from_iterable(map(self.lines, chunks(unlabelled)))

    def lines(self, unlabelled: Sequence[Example]) -> list[dict[str, Any]]:
        """The same at once, for what has been checked."""
        examples = [as_wanted(self.task, example) for example in unlabelled]
        return [self.task.to_json(e, a) for e, a in zip(examples, self.answers(examples), strict=True)]

    def predict_words(self, sentences: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """The same for sentences that are cut into words: `{"words", "tags", "text", "entities"}`, an IOB2 tag a word.

        The text, which the entities' offsets point into, is the words joined by single spaces.

        Raises:
            DataError: the run does not answer words, or a sentence is a plain text, has no words or an empty one.
        """
        if TASKS[self.task.name].wants != "words":
            raise DataError(f"words: this run is one of {self.task.name}, which answers texts")
        for number, words in enumerate(sentences, start=1):
            if isinstance(words, str) or not words or not all(word.strip() for word in words):
                raise DataError(
                    f"sentence {number} of {len(sentences)}: {words!r} is not a list of words, none of them empty"
                )
        examples = [of_words(words) for words in sentences]
        return [
            {"words": list(e.words), "tags": to_tags(entities(a.tags), len(e.words)), **self.task.to_json(e, a)}
            for e, a in zip(examples, self.answers(examples), strict=True)
        ]

    def answers(self, examples: Sequence[Example]) -> list[Any]:
        """The task's own answers, in order."""
        return [
            answer
            for some in chunks(examples)
            for answer in answer_all(self.model, self.task, some, self.task.encode(some), self.device)
        ]

    def read_labelled(self, source: str, columns: Columns = Columns(), format: str = "auto") -> Dataset:
        """Labelled examples as the task wants them; the columns are those of training unless others are named."""
        named = {role: name for role in ("text", "pair", "label") if (name := getattr(columns, role))}
        asked = replace(self.side.columns, **named)
        return read(source, TASKS[self.task.name].wants, columns=asked, format=format, split="test")

    def evaluate(self, examples: Sequence[Example]) -> Scores:
        """Scores on labelled examples, with intervals. Raises a DataError for a label that training did not have."""
        check_labels(self.task.name, examples, self.task.labels)
        return with_intervals(self.task, examples, self.answers(examples))

    def merge_to(self, folder: Path) -> None:
        """Write a plain transformers model with the adapter folded in, in fp32 whatever the dtype of the base in training.

        Afterwards this object answers through it, in fp32 too.
        A CRF's transitions are left out: no class of transformers has a place for them.
        """
        _fold_in(self.model.float())  # a sum rounded to bf16 would lose most of the adapter and the head
        layers = task_layers(self.side.task, self.side.labels)
        save_model(self.model, self.task.tokenizer, folder, self.side.max_length, without=layers)


def check_asked(example: Example, side: Side, place: str) -> None:
    """Raise a DataError that begins with its place where a text is empty, or is no pair where pairs are needed."""
    if not example.text.strip():
        raise DataError(f"{place} is empty")
    if (example.pair is None) != (side.columns.pair is None):
        wanted = "a pair of texts" if side.columns.pair else "one text"
        raise DataError(f"{place}: this run was trained on {wanted} an example")


def as_wanted(task: Task, example: Example) -> Example:
    """A text as the task takes it: cut into words where it answers words."""
    return of_text(example.text) if TASKS[task.name].wants == "words" else example


def parts(text: str | tuple[str, str]) -> tuple[str, None, str | None]:
    """The text, no label, and the second text of a pair, as an Example takes them."""
    return (text, None, None) if isinstance(text, str) else (text[0], None, text[1])


def load(
    path: str | Path, *, allow_base_mismatch: bool = False, merge: bool = False, report: Report = ignore
) -> Predictor:
    """Load what a run left, from its folder alone.

    With `merge` the adapter is folded into the base: about a tenth faster, with the same answers but for rounding, which in
    bf16 is that of the weights.

    Raises:
        AdapterError: the base model that is found is another than the one that was trained on (in weights, config or tokenizer),
            unless `allow_base_mismatch`; or the folder is damaged.
    """
    folder = shipped_folder(Path(path))
    side = read_side(folder)
    base = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch, report=report)
    if merge:
        _fold_in(base.model)
    device = pick_device()
    cast_frozen_(base.model, DTYPES[side.dtype])
    base.model.to(device).eval()
    speed_up(base, DTYPES[side.dtype], device)
    task = make_task(side.task, base.tokenizer, side.labels, side.max_length, side.tuned)
    return Predictor(base.model, task, side, device)


def _fold_in(model: nn.Module) -> None:
    """Make a plain model of one with an adapter; a plain one stays as it is."""
    if adapter_names(model):
        merge_and_unload(model)


def load_shipped(folder: Path, side: Side, *, allow_base_mismatch: bool = False, report: Report = ignore) -> BaseModel:
    """The base model with the adapter in it (or the fully fine-tuned model), in fp32 and on the CPU; errors as `load`."""
    kind = TASKS[side.task.name].model
    whole = side.method == "full"
    fingerprint = None if whole else checked_base(folder, side, allow_base_mismatch, report)
    name = str(folder) if whole else side.base.name
    base = load_base(
        name,
        kind,
        labels=TASKS[side.task.name].outputs(side.labels),
        revision=side.base.revision,
        fingerprint=fingerprint,
        pooling=side.pooling,
    ).with_layers(task_layers(side.task, side.labels))
    if whole and base.missing:
        raise AdapterError(f"{folder}: damaged: it lacks {base.missing[0]}")
    if side.quantize != "none":
        quantize(base.model, side.quantize, skip=read_adapter_config(folder)[0].modules_to_save)
    if not whole:
        load_adapter(base.model, folder)
    return base


def checked_base(folder: Path, side: Side, allow_mismatch: bool = False, report: Report = ignore) -> Fingerprint:
    """The fingerprint of the base model that is found, compared before anything is loaded."""
    wanted, found = side.base.fingerprint, fingerprint_of(find(side.base.name, side.base.revision))
    if (differences := wanted.differences(found)) and not allow_mismatch:
        raise AdapterError(
            f"{folder}: trained on another {side.base.name}: {'; '.join(differences)}; "
            "answers would differ (--allow-base-mismatch loads it all the same)"
        )
    if None in wanted:
        report(Note(f"{folder}: an older lorakit wrote it: the base's config and tokenizer could not be compared"))
    return found
