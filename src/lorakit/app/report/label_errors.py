"""Labels that a trained run finds unlikely: confident learning (Northcutt et al. 2021, arXiv:1911.00068) by cleanlab.

`lorakit check` predicts with the run; a report uses the answers in its folder and needs no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorakit.data.audit import labels_of
from lorakit.data.example import Example
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.inference.predictor import Predictor
    from lorakit.training.run_files import RunFiles

Place = tuple[str, str]  # file and line of a label, and its text


class Suspect(NamedTuple):
    """A label that is likely wrong: where it is, its text, the label, the run's label and its probability."""

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
    from lorakit.tasks.registry import check_labels  # late, as below: they need torch
    from lorakit.tasks.token_classification import TokenClassification

    if find_spec("cleanlab") is None:
        raise ConfigError("suspected label errors need an extra: pip install 'lorakit[cleanlab]'")
    check_labels(predictor.side.task.name, examples, predictor.side.labels)
    if isinstance(predictor.task, TokenClassification):
        return _of_words(predictor, examples)
    answers = [predictor.task.to_json(e, a) for e, a in zip(examples, predictor.answers(examples), strict=True)]
    if not all("probabilities" in answer for answer in answers):
        raise ConfigError(
            f"{predictor.side.task.name}: label errors can only be found for tasks that give each label a probability"
        )
    gold = [labels_of(example) for example in examples]
    places = [(example.where, example.text) for example in examples]
    several = "labels" in answers[0]
    return _suspects(places, gold if several else [row[0] for row in gold], [a["probabilities"] for a in answers])


def _of_words(predictor: Predictor, examples: Sequence[Example]) -> list[Suspect]:
    """Tags of words, all words in a row as one table (Wang and Mueller 2022, arXiv:2210.03920); of a CRF what it is fed."""
    import torch

    from lorakit.inference.answer import predict_all

    raws = predict_all(predictor.model, predictor.task, predictor.task.encode(examples), predictor.device)
    table = torch.cat([read.log_p for of_example in raws for read in of_example]).softmax(-1).numpy()  # (words, C)
    places = [(e.where, f"{word} (word {i})") for e in examples for i, word in enumerate(e.words, start=1)]
    return _of_one_label(places, [tag for e in examples for tag in e.tags], table, predictor.side.labels)


def suspects_of_run(run: RunFiles) -> list[Suspect] | str:
    """The validation labels that a run finds unlikely, by line, or why none can be listed."""
    if not run.predictions or any(p.probabilities is None for p in run.predictions):
        return "not looked for: these answers give no probability of each label (lorakit check DATA --run RUN judges words)"
    if find_spec("cleanlab") is None:
        return "not looked for: it takes an extra, pip install 'lorakit[cleanlab]'"
    several = run.predictions[0].labels is not None
    # a single label unknown to training cannot be judged
    rows = [(str(i), p, p.probabilities or {}) for i, p in enumerate(run.predictions, start=1)]
    rows = [(line, p, shares) for line, p, shares in rows if several or p.expected in shares]
    try:
        return _suspects(
            [(line, p.text) for line, p, _ in rows], [p.expected for _, p, _ in rows], [s for *_, s in rows]
        )
    except (ValueError, LookupError) as err:  # for example too few examples of a label
        return f"not looked for: cleanlab cannot judge these answers ({str(err).partition(chr(10))[0]})"


def _suspects(
    places: Sequence[Place], gold: Sequence[Any], probabilities: Sequence[Mapping[str, float]]
) -> list[Suspect]:
    """From each row's label, or collection of labels, and the probability of every label."""
    labels = list(probabilities[0])
    table = np.array([[row[label] for label in labels] for row in probabilities])
    if isinstance(gold[0], str):
        return _of_one_label(places, gold, table, labels)
    doubted = []
    for label, there in zip(labels, table.T, strict=True):  # each label is a yes-or-no question
        names = (f"not {label}", label)
        doubted += _of_one_label(places, [names[label in row] for row in gold], np.stack([1 - there, there], 1), names)
    return sorted(doubted, key=lambda suspect: -suspect.probability)


def _of_one_label(places: Sequence[Place], gold: Sequence[str], table: Any, labels: Collection[str]) -> list[Suspect]:
    """Shapes: N places and labels, table (N, C)."""
    from cleanlab.filter import find_label_issues

    names = list(labels)
    numbers = np.array([names.index(label) for label in gold])
    with warnings.catch_warnings():  # of labels with too few examples to judge, which `check` lists itself
        warnings.filterwarnings("ignore", message="May not flag all label issues", category=UserWarning)
        rows = find_label_issues(numbers, table, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [Suspect(*places[i], gold[i], names[int(table[i].argmax())], float(table[i].max())) for i in map(int, rows)]
