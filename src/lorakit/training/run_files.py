"""The folder of a run: its files by one schema for writing and reading them, and its lock. No torch."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from lorakit.data.example import Example, examples_sha256
from lorakit.errors import OutputError
from lorakit.hashing import open_regular
from lorakit.inference.side import SIDE_FILE, Side, read_facts
from lorakit.recipe import UNSET, first_problem
from lorakit.runtime.events import Report, ignore
from lorakit.runtime.files import STORAGE, atomic_text, cannot_write, locked, make_folder, remove_leftovers
from lorakit.tasks.metrics.bootstrap import FEW, RESAMPLES, Resampled

RECIPE = "recipe.toml"  # the first file of a run
CHECKPOINTS = "checkpoints"
RESAMPLES_FILE = "resamples.json"
VECTORS = "vectors.npy"
MEMBER = "seed-"  # followed by the seed: the name of a run in the folder of several seeds
# Keys of scores.json about cost; all but the first differ between equal runs.
COSTS = ("padding", "memory_bytes", "train_seconds", "saving_seconds", "examples_per_s", "ended", "machine")
BEFORE = ("linear_probe", "base_score")  # keys about the metric before the first step
DIGITS = 9  # decimals of a resampled score
Model = TypeVar("Model", bound=BaseModel)


class _Open(BaseModel):
    """Keys of a newer lorakit are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)


def keeps_last(validation: str | None, folds: int | str, patience: int | None, n: int) -> bool:
    """Whether a run keeps its last step: a few examples held out at random cannot choose the best one.

    Cross-validation scores a way to train to the end, so with folds it is the last one, too. `validation`, `folds` and
    `patience` are those of the recipe, `n` is the number of validation examples. With patience the best counts.
    """
    return validation is None and patience is None and (bool(folds) or n < FEW)


class About(_Open):
    """Facts in scores.json about the run and its cost."""

    metric: str
    best_step: int = 0
    linear_probe: float | None = None  # the metric before the first step, of the best head over the frozen base
    base_score: float | None = None  # the metric before the first step, for the untouched base
    evaluations: int = 1
    folds: int = 0  # of the cross-validation that the scores are from
    last: dict[str, Any] = {}  # scores of the last evaluation
    examples: dict[str, int] = {}
    left_out: dict[str, int] = {}  # rows without a label
    cut: dict[str, int] = {}  # texts not read to their end, by part
    texts: dict[str, int] = {}  # all texts of those parts: an example may have several
    method: str = "lora"
    parameters: dict[str, int] = {}
    train_seconds: float | None = None
    saving_seconds: float | None = None
    examples_per_s: float | None = None
    padding: float | None = None  # share of the tokens
    memory_bytes: int | None = None  # peak
    dtype: str = ""
    seed: int | None = None
    ended: str = ""  # ISO 8601, UTC
    machine: str = ""  # that it was trained on


class Confusion(_Open):
    """Rows gold, columns predicted."""

    labels: list[str] = Field(min_length=1)
    matrix: list[list[NonNegativeInt]]

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        if [len(row) for row in self.matrix] != [len(self.labels)] * len(self.labels):
            raise ValueError("not a row and a column for each label")
        return self


def _without_none(row: Any) -> Any:
    """The defined scores of a label: without an example it has no average precision."""
    return {name: value for name, value in row.items() if value is not None} if isinstance(row, Mapping) else row


LabelScores = Annotated[Mapping[str, float], BeforeValidator(_without_none)]


class RunScores(About):
    """scores.json. Scores are extra keys with floats; see `values`."""

    intervals: dict[str, tuple[float, float]] = {}
    per_class: dict[str, LabelScores] = {}
    per_label: dict[str, LabelScores] = {}
    per_type: dict[str, LabelScores] = {}
    confusion: Confusion | None = None
    errors: dict[str, int] = {}  # of entities
    positive_label: str | None = None
    test: dict[str, Any] = {}

    @property
    def values(self) -> dict[str, float]:
        """The scores that are numbers, by name."""
        return {name: value for name, value in (self.model_extra or {}).items() if isinstance(value, float)}

    @property
    def by_label(self) -> dict[str, LabelScores]:
        """Precision, recall, F1 and support of each class, label or type."""
        return self.per_class or self.per_label or self.per_type


class Line(_Open):
    """A line of metrics.jsonl: a logged step, or an evaluation."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    validation: dict[str, float] | None = None
    is_best: bool = False


class Span(_Open):
    """An entity with its offsets in the text."""

    entity_group: str
    start: NonNegativeInt
    end: NonNegativeInt
    score: float | None = None


class Prediction(_Open):
    """A line of predictions.jsonl, of any task."""

    model_config = ConfigDict(allow_inf_nan=False)
    text: str
    pair: str | None = None
    expected: str | float | list[Span] | list[str]
    expected_entities: list[Span] | None = None  # where `expected` is a text
    label: str | None = None
    labels: list[str] | None = None
    score: float | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None
    entities: list[Span] | None = None
    generated: str | None = None
    choices: list[str] = []  # A, B, ..., by which label and expected name them

    @property
    def is_judged(self) -> bool:
        """Whether it is right or wrong by itself; a vector or a similarity is so among others alone."""
        answers = (self.label, self.labels, self.value, self.entities, self.generated)
        return any(answer is not None for answer in answers)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.value is not None and not isinstance(self.expected, float):
            raise ValueError("the answer is a number where none is expected")
        return self


@dataclass(frozen=True)
class RunFiles:
    """The content of a run folder; `missing` names absent files."""

    path: Path
    scores: RunScores
    lines: list[Line]
    predictions: list[Prediction]
    side: Side | None
    recipe: Mapping[str, Any]
    recipe_text: str
    missing: list[str]
    vectors: np.ndarray[Any, np.dtype[np.float16]] | None = None  # of the first predictions' texts, if it embeds them

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def shipped(self) -> Path:
        """The folder with the adapter, or with the model after full fine-tuning."""
        return self.path / ("model" if self.scores.method == "full" else "adapter")

    def section(self, name: str) -> dict[str, Any]:
        """A table of the recipe; empty where it has none."""
        table = self.recipe.get(name)
        return dict(table) if isinstance(table, Mapping) else {}


def runs_of(folder: Path) -> list[Path]:
    """The runs in the folder of several seeds, by seed; any other folder itself."""
    members = [path for path in folder.glob(f"{MEMBER}*") if path.name.removeprefix(MEMBER).isdecimal()]
    return sorted(members, key=lambda path: int(path.name.removeprefix(MEMBER))) or [folder]


def read_run(path: Path) -> RunFiles:
    """Read a run folder; only scores.json is required.

    Raises:
        OutputError: it is not a finished run, or a file in it is damaged.
    """
    if not path.is_dir():
        raise OutputError(f"{path}: no such run folder")
    scores = _texts(path / "scores.json")
    if not scores:
        raise OutputError(f"{path}: no scores.json; the run is not finished")
    read = RunFiles(
        path=path,
        scores=_checked(RunScores, scores[0], path / "scores.json"),
        lines=_lines(Line, path / "metrics.jsonl"),
        predictions=_lines(Prediction, path / "predictions.jsonl"),
        side=None,
        recipe={},
        recipe_text="".join(_texts(path / RECIPE)),
        missing=[],
    )
    try:
        recipe = tomllib.loads(read.recipe_text)
    except (tomllib.TOMLDecodeError, RecursionError) as err:
        raise OutputError(f"{path / RECIPE}: damaged: {err}") from err
    side = read_facts(read.shipped) if (read.shipped / SIDE_FILE).exists() else None
    names = ("metrics.jsonl", "predictions.jsonl", f"{read.shipped.name}/{SIDE_FILE}", RECIPE)
    missing = [name for name in names if not (path / name).exists()]
    return replace(read, side=side, recipe=recipe, missing=missing, vectors=_vectors(path / VECTORS))


def _vectors(path: Path) -> np.ndarray[Any, np.dtype[np.float16]] | None:
    """Shapes: (n, texts of an example, d), or None where there is no file."""
    try:
        with open_regular(path) as file:
            vectors: Any = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as err:
        raise OutputError(f"{path}: damaged: {type(err).__name__} {err}") from err
    if vectors.ndim != 3 or vectors.dtype != np.float16 or not np.isfinite(vectors).all():
        raise OutputError(f"{path}: damaged: not finite vectors in fp16 of the texts of each example")
    return vectors  # type: ignore[no-any-return]


def _texts(path: Path) -> list[str]:
    """The content of a file, if it is there."""
    try:
        with open_regular(path) as file:
            return [file.read().decode()]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as err:
        raise OutputError(f"{path}: damaged: {type(err).__name__} {err}") from err


def _lines(model: type[Model], path: Path) -> list[Model]:
    text = "".join(_texts(path))
    return [_checked(model, line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), start=1) if line]


def _checked(model: type[Model], text: str, place: object) -> Model:
    try:
        return model.model_validate(json.loads(text))
    except ValidationError as err:
        raise OutputError(f"{place}: damaged: {first_problem(err)}") from err
    except (ValueError, RecursionError) as err:
        raise OutputError(f"{place}: damaged: {type(err).__name__} {err}") from err


# Resampled scores, to compare runs over the same examples without a model


@dataclass(frozen=True)
class Sampled:
    """Scores on each resample of some examples, identified by their sha256; `metric` is the main score."""

    sha256: str
    n: int
    metric: str
    scores: Mapping[str, Resampled]


def sampled(examples: Sequence[Example], metric: str, scores: Mapping[str, Resampled]) -> Sampled:
    """The resampled scores of answers to these examples, in this order."""
    return Sampled(examples_sha256(examples), len(examples), metric, scores)


def write_resamples(folder: Path, of_run: Sampled) -> None:
    """Write resamples.json into a run folder; an undefined score is null."""
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
    atomic_text(folder / RESAMPLES_FILE, json.dumps(content) + "\n")


def _or_null(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None


def read_resamples(run: Path) -> Sampled:
    """Read resamples.json of a run folder.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    path = run / RESAMPLES_FILE
    if not run.is_dir():
        raise OutputError(f"{run}: no such run folder")
    if not path.is_file():
        raise OutputError(
            f"{run}: no {RESAMPLES_FILE}; the run is not finished; use --on DATA to compare by predicting"
        )
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
        sizes = [len(numbers) for s in scores.values() for numbers in (s.right, s.each) if numbers is not None]
        if any(s.values.shape != (RESAMPLES,) for s in scores.values()) or set(sizes) - {n}:
            raise ValueError("numbers are missing")
        return Sampled(str(raw["examples"]["sha256"]), n, str(raw["metric"]), scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise OutputError(f"{path}: damaged: {type(err).__name__} {err}") from err


# The folder itself: created, locked, cleared of leftovers of killed processes, refused if it holds something else


@contextmanager
def run_folder(folder: Path, resume: str | None, report: Report = ignore) -> Iterator[None]:
    """Lock a run folder; it is created if needed, and removed again if it stays empty.

    Raises:
        OutputError: another process trains there, it holds something that cannot be resumed, or it cannot be created.
    """

    def check(holds: set[str]) -> None:
        if resume is None and holds:
            raise OutputError(f"output.dir = {str(folder)!r} exists already; choose another one, or use --resume auto")
        if resume is not None and holds and not is_run(folder):
            raise OutputError(f"output.dir = {str(folder)!r} contains no run to resume (no {RECIPE})")
        if resume not in (None, "auto") and not Path(resume).is_dir():
            raise OutputError(f"--resume {resume}: no such checkpoint; use auto, or the folder of a checkpoint")

    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"output.dir = {str(folder)!r} exists already, and is not a folder")
        made = make_folder(folder)
    except OSError as err:
        if err.errno in STORAGE:
            raise cannot_write(folder, err) from err
        raise OutputError(f"output.dir = {str(folder)!r} cannot be created: {err.strerror}") from err
    try:
        with locked(folder, check, "training", "output.dir", report):
            if (folder / CHECKPOINTS).is_dir():
                remove_leftovers(folder / CHECKPOINTS, alone=True)
            yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def is_run(folder: Path) -> bool:
    """Whether its recipe was written by a run; a user's own would be overwritten."""
    try:
        return UNSET in (folder / RECIPE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
