"""Suspected label errors that the answers in a run folder show: confident learning by cleanlab, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lorakit.app.report.page import Table
from lorakit.app.report.reading import RunFiles

MOST = 30  # suspects that are shown


def doubts(run: RunFiles) -> Table | str:
    """The validation labels that the run does not believe, the most suspect first, or why none can be named."""
    if not run.predictions or any(p.probabilities is None for p in run.predictions):
        return "not looked for: these answers give no probability of each label (lorakit check DATA --run RUN judges words)"
    if find_spec("cleanlab") is None:
        return "not looked for: it takes an extra, pip install 'lorakit[cleanlab]'"
    from lorakit.app.suspects import issues_of  # late: needs torch

    # of a single label that training did not have, nothing is known
    known = [(i, p, p.probabilities or {}) for i, p in enumerate(run.predictions, start=1)]
    if run.predictions[0].labels is None:
        known = [(i, p, row) for i, p, row in known if str(p.expected) in row]
        given: list[Any] = [str(p.expected) for _, p, _ in known]
    else:
        given = [p.expected if isinstance(p.expected, list) else [] for _, p, _ in known]
    try:
        found = issues_of(given, [row for _, _, row in known])
    except (ValueError, LookupError) as err:  # too few examples of a label, say
        return f"not looked for: cleanlab cannot judge these answers ({str(err).partition(chr(10))[0]})"
    if not found:
        return "none found"
    rows = [
        (known[each.row][0], known[each.row][1].text, each.given, each.suggested, round(each.probability, 4))
        for each in found[:MOST]
    ]
    columns = ("line", "text", "label", "the run says", "confidence")
    return Table("suspects", f"{len(found)} suspected, the most suspect first", columns, rows)
