"""Questions with choices, one of which is right: which columns hold them, and which choice an answer means."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from string import ascii_uppercase as LETTERS
from typing import Any, NamedTuple, get_args

from lorakit.data.delimited import Row, plain_name, written_list
from lorakit.data.example import Answers
from lorakit.errors import DataError, short

MOST = len(LETTERS)  # choices of a question
LISTS = ("choices", "options", "endings", "candidates", "answers")  # usual names of a column that holds all of them
# and of columns that hold one each: SWAG's ending0, COPA's choice1, MedMCQA's opa, PIQA's sol1, or A, B, C, D alone
SINGLE = re.compile(r"((?:ending|choice|option|answer|solution|sol|op)_?)(\d{1,2}|[a-z])|()([a-z])")
# A text and the question about it (or the begun sentence) that stands before each choice, by their usual names.
CONTEXTS = {"sent1": "sent2", "context": "question", "article": "question", "passage": "question"}


class Choices(NamedTuple):
    """The choices of a question, and what the file calls each: A, B, ... where it does not say."""

    names: tuple[str, ...]
    texts: tuple[str, ...]


def usual_choices(rows: Sequence[Row]) -> str | tuple[str, ...] | None:
    """The column of lists, or the columns of single choices in their order, that have usual names; None without any."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    plain = {plain_name(name): name for name in names}
    for name in (plain[usual] for usual in LISTS if usual in plain):
        if all(_listed(row.values.get(name)) is not None for row in rows):
            return name
    series: dict[str, list[tuple[int, str, str]]] = {}
    for short_name, name in plain.items():
        if match := SINGLE.fullmatch(short_name):
            prefix, end = (match[1] or "").strip("_"), match[2] or match[4]
            series.setdefault(prefix, []).append((int(end) if end.isdecimal() else 0, end, name))
    for of_prefix in series.values():
        first = min(of_prefix)[1]
        if len(of_prefix) > 1 and first in ("0", "1", "a"):
            return tuple(name for _, _, name in sorted(of_prefix))
    return None


def choices_of(row: Row, columns: str | Sequence[str]) -> Choices:
    """The choices of a row, from a column of lists or one each; columns at the end may be empty, where there are fewer.

    A list may be of texts, of `{"label", "text"}`, or two lists of these (ARC, CommonsenseQA), or a table of texts by name.

    Raises:
        DataError: they are no texts, or fewer than two or more than 26.
    """
    if isinstance(columns, str):
        named, place = _listed(row.values.get(columns)), f"column {columns!r}"
        if named is None:
            raise DataError(f"{row.where}: {place} holds {short(row.values.get(columns))}, not a list of choices")
    else:
        cells = [row.values.get(name) for name in columns]
        while cells and _is_empty(cells[-1]):
            cells.pop()
        named, place = [(None, cell) for cell in cells], f"columns {', '.join(columns)}"
    if not 2 <= len(named) <= MOST:
        more = "; for more name pairs, with task.name=reranker" if len(named) > MOST else ""
        raise DataError(f"{row.where}: {place}: {len(named)} choices, not 2 to {MOST}{more}")
    for number, (_, text) in enumerate(named, start=1):
        if isinstance(text, bool) or not isinstance(text, (str, int, float)) or _is_empty(text) or "\0" in str(text):
            raise DataError(f"{row.where}: {place}: choice {number} is {short(text)}, not a text")
    names = [LETTERS[i] if name is None else str(name).strip() for i, (name, _) in enumerate(named)]
    return Choices(tuple(names), tuple(str(text).strip() for _, text in named))


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell) or not str(cell).strip()


def _listed(cell: Any) -> list[tuple[Any, Any]] | None:
    """Names (None where there is none) and texts of a cell's choices; None of a cell without a list."""
    if isinstance(cell, str) and cell.strip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):  # which is how pandas writes one into a cell
            with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                return _listed(parse(cell.strip()))
        cell = written_list(cell.strip(), ",") if cell.strip()[-1:] == "]" else None
    if isinstance(cell, Mapping):
        texts = cell.get("text")
        if not isinstance(texts, list):
            return list(cell.items())
        names = cell.get("label")
        names = names if isinstance(names, list) and len(names) == len(texts) else [None] * len(texts)
        return list(zip(names, texts, strict=True))
    if not isinstance(cell, list):
        return None
    return [(c.get("label"), c.get("text", c)) if isinstance(c, Mapping) else (None, c) for c in cell]


# What an answer may be: a choice's name or text, or its number


def _by_name(answer: str, choices: Choices) -> int | None:
    name = answer if answer in choices.names else answer.strip("(). ").upper()
    return choices.names.index(name) if name in choices.names else None


def _by_text(answer: str, choices: Choices) -> int | None:
    return choices.texts.index(answer) if choices.texts.count(answer) == 1 else None


def _by_number(first: int) -> Callable[[str, Choices], int | None]:
    def read(answer: str, choices: Choices) -> int | None:
        number = answer.removesuffix(".0")  # as pandas writes whole numbers of a column with gaps
        at = int(number) - first if number.isdecimal() and len(number) < 4 else -1
        return at if 0 <= at < len(choices.texts) else None

    return read


READINGS: Mapping[Answers, Callable[[str, Choices], int | None]] = dict(
    zip(get_args(Answers), (_by_name, _by_text, _by_number(0), _by_number(1)), strict=True)
)
MEANING: Mapping[Answers, str] = {
    "name": "the name of a choice",
    "text": "the text of a choice",
    "from_0": "the number of a choice, from 0",
    "from_1": "the number of a choice, from 1",
}


def reading_of(source: str, column: str, rows: Iterable[Row], columns: str | Sequence[str]) -> Answers:
    """How the answers in a column name the right choice: as fits all of these rows.

    Raises:
        DataError: nothing fits them, or several readings do that mean different choices.
    """
    answered: list[tuple[str, Choices]] = []
    for row in rows:
        with suppress(DataError):  # of which reading in earnest makes more
            answered.append((str(row.values.get(column)).strip(), choices_of(row, columns)))
    fitting = {how: [read(*each) for each in answered] for how, read in READINGS.items()}
    fitting = {how: places for how, places in fitting.items() if None not in places}
    if not fitting:
        raise DataError(
            f"{source}: column {column!r} does not name choices: neither is each of its values a letter (A, B, ...) or a name, "
            f"nor a text, nor a number of a choice; the first one is {short(answered[0][0]) if answered else 'missing'}"
        )
    first, *others = fitting
    if first == "name":  # which no number is, but where a file says so
        others = [how for how in others if how == "text"]
    if other := next((other for other in others if fitting[other] != fitting[first]), None):
        raise DataError(
            f"{source}: column {column!r} may hold {MEANING[first]} or {MEANING[other]}; set data.answers={first} or {other}"
        )
    return first


def right_choice(row: Row, column: str, choices: Choices, how: Answers) -> str:
    """The letter of the right choice. Raises a DataError where the answer means none."""
    answer = str(row.values.get(column)).strip()
    if (place := READINGS[how](answer, choices)) is None:
        raise DataError(
            f"{row.where}: column {column!r} holds {short(row.values.get(column))}, not {MEANING[how]}; "
            f"there are {len(choices.texts)}: {short(', '.join(choices.names))}"
        )
    return LETTERS[place]
