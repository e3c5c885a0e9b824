"""Labels that a trained run does not believe: confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
    """The suspected label errors, the most suspect first: a text's label, one of several labels, or a word's tag.

    Raises:
        ConfigError: cleanlab is not installed, or the task gives no probability of each label.
    """
    try:
        import cleanlab.filter  # noqa: F401
    except ImportError as err:
        raise ConfigError("suspected label errors need an extra: pip install 'lorakit[cleanlab]'") from err
    check_labels(predictor.task.name, examples, predictor.task.labels)
    if isinstance(predictor.task, TokenClassification):
        return _of_words(predictor, examples)
    answers = [predictor.task.to_json(e, a) for e, a in zip(examples, predictor.answers(examples), strict=True)]
    if not all("probabilities" in answer for answer in answers):
        raise ConfigError(f"{predictor.task.name}: label errors are suspected where each label has a probability")
    labels = predictor.task.labels
    table = np.array([[answer["probabilities"][label] for label in labels] for answer in answers])
    if "labels" in answers[0]:
        return _of_each_label(examples, table, labels)
    given = [labels.index(labels_of(example)[0]) for example in examples]
    return [_suspect(examples[i], examples[i].text, given[i], table[i], labels) for i in label_issues(given, table)]


def _of_words(predictor: Predictor, examples: Sequence[Example]) -> list[Suspect]:
    """Tags of words, all words in a row as one table (Wang and Mueller 2022, arXiv:2210.03920); of a CRF what it is fed."""
    labels = predictor.task.labels
    raws = predict_all(predictor.model, predictor.task, predictor.task.encode(examples), predictor.device)
    table = torch.cat([read.log_p for of_example in raws for read in of_example]).softmax(-1).numpy()  # (words, C)
    given = [labels.index(tag) for example in examples for tag in example.tags]
    words = [(example, number) for example in examples for number in range(len(example.words))]
    return [
        _suspect(example, f"{example.words[number]} (word {number + 1})", given[i], table[i], labels)
        for i, (example, number) in ((i, words[i]) for i in label_issues(given, table))
    ]


def _of_each_label(examples: Sequence[Example], table: Any, labels: Sequence[str]) -> list[Suspect]:
    """Labels that are there or are not, each a question of its own."""
    found = []
    for label, there in zip(labels, table.T, strict=True):
        given = [int(label in labels_of(example)) for example in examples]
        both = np.stack([1 - there, there], axis=1)
        names = (f"not {label}", label)
        found += [_suspect(examples[i], examples[i].text, given[i], both[i], names) for i in label_issues(given, both)]
    return sorted(found, key=lambda suspect: -suspect.probability)


def label_issues(given: Sequence[int], table: Any) -> list[int]:
    """Positions of suspected labels, that of the least probable first. Shapes: (N,) numbers of labels, table (N, C)."""
    from cleanlab.filter import find_label_issues

    with warnings.catch_warnings():  # of labels with too few examples to judge, which `check` lists itself
        warnings.filterwarnings("ignore", message="May not flag all label issues", category=UserWarning)
        found = find_label_issues(np.array(given), table, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [int(position) for position in found]


def _suspect(example: Example, text: str, given: int, probabilities: Any, labels: Sequence[str]) -> Suspect:
    best = int(probabilities.argmax())
    return Suspect(example.where, text, labels[given], labels[best], float(probabilities[best]))
