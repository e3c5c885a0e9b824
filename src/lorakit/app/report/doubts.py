"""Suspected label errors that the answers in a run folder show: confident learning by cleanlab, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from lorakit.app.report.page import Table
from lorakit.app.report.reading import Prediction, RunFiles

MOST = 30  # suspects that are shown
Issues = Callable[[Sequence[int], Any], list[int]]


def doubts(run: RunFiles) -> Table | str:
    """The validation labels that the run does not believe, the most suspect first, or why none can be named."""
    if not run.predictions or any(p.probabilities is None for p in run.predictions):
        return "not looked for: these answers give no probability of each label (lorakit check DATA --run RUN judges words)"
    if find_spec("cleanlab") is None:
        return "not looked for: it takes an extra, pip install 'lorakit[cleanlab]'"
    from lorakit.app.suspects import label_issues  # late: needs torch

    several = run.predictions[0].labels is not None
    try:
        rows = (_of_each_label if several else _of_one_label)(run.predictions, label_issues)
    except ValueError as err:  # too few examples of a label, say
        return f"not looked for: cleanlab cannot judge these answers ({str(err).partition(chr(10))[0]})"
    if not rows:
        return "none found"
    columns = ("line", "text", "label", "the run says", "confidence")
    return Table("suspects", f"{len(rows)} suspected, the most suspect first", columns, rows[:MOST])


def _of_one_label(predictions: Sequence[Prediction], issues: Issues) -> list[tuple[str | float, ...]]:
    import numpy as np

    labels = list(predictions[0].probabilities or {})
    table = np.array([[(p.probabilities or {}).get(label, 0.0) for label in labels] for p in predictions])
    given = [labels.index(str(p.expected)) if str(p.expected) in labels else -1 for p in predictions]
    known = [i for i, label in enumerate(given) if label >= 0]
    return [
        (i + 1, predictions[i].text, labels[given[i]], labels[int(table[i].argmax())], round(float(table[i].max()), 4))
        for i in (known[n] for n in issues([given[i] for i in known], table[known]))
    ]


def _of_each_label(predictions: Sequence[Prediction], issues: Issues) -> list[tuple[str | float, ...]]:
    import numpy as np

    rows: list[tuple[str | float, ...]] = []
    for label in predictions[0].probabilities or {}:
        there = np.array([(p.probabilities or {}).get(label, 0.0) for p in predictions])
        given = [int(isinstance(p.expected, list) and label in p.expected) for p in predictions]
        names = (f"not {label}", label)
        for i in issues(given, np.stack([1 - there, there], axis=1)):
            sure = float(max(there[i], 1 - there[i]))
            rows.append((i + 1, predictions[i].text, names[given[i]], names[1 - given[i]], round(sure, 4)))
    return sorted(rows, key=lambda row: -float(row[-1]))
