"""The resampled scores of a run, kept in its folder so that runs over the same examples can be compared without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakit.data.example import Example, examples_sha256
from lorakit.errors import OutputError
from lorakit.runtime.files import atomic_text
from lorakit.tasks.metrics.bootstrap import RESAMPLES, Resampled

FILE = "resamples.json"
DIGITS = 9  # after the point


@dataclass(frozen=True)
class Sampled:
    """Scores on each resample of some examples, which their sha256 tells from others; `metric` is the headline."""

    sha256: str
    n: int
    metric: str
    scores: Mapping[str, Resampled]


def sampled(examples: Sequence[Example], metric: str, scores: Mapping[str, Resampled]) -> Sampled:
    """The scores of answers to these examples, in this order."""
    return Sampled(examples_sha256(examples), len(examples), metric, scores)


def write_resamples(folder: Path, of_run: Sampled) -> None:
    """Write resamples.json into a run folder; an undefined score is null there."""
    scores = {
        name: {
            "value": _or_null(score.value),
            "values": [_or_null(value) for value in score.values.tolist()],
            "right": None if score.right is None else [int(is_right) for is_right in score.right],
            "each": None if score.each is None else [_or_null(number) for number in score.each],
        }
        for name, score in of_run.scores.items()
    }
    content = {"examples": {"sha256": of_run.sha256, "n": of_run.n}, "metric": of_run.metric, "scores": scores}
    atomic_text(folder / FILE, json.dumps(content) + "\n")


def _or_null(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def read_resamples(run: Path) -> Sampled:
    """Read resamples.json of a run folder.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    path = run / FILE
    if not run.is_dir():
        raise OutputError(f"{run}: no such run folder")
    if not path.is_file():
        raise OutputError(f"{run}: no {FILE} in it, which a finished run has; --on DATA compares by predicting")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        n = int(raw["examples"]["n"])
        scores = {
            name: Resampled(
                float("nan") if score["value"] is None else float(score["value"]),
                np.array(score["values"], dtype=np.float64),  # null becomes NaN
                None if score["right"] is None else tuple(map(bool, score["right"])),
                None if score.get("each") is None else tuple(map(float, score["each"])),
                n,
            )
            for name, score in raw["scores"].items()
        }
        sizes = [len(given) for s in scores.values() for given in (s.right, s.each) if given is not None]
        if any(s.values.shape != (RESAMPLES,) for s in scores.values()) or set(sizes) - {n}:
            raise ValueError("numbers are missing")
        return Sampled(str(raw["examples"]["sha256"]), n, str(raw["metric"]), scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise OutputError(f"{path}: damaged: {type(err).__name__} {err}") from err
