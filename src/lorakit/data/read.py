"""Any source to a Dataset: find the format, read it, choose the columns, check every record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lorakit.data.conll import DOCSTART, columns_of, read_conll
from lorakit.data.example import Columns, Dataset, Example, Wants, of_words
from lorakit.data.hub import read_hub, read_saved
from lorakit.data.labels import LABELS, one_label
from lorakit.data.tables import Row, read_csv, read_jsonl, read_label_first, read_parquet
from lorakit.data.tags import entities, is_tag, to_tags
from lorakit.data.text import lines_of
from lorakit.digest import file_sha256
from lorakit.errors import DataError, did_you_mean

TABLES: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    "csv": read_csv,
    "tsv": partial(read_csv, tabs=True),
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "label-first": read_label_first,
}
ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
}
USUAL = {
    "text": ("text", "sentence", "review", "sentence1", "content", "question", "premise", "message", "title"),
    "label": ("label", "labels", "category", "class", "sentiment", "target", "intent", "rating"),
    "words": ("tokens", "words"),
    "tags": ("ner_tags", "tags", "labels"),
}
FILE_LIKE = (
    ".csv",
    ".tsv",
    ".jsonl",
    ".ndjson",
    ".json",
    ".parquet",
    ".conll",
    ".txt",
    ".bio",
    ".iob",
    ".train",
    ".dev",
    ".test",
)


def read(
    source: str,
    wants: Wants = "label",
    *,
    columns: Columns = Columns(),
    format: str = "auto",
    split: str = "train",
) -> Dataset:
    """The examples of one source, in their order, each with what the task `wants`.

    With `wants = "text"` labels are taken from the column that `columns` names, if it names one, and not looked for.

    Raises:
        DataError: the source is missing, empty or damaged, a column is not there, or a record is incomplete; the
            message names the file and the line.
    """
    path = _path(source)
    kind = format if format != "auto" else _format(source, path)
    notes: list[str] = []
    if kind == "conll":
        examples, notes = read_conll(path)
    else:
        rows = _rows(kind, source, path, split)
        examples = list(_examples(rows, source, wants, columns, notes))
    if not examples:
        raise DataError(f"{source}: a header but no record")
    if kind == "conll" and wants not in ("words", "text"):
        raise DataError(f"{source}: CoNLL columns hold tagged words; this task needs a text and its {wants} a record")
    return Dataset(source, examples, _fingerprint(path, examples), notes)


def holds_words(source: str) -> bool:
    """Whether a source is a file of CoNLL columns."""
    return _format(source, _path(source)) == "conll"


def _path(source: str) -> Path:
    """The file or folder of a source, whose #SPLIT is no part of it; but a # may stand in a file's name."""
    return Path(source) if Path(source).exists() else Path(source.partition("#")[0])


def _format(source: str, path: Path) -> str:
    if path.is_dir():
        return "datasets"
    if not path.exists():
        if path.suffix.lower() in FILE_LIKE or source.startswith((".", "/", "~")):
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{source}: no such file; {did_you_mean(path.name, siblings)}")
        return "hub"
    return ENDINGS.get(path.suffix.lower()) or _sniffed(path)


def _sniffed(path: Path) -> str:
    """The format of a file whose ending says nothing, from its first lines."""
    lines = [line for line in lines_of(path)[:400] if line.strip()]
    rows = [columns_of(line) for line in lines]
    if all((len(row) in (2, 3, 4) and is_tag(row[-1])) or row[0] == DOCSTART for row in rows):
        return "conll"
    if lines[0].lstrip().startswith("{"):
        return "jsonl"
    first_words = {line.split()[0] for line in lines}
    if len(lines) >= 20 and len(first_words) <= len(lines) // 5 and "\t" not in lines[0]:
        return "label-first"
    if "\t" in lines[0]:
        return "tsv"
    if "," in lines[0]:
        return "csv"
    raise DataError(
        f"{path}: the format cannot be told from its name or first lines; say data.format={'|'.join([*TABLES, 'conll'])}"
    )


def _rows(kind: str, source: str, path: Path, split: str) -> Iterable[Row]:
    if kind == "hub":
        return read_hub(source, split)
    if kind == "datasets":
        return read_saved(Path(source), split)
    if kind not in TABLES:
        raise DataError(
            f"{source}: format = {kind!r} is not known; {did_you_mean(kind, [*TABLES, 'conll', 'datasets'])}"
        )
    return TABLES[kind](path)


def _examples(rows: Iterable[Row], source: str, wants: Wants, columns: Columns, notes: list[str]) -> Iterator[Example]:
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return
    make = _words_maker(first, source, notes) if wants == "words" else _text_maker(first, source, wants, columns, notes)
    for row in chain([first], iterator):
        yield make(row)


def _text_maker(first: Row, source: str, wants: Wants, columns: Columns, notes: list[str]) -> Callable[[Row], Example]:
    text = _column("text", columns.text, first, source, notes)
    label = _column("label", columns.label, first, source, notes) if wants != "text" or columns.label else None
    pair = _column("pair", columns.pair, first, source, notes) if columns.pair else None

    to_label = LABELS.get(wants, one_label)

    def make(row: Row) -> Example:
        return Example(
            text=_text(row, text),
            label=None if label is None else to_label(row, label),
            pair=None if pair is None else _text(row, pair),
            where=row.where,
        )

    return make


def _column(role: str, asked: str | None, first: Row, source: str, notes: list[str]) -> str:
    """The column that plays a role: the one asked for, or the first of the usual names that is there."""
    there = list(first.values)
    if asked is not None:
        if asked not in there:
            raise DataError(f"{source}: data.{role} = {asked!r} is no column; {did_you_mean(asked, there)}")
        return asked
    for name in USUAL[role]:
        if name in there:
            notes.append(f"{source}: {role} is column {name!r}")
            return name
    raise DataError(f"{source}: which column is the {role}? say data.{role}=NAME; columns: {', '.join(there)}")


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} holds {value!r}, not a text")
    if not value.strip():
        raise DataError(f"{row.where}: column {column!r} is empty")
    return value


def _words_maker(first: Row, source: str, notes: list[str]) -> Callable[[Row], Example]:
    there = list(first.values)
    words = next((name for name in USUAL["words"] if name in there), None)
    tags = next((name for name in USUAL["tags"] if name in there), None)
    if words is None or tags is None:
        raise DataError(
            f"{source}: this task needs tagged words: CoNLL columns, or records with the lists 'tokens' and "
            f"'ner_tags'; columns: {', '.join(there)}"
        )
    notes.append(f"{source}: words are column {words!r}, tags are column {tags!r}")

    def make(row: Row) -> Example:
        return _tagged(row, _strings(row, words), _strings(row, tags))

    return make


def _strings(row: Row, column: str) -> list[str]:
    value: Any = row.values.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise DataError(f"{row.where}: column {column!r} is no list of words or tags")
    return value


def _tagged(row: Row, words: Sequence[str], tags: Sequence[str]) -> Example:
    if len(words) != len(tags):
        raise DataError(f"{row.where}: {len(words)} words but {len(tags)} tags")
    for tag in tags:
        if not is_tag(tag):
            raise DataError(f"{row.where}: {tag!r} is no IOB tag; expected O, B-TYPE or I-TYPE")
    return of_words(words, to_tags(entities(tags), len(tags)), row.where)


def _fingerprint(path: Path, examples: Sequence[Example]) -> str:
    """sha256 of the file; of the records where there is no single file."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.text, example.pair, example.label, example.tags)).encode())
    return digest.hexdigest()


def read_texts(path: Path, columns: Columns = Columns()) -> list[Example]:
    """Texts to predict on: the lines of a .txt file, or the text column (and the pair's) of a table, in order."""
    if path.suffix.lower() == ".txt":
        lines = lines_of(path)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise DataError(f"{path}:{number}: the line is empty")
        return [Example(line) for line in lines]
    return list(read(str(path), "text", columns=replace(columns, label=None)).examples)
