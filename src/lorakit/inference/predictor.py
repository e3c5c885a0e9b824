"""Predictions from a run folder or an adapter folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import nn

from lorakit.data.example import Columns, Dataset, Example, of_words
from lorakit.data.read import read
from lorakit.data.tags import entities, to_tags
from lorakit.errors import DataError
from lorakit.inference.adapter_folder import load_shipped, read_side, shipped_folder
from lorakit.inference.answer import answer_all, as_input, check_input, chunks
from lorakit.inference.side import Base, Side
from lorakit.lora import adapter_names, merge_and_unload
from lorakit.models import load_base, save_model
from lorakit.recipe import TaskSection
from lorakit.runtime.device import DTYPES, cast_frozen_, pick_device
from lorakit.runtime.events import Report, ignore
from lorakit.tasks.base import Task
from lorakit.tasks.embedding import complete, cut_vectors, unit
from lorakit.tasks.metrics.bootstrap import Floats, Scores
from lorakit.tasks.registry import check_labels, layout_of, make_task, task_layers

MOST_LABELS = 8  # shown by repr


@dataclass(frozen=True)
class Predictor:
    """A trained model that predicts on texts and scores labelled examples.

    >>> predictor = lorakit.load("runs/reviews")
    >>> predictor
    Predictor('minilm', sequence_classification, 2 labels: negative, positive)
    >>> predictor.predict("Not a single dull minute.").keys()
    dict_keys(['text', 'label', 'score', 'probabilities'])
    """

    model: nn.Module
    task: Task
    side: Side
    device: torch.device
    tokenizer: Any  # of the base

    @overload
    def predict(self, texts: str) -> dict[str, Any]: ...  # type: ignore[overload-overlap]  # a str is a Sequence[str]

    @overload
    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]: ...

    def predict(self, texts: str | Sequence[str | tuple[str, str]]) -> dict[str, Any] | list[dict[str, Any]]:
        """Predict on each text, in order: `{"text", "label", "score", "probabilities"}`, with several labels
        `{"text", "labels", "probabilities"}`, in regression `{"text", "value"}`, with entities `{"text", "entities"}`. A
        single string returns one answer instead of a list.

        Texts are pairs if the run was trained on pairs.

        >>> predictor = lorakit.load("runs/reviews")
        >>> [answer["text"] for answer in predictor.predict(["Not a dull minute.", "The soup arrived cold."])]
        ['Not a dull minute.', 'The soup arrived cold.']

        Raises:
            DataError: a text is empty, or not a pair where pairs are needed (or the reverse).
        """
        if isinstance(texts, str):
            return self.predict([texts])[0]
        pairs = [(text, None) if isinstance(text, str) else text for text in texts]
        for number, pair in enumerate(pairs, start=1):  # a table's empty cells are NaN
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
                raise DataError(f"text {number} of {len(texts)}: {pair!r} is neither a text nor a pair of texts")
        examples = [Example(text, None, pair) for text, pair in pairs]
        for number, example in enumerate(examples, start=1):
            check_input(example, self.side, f"text {number} of {len(texts)}")
        return self.lines(examples)

    @overload
    def embed(self, texts: str, *, query: bool = False, dims: int | None = None) -> Floats: ...

    @overload
    def embed(self, texts: Sequence[str], *, query: bool = False, dims: int | None = None) -> Floats: ...

    def embed(self, texts: str | Sequence[str], *, query: bool = False, dims: int | None = None) -> Floats:
        """The vector of each text, in order, in fp32; that of a single string alone. Shapes: (n, d), or (d,).

        With `query` texts begin with the query prompt, where the run has one; else with the document prompt. With `dims`
        vectors are cut to so many dimensions, and are of length 1 again if they were: for runs trained with task.dims.

        Raises:
            DataError: the run's task gives no vectors, a text is empty, or there are not so many dimensions.
        """
        if self.task.info.model_kind != "embedding":
            raise DataError(
                f"embed: this run's task, {self.task.info.name}, does not make vectors; train with task.name = "
                "'embedding'"
            )
        if isinstance(texts, str):
            alone: Floats = self.embed([texts], query=query, dims=dims)[0]
            return alone
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"text {number} of {len(texts)} is {'empty' if isinstance(text, str) else 'not a text'}"
                )
        if not texts:
            raise DataError("embed: no texts")
        vectors = np.concatenate(self.answers([Example(text, is_query=query) for text in texts]))
        return cut_vectors(vectors, dims, is_unit=bool(self.side.task.normalize))

    def similarity(self, queries: Sequence[str], texts: Sequence[str]) -> Floats:
        """The cosine of each query with each text. Shapes: (queries, texts). Errors as `embed`."""
        return unit(self.embed(list(queries), query=True)) @ unit(self.embed(list(texts))).T

    def rank(self, query: str, texts: Sequence[str], top: int | None = None) -> list[dict[str, Any]]:
        """The texts by how well they answer a query, the best first: `{"index", "score", "text"}`, the `top` first
        of them.

        The score is a cosine, that of a reranker, or the probability of a choice among these.

        >>> search = lorakit.load("runs/search")
        >>> search.rank("a fine evening", ["The soup arrived cold.", "Not a single dull minute."], top=1)[0].keys()
        dict_keys(['index', 'score', 'text'])

        Raises:
            DataError: the run's task compares no texts, or a text is empty.
        """
        if not self.task.info.compares:
            raise DataError(
                f"rank: this run's task, {self.task.info.name}, does not compare texts; train with task.name = "
                "'embedding'"
            )
        if self.task.info.wants == "choices":
            question = Example(query, choices=tuple(texts))
            check_input(question, self.side, "query")
            scores = list(self.lines([question])[0]["probabilities"].values())
        elif self.task.info.has_head:
            scores = [answer["score"] for answer in self.predict([(query, text) for text in texts])]
        else:
            scores = self.similarity([query], texts)[0].tolist()
        order = sorted(range(len(texts)), key=lambda i: -scores[i])[:top]
        return [{"index": i, "score": scores[i], "text": texts[i]} for i in order]

    def __repr__(self) -> str:
        labels = self.side.labels
        names = ", ".join(labels[:MOST_LABELS]) + (", ..." if len(labels) > MOST_LABELS else "")
        shown = f", {len(labels)} labels: {names}" if labels else ""
        return f"Predictor({self.side.base.name!r}, {self.side.task.name}{shown})"

    def lines(self, unlabelled: Sequence[Example]) -> list[dict[str, Any]]:
        """The same for checked examples."""
        examples = [as_input(self.task, example) for example in unlabelled]
        return [self.task.to_json(e, a) for e, a in zip(examples, self.answers(examples), strict=True)]

    def predict_words(self, sentences: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """The same for sentences split into words: `{"words", "tags", "text", "entities"}`, an IOB2 tag for each word.

        The text, which the entities' offsets point into, is the words joined by single spaces.

        Raises:
            DataError: the run's task does not take words, or a sentence is a plain text, has no words or an empty one.
        """
        if self.task.info.wants != "words":
            raise DataError(f"words: this run's task, {self.task.info.name}, takes texts")
        for number, words in enumerate(sentences, start=1):
            if isinstance(words, str) or not words or not all(word.strip() for word in words):
                raise DataError(f"sentence {number} of {len(sentences)}: {words!r} is not a list of non-empty words")
        examples = [of_words(words) for words in sentences]
        return [
            {"words": list(e.words), "tags": to_tags(entities(a.tags), len(e.words)), **self.task.to_json(e, a)}
            for e, a in zip(examples, self.answers(examples), strict=True)
        ]

    def answers(self, examples: Sequence[Example]) -> list[Any]:
        """The task's raw answers, in order."""
        return [
            answer
            for some in chunks(examples)
            for answer in answer_all(self.model, self.task, some, self.task.encode(some), self.device)
        ]

    def read_labelled(self, source: str, columns: Columns = Columns(), format: str = "auto") -> Dataset:
        """Read labelled examples for the task; the columns are those of training unless others are named."""
        columns = columns.over(self.side.columns, source)
        return read(source, self.task.info.wants, columns=columns, format=format, split="test")

    def evaluate(self, examples: Sequence[Example]) -> Scores:
        """Scores on labelled examples, with intervals. Raises a DataError for a label that training did not have."""
        check_labels(self.task.info.name, examples, self.side.labels)
        return self.task.evaluate(examples, self.answers(examples)).with_intervals()

    def merge_to(self, folder: Path) -> None:
        """Write a plain transformers model with the adapter merged, in fp32 whatever the dtype of the base in training.

        Afterwards this object predicts with the merged model, in fp32 too.
        A CRF's transitions are left out: no class of transformers can hold them.
        """
        _fold_in(self.model.float())  # a sum rounded to bf16 would lose most of the adapter and the head
        layers = task_layers(self.side.task, self.side.labels)
        save_model(self.model, self.tokenizer, folder, layout_of(self.side.task, self.side.max_length), without=layers)


def load(
    path: str | Path,
    *,
    allow_base_mismatch: bool = False,
    merge: bool = False,
    device: str = "auto",
    report: Report = ignore,
) -> Predictor:
    """Load a run or adapter from its folder.

    >>> lorakit.load("runs/reviews")
    Predictor('minilm', sequence_classification, 2 labels: negative, positive)

    With `merge` the adapter is merged into the base: about 10 % faster, with the same answers up to rounding, in bf16 that
    of the weights. `device` is auto (an accelerator if there is one), cpu, cuda, mps or xpu.

    Raises:
        ConfigError: this machine has no such device.
        AdapterError: the base model differs from the one trained on (in weights, config or tokenizer) and not
            `allow_base_mismatch`; or the folder is damaged.
    """
    folder = shipped_folder(Path(path))
    side = read_side(folder)
    chosen = pick_device(device)
    base = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch, report=report)
    if merge:
        _fold_in(base.model)
    cast_frozen_(base.model, DTYPES[side.dtype])
    base.model.to(chosen).eval()
    base.speed_up(chosen)
    task = make_task(side.task, base.tokenizer, side.labels, side.max_length, side.tuned)
    return Predictor(base.model, task, side, chosen, base.tokenizer)


def load_embedder(name: str) -> Predictor:
    """An untouched base model, by its name or folder, as what `embed` takes. Raises a ModelError as `load_base`."""
    base = load_base(name, "embedding", pooling="auto")
    section = complete(TaskSection(name="embedding"), base.layout, [Example("", pair="")])
    side = Side(
        task=section,
        base=Base.of(base.name, None, base.fingerprint),
        labels=(),
        max_length=base.max_length,
        columns=Columns(),
        dtype="fp32",
        method="head",
        pooling=base.pooling,
    )
    device = pick_device()
    base.model.to(device).eval()
    base.speed_up(device)
    task = make_task(section, base.tokenizer, (), base.max_length)
    return Predictor(base.model, task, side, device, base.tokenizer)


def _fold_in(model: nn.Module) -> None:
    """Merge the adapter of a model, if it has one."""
    if adapter_names(model):
        merge_and_unload(model)
