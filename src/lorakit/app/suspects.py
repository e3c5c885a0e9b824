"""Labels that a trained run does not believe: confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lorakit.data.audit import labels_of
from lorakit.data.example import Example
from lorakit.errors import ConfigError
from lorakit.inference.answer import predict_all
from lorakit.inference.predictor import Predictor
from lorakit.tasks.registry import check_labels
from lorakit.tasks.token_classification import TokenClassification


class Issue(NamedTuple):
    """A label that is likely wrong: the number of its row, what it says, what the probabilities say, and how surely."""

    row: int
    given: str
    suggested: str
    probability: float


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
    given = [labels_of(example) for example in examples]
    several = "labels" in answers[0]
    found = issues_of(given if several else [labels[0] for labels in given], [a["probabilities"] for a in answers])
    return [Suspect(examples[issue.row].where, examples[issue.row].text, *issue[1:]) for issue in found]


def _of_words(predictor: Predictor, examples: Sequence[Example]) -> list[Suspect]:
    """Tags of words, all words in a row as one table (Wang and Mueller 2022, arXiv:2210.03920); of a CRF what it is fed."""
    labels = predictor.task.labels
    raws = predict_all(predictor.model, predictor.task, predictor.task.encode(examples), predictor.device)
    table = torch.cat([read.log_p for of_example in raws for read in of_example]).softmax(-1).numpy()  # (words, C)
    words = [(example, number) for example in examples for number in range(len(example.words))]
    found = _of_one_label([example.tags[number] for example, number in words], table, labels)
    return [
        Suspect(example.where, f"{example.words[number]} (word {number + 1})", *issue[1:])
        for issue, (example, number) in ((issue, words[issue.row]) for issue in found)
    ]


def issues_of(
    given: Sequence[str] | Sequence[Collection[str]], probabilities: Sequence[Mapping[str, float]]
) -> list[Issue]:
    """The suspected labels, the most suspect first, from each row's label, or labels, and the probability of every label."""
    labels = list(probabilities[0])
    table = np.array([[row[label] for label in labels] for row in probabilities])
    of_one = [row for row in given if isinstance(row, str)]
    if of_one:
        return _of_one_label(of_one, table, labels)
    found = []
    for label, there in zip(labels, table.T, strict=True):  # that is there or is not, each a question of its own
        names = (f"not {label}", label)
        found += _of_one_label([names[label in row] for row in given], np.stack([1 - there, there], axis=1), names)
    return sorted(found, key=lambda issue: -issue.probability)


def _of_one_label(given: Sequence[str], table: Any, labels: Sequence[str]) -> list[Issue]:
    """Shapes: N labels, table (N, C)."""
    from cleanlab.filter import find_label_issues

    numbers = np.array([labels.index(label) for label in given])
    with warnings.catch_warnings():  # of labels with too few examples to judge, which `check` lists itself
        warnings.filterwarnings("ignore", message="May not flag all label issues", category=UserWarning)
        rows = find_label_issues(numbers, table, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [Issue(int(i), given[i], labels[int(table[i].argmax())], float(table[i].max())) for i in rows]
