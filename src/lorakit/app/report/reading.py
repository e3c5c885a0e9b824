"""What a report is made of: the files of a run folder, each checked, or known to be missing. No torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from lorakit.errors import OutputError
from lorakit.hashing import open_regular
from lorakit.inference.side import SIDE_FILE, Side, first_problem, read_facts

Model = TypeVar("Model", bound=BaseModel)


def _without_none(row: Any) -> Any:
    """The scores that a label has: one that no example has lacks its average precision."""
    return {name: value for name, value in row.items() if value is not None} if isinstance(row, Mapping) else row


Row = Annotated[Mapping[str, float], BeforeValidator(_without_none)]


class _Lenient(BaseModel):
    """Keys that a report does not know are of no harm to it."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Confusion(_Lenient):
    """Rows gold, columns predicted."""

    labels: list[str] = Field(min_length=1)
    matrix: list[list[NonNegativeInt]]

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        if [len(row) for row in self.matrix] != [len(self.labels)] * len(self.labels):
            raise ValueError("not a row and a column for each label")
        return self


class Scores(_Lenient):
    """scores.json. Every score is an extra key with a float; `values` has them."""

    metric: str
    method: str = "lora"
    best_step: int = 0
    evaluations: int = 1
    examples: dict[str, int] = {}
    intervals: dict[str, tuple[float, float]] = {}
    parameters: dict[str, int] = {}
    per_class: dict[str, Row] = {}
    per_label: dict[str, Row] = {}
    per_type: dict[str, Row] = {}
    confusion: Confusion | None = None
    errors: dict[str, int] = {}
    test: dict[str, Any] = {}
    train_seconds: float | None = None
    saving_seconds: float | None = None
    examples_per_s: float | None = None
    dtype: str = ""
    seed: int | None = None

    @property
    def values(self) -> dict[str, float]:
        """The scores that are numbers, by name."""
        return {name: value for name, value in (self.model_extra or {}).items() if isinstance(value, float)}

    @property
    def by_label(self) -> dict[str, Row]:
        """Precision, recall, F1 and support of each class, label or type."""
        return self.per_class or self.per_label or self.per_type


class Line(_Lenient):
    """A line of metrics.jsonl: a logged step, or an evaluation."""

    step: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    validation: dict[str, float] | None = None
    is_best: bool = False


class Entity(_Lenient):
    """A span of the text."""

    entity_group: str
    start: NonNegativeInt
    end: NonNegativeInt
    score: float | None = None


class Prediction(_Lenient):
    """A line of predictions.jsonl, of whichever task."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    text: str
    pair: str | None = None
    expected: str | float | list[Entity] | list[str]
    label: str | None = None
    labels: list[str] | None = None
    score: float | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None
    entities: list[Entity] | None = None
    generated: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.value is not None and not isinstance(self.expected, float):
            raise ValueError("a number is answered where none is expected")
        return self


@dataclass(frozen=True)
class RunFiles:
    """The content of a run folder; `missing` names the files that are not there."""

    path: Path
    scores: Scores
    lines: list[Line]
    predictions: list[Prediction]
    side: Side | None
    recipe: Mapping[str, Any]
    recipe_text: str
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def task(self) -> str:
        """The task's name in words, or nothing where no recipe tells it."""
        return str(_section(self.recipe, "task").get("name", "")).replace("_", " ")

    @property
    def shipped(self) -> Path:
        """The folder with the adapter, or with the model after full fine-tuning."""
        return self.path / ("model" if self.scores.method == "full" else "adapter")


def read_run(path: Path) -> RunFiles:
    """Read a run folder; only scores.json must be there.

    Raises:
        OutputError: it is no finished run, or a file in it is damaged.
    """
    if not path.is_dir():
        raise OutputError(f"{path}: no such run folder")
    missing: list[str] = []
    text = _text(path / "scores.json", missing)
    if text is None:
        raise OutputError(f"{path}: no scores.json in it, which a finished run has")
    scores = _checked(Scores, text, path / "scores.json")
    lines = _lines(Line, path / "metrics.jsonl", missing)
    predictions = _lines(Prediction, path / "predictions.jsonl", missing)
    place = path / ("model" if scores.method == "full" else "adapter")
    side = read_facts(place) if (place / SIDE_FILE).exists() else None
    if side is None:
        missing.append(str(place / SIDE_FILE))
    recipe = _text(path / "recipe.toml", missing) or ""
    return RunFiles(
        path,
        scores,
        lines,
        predictions,
        side,
        _toml(recipe, path / "recipe.toml"),
        recipe,
        [str(Path(name).relative_to(path)) for name in missing],
    )


def _text(path: Path, missing: list[str]) -> str | None:
    """The content of a file; one that is not there is noted."""
    try:
        with open_regular(path) as file:
            return file.read().decode()
    except FileNotFoundError:
        missing.append(str(path))
        return None
    except (OSError, UnicodeDecodeError) as err:
        raise OutputError(f"{path}: damaged: {type(err).__name__} {err}") from err


def _lines(model: type[Model], path: Path, missing: list[str]) -> list[Model]:
    text = _text(path, missing) or ""
    return [_checked(model, line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), start=1) if line]


def _checked(model: type[Model], text: str, place: object) -> Model:
    try:
        return model.model_validate(json.loads(text))
    except ValidationError as err:
        raise OutputError(f"{place}: damaged: {first_problem(err)}") from err
    except (ValueError, RecursionError) as err:
        raise OutputError(f"{place}: damaged: {type(err).__name__} {err}") from err


def _toml(text: str, place: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as err:
        raise OutputError(f"{place}: damaged: {err}") from err


def _section(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = recipe.get(name, {})
    return found if isinstance(found, Mapping) else {}
