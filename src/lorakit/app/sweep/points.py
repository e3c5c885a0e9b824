"""The points of a sweep: what is asked for on the command line or in a file, as settings of a recipe.

In `key=value` words commas part the values of a grid, and brackets make a list: `lora.target_modules=[query,value],[query]`
are two points. `train.lr=1e-5..1e-2` is a range to draw from.
"""

from __future__ import annotations

import json
import math
import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin

from lorakit.errors import ConfigError, DataError, first_line
from lorakit.hashing import open_regular, parse_toml
from lorakit.recipe import Recipe

Point = Mapping[str, Any]  # section.key -> value
WORD = re.compile(r"(?P<key>\w+\.\w+)=(?P<text>.*)", re.DOTALL)
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
RANGE = re.compile(rf"(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})", re.IGNORECASE)
SEED, SEEDS = "train.seed", "train.seeds"
TRIES = 100  # draws for each new point, before a small space is taken to be used up


@dataclass(frozen=True)
class Choice:
    """Values of a key, each of them a point's or equally likely."""

    key: str
    values: Sequence[Any]

    def draw(self, generator: random.Random) -> Any:
        """One of them."""
        return generator.choice(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included: whole ones where both are; else on a log scale unless the lower one is 0."""

    key: str
    low: float
    high: float

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def is_log(self) -> bool:
        """Whether equal ratios are equally likely."""
        return not self.is_whole and self.low > 0

    def draw(self, generator: random.Random) -> float:
        """A number between."""
        if self.is_whole:
            return generator.randint(int(self.low), int(self.high))
        if not self.is_log:
            return generator.uniform(self.low, self.high)
        number = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return min(self.high, max(self.low, number))


Axis = Choice | Range


def parse_axes(words: Sequence[str]) -> list[Axis]:
    """What each word asks for, in order.

    Raises:
        ConfigError: a word is no key=value, a key comes twice, a value or a range is empty, or a key that takes lists
            has commas without brackets.
    """
    axes = [_axis(word) for word in words]
    for i, axis in enumerate(axes):
        if axis.key in (before.key for before in axes[:i]):
            raise ConfigError(f"{words[i]!r}: {axis.key} is there twice; say all of its values in one word")
    return axes


def _axis(word: str) -> Axis:
    if not (found := WORD.fullmatch(word)):
        raise ConfigError(f"{word!r}: a sweep takes section.key=value,value, for example train.lr=3e-4,1e-3")
    key, pieces = found["key"], _pieces(found["text"])
    if key == SEEDS:
        raise ConfigError(f"{word!r}: in a sweep say --seeds 0,1,2")
    if empty := [i for i, piece in enumerate(pieces, start=1) if not piece]:
        raise ConfigError(f"{word!r}: value {empty[0]} of {len(pieces)} is empty")
    if len(pieces) == 1 and (ends := RANGE.fullmatch(pieces[0])):
        low, high = (_value(ends[name]) for name in ("low", "high"))
        if not low < high:
            raise ConfigError(f"{word!r}: the range is empty; write the lower end first")
        return Range(key, low, high)
    if len(pieces) > 1 and _takes_lists(key) and not any(piece[0] in "['\"" for piece in pieces):
        whole = found["text"]
        raise ConfigError(
            f"{word!r}: {key} takes lists, so say [{whole}] for one point, or [a],[b] or 'a','b' for several"
        )
    values = [_value(piece) for piece in pieces]
    if twice := [piece for piece, value in zip(pieces, values, strict=True) if values.count(value) > 1]:
        raise ConfigError(f"{word!r}: {twice[0]} is there twice")
    return Choice(key, values)


def _pieces(text: str) -> list[str]:
    """The text cut at its commas, those within brackets, braces, parentheses and quotes left out."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            pieces.append("")
            continue
        if quote or letter in "'\"":
            quote = letter if not quote else "" if letter == quote else quote
        else:
            depth += (letter in "([{") - (letter in ")]}")
        pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def _value(text: str) -> Any:
    """The value as TOML reads it; bare words are strings, in lists too."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text.startswith("[") and text.endswith("]"):
            return [_value(piece) for piece in _pieces(text[1:-1]) if piece]
        return text


def _takes_lists(key: str) -> bool:
    section, _, name = key.partition(".")
    table = Recipe.model_fields[section].annotation if section in Recipe.model_fields else None
    fields = getattr(table, "model_fields", {})
    return name in fields and _has_tuple(fields[name].annotation)


def _has_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(map(_has_tuple, get_args(annotation)))


def word(key: str, value: Any) -> str:
    """The `key=value` word of a recipe that says this."""
    return f"{key}={toml(value)}"


def toml(value: Any) -> str:
    """The value as TOML writes it, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml(key)} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one character that JSON leaves raw


# Points


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the values, the last key changing fastest.

    Raises:
        ConfigError: there is a range.
    """
    for axis in axes:
        if isinstance(axis, Range):
            raise ConfigError(
                f"{axis.key}={axis.low}..{axis.high}: a range is drawn from; say how often with --random N, or --optuna"
            )
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in product(*(axis.values for axis in axes))]  # type: ignore[union-attr]


def draw_points(axes: Sequence[Axis], n: int, seed: int) -> list[Point]:
    """n different points. Each key draws from a generator of its own: other keys change none of its values.

    Raises:
        ConfigError: there are not so many.
    """
    generators = {axis.key: random.Random(f"{seed}/{axis.key}") for axis in axes}
    points: list[Point] = []
    for _ in range(TRIES * n):
        point = {axis.key: axis.draw(generators[axis.key]) for axis in axes}
        if point not in points:
            points.append(point)
        if len(points) == n:
            return points
    raise ConfigError(f"--random {n}: there are only {len(points)} different points")


def read_points(path: Path) -> list[Point]:
    """The points in a file: a JSON object a line, or [[point]] tables of TOML; {"train.lr": 1e-3} or nested.

    Raises:
        DataError: the file cannot be read, or an entry is no point.
    """
    try:
        with open_regular(path) as file:
            text = file.read().decode()
        if path.suffix == ".toml":
            rows = enumerate(parse_toml(text).get("point", ()), start=1)
            found = [(f"{path}: point {number}", row) for number, row in rows]
        else:
            found = list(_json_lines(path, text))
    except (OSError, ValueError) as err:
        raise DataError(f"{path}: cannot be read as points: {err}") from err
    if not found:
        raise DataError(f"{path}: no points in it: a JSON object a line, or [[point]] tables of TOML")
    return [_flat(row, where) for where, row in found]


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as err:
                raise DataError(f"{path}:{number}: not JSON: {first_line(err)}") from err


def _flat(row: Any, where: str) -> Point:
    if not isinstance(row, Mapping) or not row:
        raise DataError(f'{where}: {row!r} is not a point; write {{"train.lr": 1e-3, "lora.r": 8}}')
    point: dict[str, Any] = {}
    for key, value in row.items():
        if "." in key:
            point[key] = value
        elif isinstance(value, Mapping):
            point.update({f"{key}.{name}": entry for name, entry in value.items()})
        else:
            raise DataError(f"{where}: {key!r} is not a key of a recipe; write section.key, for example train.lr")
    return point


def joined_points(points: Sequence[Point], others: Sequence[Point]) -> list[Point]:
    """Each of the points with each of the others.

    Raises:
        ConfigError: a key is in both.
    """
    for a, b in product(points, others):
        if both := sorted(a.keys() & b.keys()):
            raise ConfigError(f"{both[0]} is both in the list of points and on the command line")
    return [{**a, **b} for a, b in product(points, others)]
