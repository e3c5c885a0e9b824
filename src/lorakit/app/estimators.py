"""scikit-learn estimators: from lists of texts and labels to predictions, without files or recipes.

They train exactly what the same recipe trains on a file of the same examples. A fitted estimator holds the bytes of the
adapter folder, which are all that a pickle or a copy of it contains; the base model is loaded by its name.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from lorakit.app.api import SHORTCUTS, train_recipe
from lorakit.data.tags import is_tag
from lorakit.errors import ConfigError, DataError, LorakitError, OutputError
from lorakit.inference.adapter_folder import shipped_folder
from lorakit.inference.predictor import Predictor, load
from lorakit.recipe import Recipe, make_recipe
from lorakit.runtime.device import deterministic
from lorakit.runtime.events import Event, Note, Report
from lorakit.tasks.metrics.entities import entity_scores
from lorakit.training.joint import prepare_all
from lorakit.training.results import Result
from lorakit.training.run import Run
from lorakit.training.run_files import run_folder

Text = str | tuple[str, str]
# Recipe keys set by the estimator's arguments, and others set by `fit`.
KNOBS = {"model": "model.base", **SHORTCUTS}
OURS = ("data.train", "data.format", "data.text", "data.pair", "data.label", "task.name", "train.seeds")
EXAMPLES = "fit(X, y)"  # stands for the file of examples in messages


class InputError(DataError, ValueError):
    """X or y cannot be used; a ValueError, as scikit-learn's tools expect."""


@dataclass(eq=False, repr=False, kw_only=True)  # the arguments are stored as they are; `fit` checks them
class LoraEstimator(BaseEstimator):
    """Base of the estimators: arguments, training, and predictions from the bytes of an adapter folder.

    Fitted, it has `scores_` (those of scores.json, on the validation examples), `notes_` (the run's notes), `files_`
    (the adapter folder, name to bytes) and `predictor_` (what `lorakit.load` gives for it).
    """

    model: str = "minilm"  # hub id, folder, or `minilm`
    r: int = 8
    alpha: float = 16.0
    target_modules: str | Sequence[str] = "all-linear"
    epochs: int | None = None  # unset: by the number of examples, as the next two
    lr: float | None = None
    batch_size: int | None = None
    seed: int = 0
    validation_share: float | None = None  # of the examples, held out to be scored; unset: as `data.folds` says
    folder: str | Path | None = None  # of the complete run, with its examples in FOLDER.jsonl; unset: no files are kept
    recipe: Mapping[str, Mapping[str, Any]] | None = None  # other keys, {"lora": {"use_dora": True}}

    task: ClassVar[str]

    def _fit(self, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Train on records, all with the same columns."""
        notes: list[str] = []
        with TemporaryDirectory(prefix="lorakit-") as scratch:
            data = Path(f"{self.folder or Path(scratch) / 'examples'}.jsonl")
            if data.exists():
                raise OutputError(f"folder = {str(self.folder)!r}: {data} exists already; choose another one")
            data.parent.mkdir(parents=True, exist_ok=True)
            data.write_text("".join(json.dumps(row, default=repr) + "\n" for row in rows), encoding="utf-8")

            def report(event: Event) -> None:
                if isinstance(event, Note):
                    notes.append(event.text.replace(str(data), EXAMPLES))

            named = {f"data.{role}": role for role in ("text", "label", "pair") if role in rows[0]}
            recipe = self._recipe({"data.train": str(data), **named})
            try:
                result = train_recipe(recipe, report=report) if self.folder else train_bare(recipe, scratch, report)
            except LorakitError as err:
                data.unlink()
                err.args = (str(err).replace(str(data), EXAMPLES), *err.args[1:])
                raise
            shipped = shipped_folder(result.folder)
            self.files_ = {path.name: path.read_bytes() for path in shipped.iterdir()}
        self.scores_, self.notes_ = result.scores, notes
        self.__dict__.pop("predictor_", None)
        _ = self.predictor_
        return self

    def _recipe(self, ours: Mapping[str, Any]) -> Recipe:
        """The recipe of the arguments.

        Raises:
            ConfigError: `recipe` has a key that is set by an argument or by `fit`, or an argument cannot be used.
        """
        sections: dict[str, dict[str, Any]] = {}
        for section, table in (self.recipe or {}).items():
            if not isinstance(table, Mapping):
                raise ConfigError(f'recipe: {section} is not a table; expected {{"{section}": {{key: value}}}}')
            sections[section] = dict(table)
        of_knobs = {key: value for knob, key in KNOBS.items() if (value := getattr(self, knob)) is not None}
        taken = {key: f"use the estimator's {knob}=..." for knob, key in KNOBS.items()}
        taken |= dict.fromkeys(OURS, f"{EXAMPLES} sets it")
        for section, table in sections.items():
            for name in table:
                if (key := f"{section}.{name}") in taken:
                    raise ConfigError(f"recipe: {key} = {table[name]!r}: {taken[key]}")
        values = {**of_knobs, **ours, "data.format": "jsonl", "task.name": self.task}
        for key, value in values.items():
            section, _, name = key.partition(".")
            plain = str(value) if isinstance(value, Path) else unwrapped(value)
            sections.setdefault(section, {})[name] = plain
        return make_recipe(sections)

    @cached_property
    def predictor_(self) -> Predictor:
        """The predictor, loaded on first use, also in an unpickled estimator.

        Raises:
            NotFittedError: the estimator is not fitted.
        """
        check_is_fitted(self, "files_")
        with TemporaryDirectory(prefix="lorakit-") as scratch:
            for name, content in self.files_.items():
                (Path(scratch) / name).write_bytes(content)
            return load(scratch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "predictor_"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.one_d_array, tags.input_tags.two_d_array = True, True, False
        return tags

    def _answers(self, X: Any) -> list[dict[str, Any]]:
        return self.predictor_.predict(texts_of(X))


class TextClassifier(ClassifierMixin, LoraEstimator):
    """A classifier of texts, or of pairs of texts; `classes_` has the labels in order, in their original type.

    `model` is a hub id, a folder or `minilm`. `epochs`, `lr` and `batch_size` depend on the number of examples unless they
    are set. `folder` keeps the complete run, with its report. `recipe` sets any other key:
    `{"task": {"class_weights": "balanced"}, "lora": {"use_dora": True}}`.

    >>> classifier = lorakit.TextClassifier(model="minilm", epochs=1).fit(texts, labels)
    >>> classifier.classes_
    array(['negative', 'positive'], dtype='<U8')
    >>> classifier.predict_proba(["What a film!"]).shape
    (1, 2)
    """

    task = "sequence_classification"

    def fit(self, X: Any, y: Any) -> Self:
        """Train on texts, or pairs of texts, and their labels.

        Raises:
            LorakitError: a text is empty, there are fewer than two labels, or an argument cannot be used.
            ValueError: the labels are numbers with fractions.
        """
        texts, labels = paired(texts_of(X), targets_of(y))
        if any(isinstance(label, float) for label in labels):
            check_classification_targets(labels)
        classes = in_order(labels)
        self._fit(
            [{"text": a, "label": str(label), **b} for (a, b), label in zip(map(columns, texts), labels, strict=True)]
        )
        self.classes_ = classes
        return self

    def predict(self, X: Any) -> Any:
        """The most probable label of each text, (n,)."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> Any:
        """The probabilities of the labels, (n, C) in the order of `classes_`."""
        answers = self._answers(X)
        names = [str(label).strip() for label in self.classes_]
        return np.array([[answer["probabilities"][name] for name in names] for answer in answers])


class TextRegressor(RegressorMixin, LoraEstimator):
    """Texts, or pairs of texts, to numbers. The arguments are those of `TextClassifier`.

    >>> regressor = lorakit.TextRegressor(model="minilm", epochs=1).fit(texts, stars)
    >>> regressor.predict(["What a film!"]).shape
    (1,)
    """

    task = "sequence_regression"

    def fit(self, X: Any, y: Any) -> Self:
        """Train on texts, or pairs of texts, and their numbers.

        Raises:
            LorakitError: a text is empty, a number is not finite or all are the same, or an argument cannot be used.
        """
        texts, numbers = paired(texts_of(X), targets_of(y))
        return self._fit([{"text": a, "label": z, **b} for (a, b), z in zip(map(columns, texts), numbers, strict=True)])

    def predict(self, X: Any) -> Any:
        """A number for each text, (n,)."""
        return np.array([answer["value"] for answer in self._answers(X)])


class TextEmbedder(TransformerMixin, LoraEstimator):
    """Texts to vectors, near those of the texts that belong to them: a step of a pipeline before a clustering, say.

    The arguments are those of `TextClassifier`.

    >>> embedder = lorakit.TextEmbedder(model="minilm", epochs=1).fit(texts, labels)
    >>> embedder.transform(["What a film!"]).shape[0]
    1
    """

    task = "embedding"

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on texts and their classes, on pairs of texts, or on pairs and numbers for how alike the two are.

        Raises:
            LorakitError: a text is empty or stands alone without a class, or an argument cannot be used.
        """
        texts = texts_of(X)
        if y is None and isinstance(texts[0], str):
            raise InputError("y is missing: texts need a class each, or a second text: X of pairs")
        labels: list[Any] = [{} for _ in texts]
        if y is not None:
            texts, values = paired(texts, listed(y, "y"))
            is_class = isinstance(texts[0], str)
            labels = [{"label": str(value) if is_class else value} for value in values]
        return self._fit([{"text": a, **b, **label} for (a, b), label in zip(map(columns, texts), labels, strict=True)])

    def transform(self, X: Any) -> Any:
        """The vector of each text, (n, d)."""
        texts = texts_of(X)
        if not all(isinstance(text, str) for text in texts):
            raise InputError("X holds pairs; vectors are of texts alone")
        return self.predictor_.embed([str(text) for text in texts])


class EntityRecognizer(LoraEstimator):
    """A tag for each word of a sentence. Tags of any scheme are accepted and predicted as IOB2; `classes_` has them.

    The arguments are those of `TextClassifier`.

    >>> recognizer = lorakit.EntityRecognizer(model="minilm", epochs=1).fit(sentences, tags)
    >>> len(recognizer.predict([["Ingrid", "flew", "to", "Oslo", "."]])[0])
    5
    """

    task = "token_classification"

    def fit(self, X: Any, y: Any) -> Self:
        """Train on sentences (lists of words) and their lists of tags.

        Raises:
            LorakitError: a sentence and its tags differ in length, a tag is invalid, there is no entity, or an argument
                cannot be used.
        """
        sentences, tags = paired(sentences_of(X), [listed(tags, f"y[{i}]") for i, tags in enumerate(listed(y, "y"))])
        self._fit([{"tokens": words, "ner_tags": word_tags} for words, word_tags in zip(sentences, tags, strict=True)])
        self.classes_ = np.unique(self.predictor_.side.labels)
        return self

    def predict(self, X: Any) -> list[list[str]]:
        """A tag for each word of each sentence."""
        return [answer["tags"] for answer in self.predictor_.predict_words(sentences_of(X))]

    def score(self, X: Any, y: Any) -> float:
        """Micro F1 of whole entities, as conlleval counts."""
        predicted, gold = paired(self.predict(X), listed(y, "y"))
        for i, (answer, tags) in enumerate(zip(predicted, gold, strict=True)):
            if len(answer) != len(tags) or not all(map(is_tag, tags)):
                raise InputError(
                    f"y[{i}] = {list(tags)!r}: a tag (O, B-TYPE, I-TYPE) for each of {len(answer)} words is expected"
                )
        f1: float = entity_scores(gold, predicted)["entity_f1"]
        return f1


# Training


def train_bare(recipe: Recipe, scratch: str, report: Report) -> Result:
    """A run without pictures and report, which take longer than training on few examples."""
    folder = Path(scratch) / "run"
    with deterministic(recipe.train.deterministic), run_folder(folder, None):
        (prepared,) = prepare_all([recipe], report)
        if isinstance(prepared, LorakitError):
            raise prepared
        return Run(prepared, folder, report).fit()


# X and y can be lists, numpy arrays or pandas columns


def listed(values: Any, name: str) -> list[Any]:
    """The entries of a sequence, an array or a table, as Python types. Raises an InputError for a single text."""
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise InputError(f"{name} = {values!r}: a list is expected, with an entry for each example")
    return list(values.tolist() if hasattr(values, "tolist") else map(unwrapped, values))


def targets_of(y: Any) -> list[Any]:
    """A label or number for each text; of a table with one column, as X may be one, its cells."""
    rows = listed(y, "y")
    return [row[0] for row in rows] if all(isinstance(row, list) and len(row) == 1 for row in rows) else rows


def unwrapped(value: Any) -> Any:
    """A numpy number or string as a Python one."""
    return value.item() if isinstance(value, np.generic) else value


def texts_of(X: Any) -> list[Text]:
    """Texts, or pairs of texts.

    Raises:
        InputError: there are none, an entry is neither, or only some are pairs.
    """
    texts = list(starmap(_text, enumerate(listed(X, "X"))))
    if not texts:
        raise InputError("X is empty: a list of texts is expected")
    for i, text in enumerate(texts):
        if isinstance(text, str) != isinstance(texts[0], str):
            raise InputError(f"X[{i}] = {text!r}: some entries are pairs of texts, others are not")
    return texts


def _text(i: int, entry: Any) -> Text:
    texts = [entry] if isinstance(entry, str) else list(entry) if isinstance(entry, (tuple, list)) else []
    if len(texts) not in (1, 2) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"X[{i}] = {entry!r} is neither a text nor a pair of texts")
    if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
        raise InputError(f"X[{i}] = {entry!r}: half of a surrogate pair is not a text")
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def columns(text: Text) -> tuple[str, dict[str, str]]:
    """The text, and the column of the second one of a pair."""
    return (text, {}) if isinstance(text, str) else (text[0], {"pair": text[1]})


def sentences_of(X: Any) -> list[list[str]]:
    """Sentences as lists of words. Raises an InputError if there are none, or one is a plain text."""
    sentences = [listed(words, f"X[{i}]") for i, words in enumerate(listed(X, "X"))]
    if not sentences:
        raise InputError("X is empty: a list of sentences is expected, each a list of words")
    return sentences


def paired(xs: list[Any], ys: list[Any]) -> tuple[list[Any], list[Any]]:
    """Both, if they have equal lengths."""
    if len(xs) != len(ys):
        raise InputError(f"X has {len(xs)} examples but y has {len(ys)}")
    return xs, ys


def in_order(labels: Sequence[Any]) -> Any:
    """The distinct labels, sorted as by numpy; by their names if they have no order.

    Raises:
        InputError: one is missing (None, NaN), there is only one, or two have the same name, such as 1 and "1".
    """
    for i, label in enumerate(labels):
        if not isinstance(label, Hashable) or label is None or label != label:
            raise InputError(f"y[{i}] = {label!r} is not a label")
    distinct = set(labels)
    try:
        ordered = sorted(distinct)
    except TypeError:
        ordered = sorted(distinct, key=lambda label: (str(label), type(label).__name__))
    named: dict[str, Any] = {}
    for label in ordered:
        if (other := named.setdefault(str(label).strip(), label)) is not label:
            raise InputError(f"y: the labels {other!r} and {label!r} have the same name")
    if len(ordered) == 1:
        raise InputError(f"y: every example has the label {ordered[0]!r}; at least two classes are needed")
    kinds = {type(label) for label in ordered}
    if len(kinds) == 1 and kinds <= {str, int, float, bool}:
        return np.array(ordered)
    classes = np.empty(len(ordered), dtype=object)
    classes[:] = ordered
    return classes
