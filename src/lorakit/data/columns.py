"""Rows to examples: which column plays which role, and every value checked. Columns that are guessed are said aloud."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from lorakit.data.delimited import MOST_COLUMNS, NO_HEADER, QUOTED_LIST, Row, plain_name, written_list
from lorakit.data.example import Columns, Example, Label, Wants, of_spans, of_words
from lorakit.data.spans import Marked, Span, is_spans, settle, spans_of
from lorakit.data.tags import entities, is_tag, odd_tags, scheme, standard, to_tags
from lorakit.data.text import MOST_NAMES, bad_records, counted, in_order, listed, short
from lorakit.errors import ConfigError, DataError, did_you_mean

S = TypeVar("S")
T = TypeVar("T")
USUAL = {  # as `plain_name` writes them
    "text": (
        "text",
        "sentence",
        "review",
        "sentence1",
        "content",
        "question",
        "premise",
        "message",
        "title",
        "data",
        "comment",
        "body",
        "tweet",
        "text1",
        "text_a",
        "sentence_a",
        "question1",
        "query",
        "utterance",
        "document",
        "post",
        "description",
        "headline",
        "abstract",
        "review_text",
        "review_body",
        "comment_text",
    ),
    "label": (
        "label",
        "labels",
        "category",
        "class",
        "sentiment",
        "target",
        "intent",
        "rating",
        "stars",
        "score",
        "topic",
        "emotion",
        "gold_label",
        "gold",
        "is_duplicate",
        "cats",
    ),
    "words": ("tokens", "words"),
    "tags": ("ner_tags", "tags", "labels", "ner", "ner_tag"),
    "spans": ("spans", "entities", "label", "labels", "annotations"),
}
PAIRS = {  # names of first texts and of the second ones that go with them
    "text": ("text_pair", "pair", "text2", "text_b", "second_text"),
    "text1": ("text2",),
    "text_a": ("text_b",),
    "sentence1": ("sentence2",),
    "sentence_a": ("sentence_b",),
    "premise": ("hypothesis",),
    "question": ("answer", "question2", "sentence"),
    "question1": ("question2",),
    "query": ("passage", "document"),
}
SECOND = {name for seconds in PAIRS.values() for name in seconds} - {"document", "passage", "sentence"}
VALUES = attrgetter("values")  # in C, since all rows are asked for their columns
TOKENS = "token_offsets"  # where readers of tokenised texts put the (start, end) of each token
SAMPLE = 100  # rows that are looked at where values choose a column; the same ones, however the rows are read


class Table(NamedTuple):
    """The rows of one source, and the columns asked for; what is found out about them goes into the notes."""

    source: str
    rows: Sequence[Row]
    asked: Columns
    notes: list[str]
    bad: list[DataError] | None = None  # what is wrong with rows that are left out; None: the first one is raised

    def usable(self, items: Iterable[S], make: Callable[[S], T]) -> list[T]:
        """What is made of each item; one of which nothing can be made is left out where the bad ones are collected."""
        if self.bad is None:
            return [make(item) for item in items]
        found = []
        for item in items:
            try:
                found.append(make(item))
            except DataError as err:
                self.bad.append(err)
        return found

    @property
    def there(self) -> list[str]:
        """All columns; a record of JSON may lack some."""
        found = list(dict.fromkeys(chain.from_iterable(map(VALUES, self.rows))))
        if len(found) > MOST_COLUMNS:
            raise DataError(f"{self.source}: {len(found):,} columns; a table has {MOST_COLUMNS:,} at most")
        return found

    def column(self, role: str, asked: str | None) -> str | None:
        """The column that plays a role: the one asked for, or the first of the usual names that is there."""
        there = self.there
        if asked is not None:
            if asked not in there:
                key = {"words": "text", "tags": "label"}.get(role, role)
                raise DataError(f"{self.source}: data.{key} = {asked!r} is not a column; {did_you_mean(asked, there)}")
            return asked
        names = self.usual(role)
        if role == "label":  # records may carry spans beside a label
            names.sort(key=self.holds_spans)
        if role == "text":  # max takes the first of several; the longest may be the second text of a pair
            longest = max(names, key=self.length, default=None)
            return next((name for name in names if self.second(name) == longest), longest)
        return next(iter(names), None)

    def usual(self, role: str) -> list[str]:
        """The columns whose names are usual for a role, in the order of these names, whatever their case."""
        plain: dict[str, list[str]] = {}
        for name in self.there:
            plain.setdefault(plain_name(name), []).append(name)
        return [name for usual in USUAL[role] for name in sorted(plain.get(usual, ()), key=lambda n: n != usual)]

    def length(self, column: str) -> int:
        """How many characters the texts of a column have, of the first rows; of the second texts of pairs none count."""
        if plain_name(column) in SECOND:
            return -1
        values = (row.values.get(column) for row in self.rows[:SAMPLE])
        return sum(len(value) for value in values if isinstance(value, str))

    def second(self, text: str) -> str | None:
        """The column of the second texts that goes with one of first texts by its name."""
        plain = {plain_name(name): name for name in self.there}
        return next((plain[name] for name in PAIRS.get(plain_name(text), ()) if name in plain), None)

    def said(self, role: str, asked: str | None) -> str:
        """The same, said aloud where it is guessed. Raises a DataError where there is none."""
        found = self.column(role, asked)
        if found is None:
            raise DataError(
                f"{self.source}: which column is the {role}? say data.{role}=NAME; columns: {listed(self.there)}"
                + (f"; {NO_HEADER}" if self.is_headless() else "")
            )
        if asked is None:
            others = (
                [name for name in self.usual(role) if name not in (found, self.second(found)) and self.length(name) > 0]
                if role == "text"
                else []
            )
            longest = f", the longest of {', '.join(map(repr, (found, *others)))}" if others else ""
            self.notes.append(f"{self.source}: {role} is column {found!r}{longest}")
        return found

    def is_headless(self) -> bool:
        """Whether the names of the columns look like values: one stands among its column's own, is a number or a sentence."""
        if self.asked.header is not None:
            return False
        return any(
            finite_number(name) is not None or name.count(" ") > 3 or any(row.values.get(name) == name for row in head)
            for name, head in ((name, self.rows[:SAMPLE]) for name in self.there[:MOST_NAMES])
        )

    @property
    def label(self) -> str | None:
        """The one column asked for, where words are wanted or looked for."""
        asked = self.asked.label
        if isinstance(asked, tuple):
            raise DataError(f"{self.source}: data.label names several columns; tags and spans stand in one")
        return asked

    def holds_spans(self, column: str) -> bool:
        """Whether a column has a filled list of spans somewhere."""
        return any(is_spans(row.values.get(column)) for row in self.rows)

    def holds_tags(self, column: str) -> bool:
        """Whether a column has a filled list of names somewhere."""
        lists = (value for row in self.rows if isinstance(value := row.values.get(column), list))
        return any(value and all(isinstance(name, str) for name in value) for value in lists)

    def spans(self) -> str | None:
        """The column of spans: the one asked for, or the first of the usual names that holds some."""
        asked = self.label
        names = self.usual("spans") if asked is None else [asked]
        empty = next((name for name in names if name == asked or plain_name(name) in ("spans", "entities")), None)
        if (found := next(filter(self.holds_spans, names), empty)) is None and not self.usual("label"):
            return next(filter(self.holds_spans, self.there), None)  # annotation tools name it as their users do
        return found


def is_annotated(table: Table) -> bool:
    """Whether the rows are words with tags, or texts with spans."""
    spans, tags = table.spans(), table.column("tags", None)
    if table.rows[0].lined or (spans is not None and table.holds_spans(spans)):
        return True
    if table.column("words", None) is None or tags is None:
        return False
    first = table.rows[0].values.get(tags)
    return isinstance(first, list) and all(
        type(tag) is int or (isinstance(tag, str) and is_tag(standard(tag))) for tag in first
    )


def examples_of(table: Table, wants: Wants) -> list[Example]:
    """An example of each row, with what the task `wants`; of none that is added to the table's bad ones.

    Raises:
        DataError: a column is not there, or a record is incomplete; the message names file and line.
    """
    try:
        found = _examples(table, wants)
    except DataError as err:
        if table.bad and table.asked.on_bad == "stop":  # of damaged lines columns may be lacking
            raise bad_records(table.source, in_order(table.bad)) from err
        raise
    if table.asked.group is None:
        return [example for _, example in found]
    column = table.said("group", table.asked.group)
    return table.usable(found, lambda pair: replace(pair[1], group=_group(pair[0], column)))


def _group(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is None or isinstance(value, (dict, list)) or not str(value).strip():
        raise DataError(f"{row.where}: column {column!r} holds {value!r}, not the name of a group")
    return str(value)


def _examples(table: Table, wants: Wants) -> list[tuple[Row, Example]]:
    if table.rows[0].lined:  # columns without names
        table = table._replace(asked=Columns())
    asked = table.asked
    words = table.column("words", asked.text if wants == "words" else None)
    if wants == "words":
        if found := _tag_columns(table):
            return _tagged(table, *found)
        if spans := table.spans():
            return _spanned(table, spans)
        raise DataError(
            f"{table.source}: this task needs tagged words: CoNLL columns, records with the lists 'tokens' and 'ner_tags', "
            f"or texts with 'spans'; columns: {listed(table.there)}"
        )
    if words and table.column("text", asked.text) is None:
        if wants == "text":
            return table.usable(table.rows, lambda row: (row, of_words(_strings(row, words), where=row.where)))
        raise DataError(
            f"{table.source}: it holds tagged words; this task needs a text and its {wants} a record; "
            "for words say task.name=token_classification"
        )
    return _texts(table, wants)


def choose_columns(table: Table, wants: Wants) -> Columns:
    """The columns asked for, with names for those that `examples_of` found in these rows: the rows that follow have them too."""
    asked = table.asked
    if wants == "words":
        words, tags = _tag_columns(table) or (table.column("text", asked.text), table.spans())
        return replace(asked, text=words, label=tags)
    return replace(asked, text=table.column("text", asked.text), label=asked.label or table.column("label", None))


def _tag_columns(table: Table) -> tuple[str, str] | None:
    """The columns of words and of their tags, where there are such."""
    words, tags = table.column("words", table.asked.text), table.column("tags", table.label)
    return (words, tags) if words and tags and (tags != table.spans() or table.holds_tags(tags)) else None


def never_given(source: str, labels: Sequence[str], examples: Iterable[Example]) -> list[str]:
    """The note of the columns of labels that mark no example."""
    given = {name for example in examples if isinstance(example.label, (tuple, Mapping)) for name in example.label}
    never = [name for name in labels if name not in given]
    return [f"{source}: no record has the label {' or '.join(never)}"] if never else []


def _texts(table: Table, wants: Wants) -> list[tuple[Row, Example]]:
    asked = table.asked
    text = table.said("text", asked.text)
    label = _label_columns(table) if wants != "text" or asked.label else None
    pair = table.said("pair", asked.pair) if asked.pair else None
    if asked.pair is None and (second := table.second(text)):
        table.notes.append(f"{table.source}: column {second!r} is not read; for pairs of texts say data.pair={second}")
    if wants == "labels" and isinstance(label, str) and _is_vectors(table, label, asked.label_separator):
        raise DataError(
            f"{table.source}: column {label!r} holds a 0 or 1 for each label, but not their names; write a column for each, "
            "named as its label, and say data.label=NAME,NAME,..."
        )
    to_label = None if label is None else label_reader(wants, label, asked.label_separator)
    if isinstance(label, str):
        table.notes.extend(_label_notes(table, label, wants))
    if isinstance(label, str) and wants == "label" and asked.header is None and _is_value(table, label):
        raise DataError(
            f"{table.source}: the label column {label!r} is named as one of its labels; {NO_HEADER}; if it is the header, "
            "data.header=true"
        )

    def example(row: Row) -> tuple[Row, Example]:
        return row, Example(
            text=_text(row, text),
            label=None if to_label is None else to_label(row),
            pair=None if pair is None else _text(row, pair),
            where=row.where,
        )

    return table.usable(table.rows, example)


def _label_notes(table: Table, label: str, wants: Wants) -> list[str]:
    """What the cells of a column of labels may mean instead."""
    rows = table.rows[:SAMPLE] if wants == "label" else table.rows
    cells = [cell for row in rows if isinstance(cell := row.values.get(label), str) and cell.strip()]
    if wants == "number" and any(map(has_decimal_comma, cells)):
        if point := next((cell for cell in cells if "." in cell), None):  # 1.000 may be a thousand there
            raise DataError(
                f"{table.source}: column {label!r} holds decimal commas and {point!r}; write all numbers in one way"
            )
        return [f"{table.source}: numbers with a decimal comma in column {label!r}"]
    numbers = [finite_number(cell) for cell in cells]
    if wants == "label" and None not in numbers and any(x % 1 for x in numbers if x is not None):
        return [
            f"{table.source}: column {label!r} holds decimal numbers, each a label of its own; to predict the number say "
            "task.name=sequence_regression"
        ]
    if wants == "labels" and not any(table.asked.label_separator in cell for cell in cells):
        marks = [mark for mark in ";|" if any(mark in cell for cell in cells)]
        return [
            f"{table.source}: column {label!r} holds {mark!r}; if it stands between labels, say data.label_separator={mark}"
            for mark in marks
        ]
    return []


def _is_value(table: Table, label: str) -> bool:
    """Whether a column has its own name as a value, which is not a usual one."""
    return plain_name(label) not in USUAL["label"] and any(row.values.get(label) == label for row in table.rows)


def _label_columns(table: Table) -> str | tuple[str, ...]:
    asked = table.asked.label
    return (
        tuple(table.said("label", name) for name in asked) if isinstance(asked, tuple) else table.said("label", asked)
    )


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} holds {short(value)}, not a text")
    if not value.strip():
        raise DataError(f"{row.where}: column {column!r} is empty")
    if "\0" in value:
        raise DataError(f"{row.where}: column {column!r} holds a NUL character; text has none")
    return value


def _tagged(table: Table, words: str, tags: str) -> list[tuple[Row, Example]]:
    """Sentences of words and tags of any scheme, converted to IOB2."""
    if not table.rows[0].lined:
        table.notes.append(f"{table.source}: words are column {words!r}, tags are column {tags!r}")
    sentences = table.usable(table.rows, lambda row: (row, _strings(row, words), _tags(row, words, tags)))
    table.notes.append(f"{table.source}: {_scheme_note([(row, found) for row, _, found in sentences])}")
    return [(row, of_words(w, to_tags(entities(found), len(w)), row.where)) for row, w, found in sentences]


def _scheme_note(sentences: Sequence[tuple[Row, Sequence[str]]]) -> str:
    kind = scheme(tags for _, tags in sentences)
    odd = [f"{row.word(i)} {tags[i]}" for row, tags in sentences for i in odd_tags(tags, kind)]
    if odd:
        (note,) = counted(f"tags that are not {kind}", odd)
        return f"tag scheme mixed, mostly {kind}, read as conlleval does and converted to IOB2; {note}"
    return f"tag scheme {kind}" + ("" if kind == "IOB2" else ", read as conlleval does and converted to IOB2")


def _strings(row: Row, column: str) -> list[str]:
    value: Any = row.values.get(column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: column {column!r} is not a list of words or tags")
    for i, item in enumerate(value):
        if type(item) is int:
            raise DataError(
                f"{row.where}: column {column!r} holds numbers, whose names are not in the file; write the tags by name, such as "
                "O and B-PER"
            )
        if not isinstance(item, str) or not item:
            what = "is empty" if isinstance(item, str) else f"is {short(item)}, not a text"
            raise DataError(f"{row.where}: word {i + 1} of column {column!r} {what}")
    if any("\0" in item for item in value):
        raise DataError(f"{row.where}: column {column!r} holds a NUL character; text has none")
    return value


def _tags(row: Row, words: str, column: str) -> list[str]:
    tags, n_words = [standard(tag) for tag in _strings(row, column)], len(row.values[words])
    if len(tags) != n_words:
        raise DataError(f"{row.where}: {n_words} words but {len(tags)} tags")
    for i, tag in enumerate(tags):
        if not is_tag(tag):
            raise DataError(
                f"{row.word(i)}: {tag!r} is not a tag; expected O, or B- or I- and a type (E-, S-, L-, U- in IOBES and BILOU)"
                + ("" if "-" in tag else f"; if it is a type, write I-{short(tag)[1:-1]}")
            )
    return tags


def _spanned(table: Table, column: str) -> list[tuple[Row, Example]]:
    """Texts with spans, cut into words that carry them exactly."""
    text = table.said("text", table.asked.text)
    if table.asked.label is None:
        table.notes.append(f"{table.source}: spans are column {column!r}")
    rows = table.usable(
        table.rows,
        lambda row: (row, Marked(_text(row, text), spans_of(row.values.get(column), row.place), row.place)),
    )
    resolved, notes = settle([record for _, record in rows], table.asked.overlaps, table.source)
    table.notes.extend(notes)

    def example(found: tuple[tuple[Row, Marked], list[Span] | DataError]) -> tuple[Row, Example]:
        (row, record), spans = found
        if isinstance(spans, DataError):
            raise spans
        return row, of_spans(record.text, spans, row.values.get(TOKENS), row.where)

    return table.usable(zip(rows, resolved, strict=True), example)


DECIMAL_COMMA = re.compile(r"[+-]?(\d+,(\d{1,2}|\d{4,})|0,\d+)")  # 1,234 may be a thousand
SHARES_OFF = 1e-3  # how far from 1 the sum of the shares of a soft label may be


def label_reader(wants: Wants, columns: str | Sequence[str], separator: str = ",") -> Callable[[Row], Label]:
    """What makes of each row the label that a task wants, from one column or from several.

    Raises:
        ConfigError: the task wants what several columns cannot hold.
    """
    if isinstance(columns, str):
        column = columns  # for the closures: it stays a str
        if wants == "labels":
            return lambda row: several_labels(row, column, separator)
        return (lambda row: number(row, column)) if wants == "number" else (lambda row: one_label(row, column))
    if wants == "labels":
        return lambda row: marked_labels(row, columns)
    if wants == "label":
        return lambda row: shares(row, {name: row.values.get(name) for name in columns})
    raise ConfigError(f"data.label names {len(columns)} columns ({', '.join(columns)}); this task wants one {wants}")


def one_label(row: Row, column: str) -> str | Mapping[str, float]:
    """A text or a whole number, as text; a mapping of names to shares is a soft label."""
    value = row.values.get(column)
    if isinstance(value, dict):
        return shares(row, value)
    if isinstance(value, str) and QUOTED_LIST.fullmatch(value.strip()):
        value = written_list(value.strip(), ",")
    if isinstance(value, list) and len(value) == 1:  # annotation tools list the one choice too
        value = value[0]
    if isinstance(value, list) and len(value) > 1 and all(map(_name, value)):
        raise DataError(
            f"{row.where}: column {column!r} holds {len(value)} labels, {short(value)}, where one is wanted; for several say "
            "task.name=multi_label_classification"
        )
    if (name := _name(value)) is None:
        number = "; for numbers say task.name=sequence_regression" if isinstance(value, float) else ""
        raise DataError(
            f"{row.where}: column {column!r} holds {short(value)}, not a label (a text, a whole number, true or false){number}"
        )
    return name


def shares(row: Row, values: Mapping[str, Any]) -> dict[str, float]:
    """A soft label: shares of at least 0 that sum to 1 within 1e-3; what is missing to 1 is made up for."""
    found = {name: finite_number(value) for name, value in values.items()}
    for name, share in found.items():
        if share is None or share < 0:
            raise DataError(f"{row.where}: label {name!r} has {values[name]!r}, not a share from 0 to 1")
    given = {name: share for name, share in found.items() if share is not None}
    total = sum(given.values())
    if abs(total - 1) > SHARES_OFF:
        several = "; for several labels say task.name=multi_label_classification" if {*given.values()} <= {0, 1} else ""
        raise DataError(f"{row.where}: the shares of the labels {listed([*given])} sum to {total:g}, not to 1{several}")
    return {name: share / total for name, share in given.items()}


def several_labels(row: Row, column: str, separator: str) -> tuple[str, ...]:
    """The names in a list, or in a cell that is cut at the separator; an empty one holds none."""
    value = row.values.get(column)
    if isinstance(value, dict) and all(finite_number(mark, flags=True) in (0, 1) for mark in value.values()):
        value = [name for name, mark in value.items() if finite_number(mark, flags=True)]
    items = _items(value, separator)
    names = [None] if items is None else [_name(item) for item in items]
    found = tuple(name for name in names if name is not None)
    if len(found) < len(names):
        raise DataError(
            f"{row.where}: column {column!r} holds {short(row.values.get(column))}, not labels "
            f"(a list of names, names between which {separator!r} stands, or 0 or 1 under each name; empty for none)"
        )
    for i, name in enumerate(found):
        if name in found[:i]:
            raise DataError(f"{row.where}: label {name!r} stands twice in column {column!r}")
    return found


def _items(value: Any, separator: str) -> list[Any] | None:
    """The items of a list, of one that pandas wrote into a cell, or of a cell that is cut at the separator."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else None
    cell = value.strip()
    return (
        written_list(cell, separator)
        if cell[:1] == "[" and cell[-1:] == "]"
        else value.split(separator)
        if cell
        else []
    )


def _is_vectors(table: Table, column: str, separator: str) -> bool:
    """Whether a column of several labels holds 0 and 1 for labels whose names are not in it."""
    cells = [_items(row.values.get(column), separator) for row in table.rows[:SAMPLE]]
    flags = [[finite_number(item, flags=True) for item in cell] for cell in cells if cell]
    return (
        len(flags) > 1
        and len(set(map(len, flags))) == 1 < len(flags[0])
        and {x for f in flags for x in f} <= {0.0, 1.0}
    )


def marked_labels(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The names of those columns that hold a 1; the others must hold a 0."""
    marks = {column: finite_number(row.values.get(column), flags=True) for column in columns}
    for column, mark in marks.items():
        if mark not in (0, 1):
            raise DataError(f"{row.where}: column {column!r} holds {short(row.values.get(column))}, not 0 or 1")
    return tuple(column for column, mark in marks.items() if mark)


def has_decimal_comma(cell: Any) -> bool:
    """Whether a cell is a number that is written with a comma, and that means nothing else."""
    return isinstance(cell, str) and bool(DECIMAL_COMMA.fullmatch(cell.strip()))


def number(row: Row, column: str) -> float:
    """A finite number."""
    cell = row.values.get(column)
    value = finite_number(str(cell).replace(",", ".") if has_decimal_comma(cell) else cell)
    if value is None:
        hint = "; a comma before three digits may stand for either" if isinstance(cell, str) and "," in cell else ""
        raise DataError(f"{row.where}: column {column!r} holds {short(cell)}, not a finite number{hint}")
    return value


def _name(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():  # as pandas writes whole numbers of a column with gaps
        value = int(value)
    return str(value).strip() or None if isinstance(value, (str, int)) else None


def finite_number(value: Any, *, flags: bool = False) -> float | None:
    """The finite number that a cell holds, or None; true and false are 1 and 0 where the cell is a flag."""
    if isinstance(value, bool):
        return float(value) if flags else None
    if flags and isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    if isinstance(value, str) and "_" in value:  # Python's float reads 1_0 as 10
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):  # no number; an integer of hundreds of digits
        return None
    return found if math.isfinite(found) else None
