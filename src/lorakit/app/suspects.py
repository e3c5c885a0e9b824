"""Labels that a trained run does not believe: confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from lorakit.data.audit import labels_of
from lorakit.data.example import Example
from lorakit.engine.evaluate import predict_all
from lorakit.engine.predictor import Predictor
from lorakit.errors import ConfigError
from lorakit.tasks.registry import check_labels
from lorakit.tasks.token_classification import TokenClassification


class Suspect(NamedTuple):
    """A label that is likely wrong: where it stands, of what, what it says, what the run says, and how surely."""

    where: str
    text: str
    given: str
    suggested: str
    probability: float


def suspects(predictor: Predictor, examples: Sequence[Example]) -> list[Suspect]:
    """The suspected label errors, the most suspect first: a text's label, or a word's tag.

    Raises:
        ConfigError: cleanlab is not installed, or the task has no single label whose probability could be doubted.
    """
    try:
        import cleanlab.filter
        import cleanlab.token_classification.filter
    except ImportError as err:
        raise ConfigError("suspected label errors need an extra: pip install 'lorakit[cleanlab]'") from err
    check_labels(predictor.task.name, examples, predictor.task.labels)
    labels = predictor.task.labels
    if isinstance(predictor.task, TokenClassification):
        tables = _word_probabilities(predictor, examples)
        tags = [[labels.index(tag) for tag in example.tags] for example in examples]
        with _no_word_of_rare_labels():
            found = cleanlab.token_classification.filter.find_label_issues(tags, tables, n_jobs=1)
        return [_suspect(examples[i], tags[i][j], tables[i][j], labels, word=j) for i, j in found]
    answers = [predictor.task.to_json(e, a) for e, a in zip(examples, predictor.answers(examples), strict=True)]
    if not all({"label", "probabilities"} <= answer.keys() for answer in answers):
        raise ConfigError(f"{predictor.task.name}: suspected label errors are told for one label a text or a word")
    given = [labels.index(labels_of(example)[0]) for example in examples]
    table = np.array([[answer["probabilities"][label] for label in labels] for answer in answers])
    with _no_word_of_rare_labels():
        order = cleanlab.filter.find_label_issues(given, table, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [_suspect(examples[i], given[i], table[i], labels) for i in order]


@contextmanager
def _no_word_of_rare_labels() -> Iterator[None]:
    """cleanlab warns of every label with too few examples to judge, which `check` lists itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="May not flag all label issues", category=UserWarning)
        yield


def _word_probabilities(predictor: Predictor, examples: Sequence[Example]) -> list[Any]:
    """For each example the probability of each tag for each word, (W, C)."""
    raws = predict_all(predictor.model, predictor.task, predictor.task.encode(examples), predictor.device)
    return [torch.cat([read.log_p for read in of_example]).softmax(-1).numpy() for of_example in raws]


def _suspect(
    example: Example, given: int, probabilities: Any, labels: Sequence[str], word: int | None = None
) -> Suspect:
    best = int(probabilities.argmax())
    text = example.text if word is None else f"{example.words[word]} (word {word + 1})"
    return Suspect(example.where, text, labels[given], labels[best], float(probabilities[best]))
