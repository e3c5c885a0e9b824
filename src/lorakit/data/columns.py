"""Rows to examples: which column plays which role, and every value checked. Columns that are guessed are named in a note."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from lorakit.data.choices import CONTEXTS, MEANING, choices_of, reading_of, right_choice
from lorakit.data.delimited import MOST_COLUMNS, NO_HEADER, QUOTED_LIST, Row, plain_name, written_list
from lorakit.data.example import Columns, Example, Label, Wants, of_spans, of_words
from lorakit.data.spans import Marked, Span, is_spans, settle, spans_of
from lorakit.data.tags import entities, is_tag, odd_tags, scheme, standard, to_tags
from lorakit.data.text import MOST_NAMES, bad_records, counted, in_order, listed
from lorakit.errors import ConfigError, DataError, did_you_mean, short

S = TypeVar("S")
T = TypeVar("T")
USUAL = {  # names of columns by role, as `plain_name` writes them
    "text": (
        *("text", "sentence", "review", "sentence1", "content", "question", "premise", "message", "title", "data"),
        *("comment", "body", "tweet", "text1", "text_a", "sentence_a", "question1", "query", "utterance", "document"),
        *("post", "description", "headline", "abstract", "review_text", "review_body", "comment_text", "anchor"),
    ),
    "label": (
        *("label", "labels", "category", "class", "sentiment", "target", "intent", "rating", "stars", "score"),
        *("topic", "emotion", "gold_label", "gold", "is_duplicate", "cats"),
    ),
    "target": (
        *("target", "summary", "highlights", "translation", "answer", "output", "response", "completion"),
        *("target_text", "reference", "paraphrase", "simplified", "label"),
    ),
    "question": (
        *("question", "question_stem", "stem", "premise", "ctx", "goal", "sent1", "sentence", "prompt", "context"),
        *("article", "passage", "text"),
    ),
    "answer": (
        *("label", "answer", "answerkey", "answer_key", "answer_idx", "answer_index", "correct", "correct_answer"),
        *("gold", "gold_label", "cop", "target"),
    ),
    "words": ("tokens", "words"),
    "tags": ("ner_tags", "tags", "labels", "ner", "ner_tag"),
    "spans": ("spans", "entities", "label", "labels", "annotations"),
}
# The recipe's keys for roles that have none of their own name.
KEYS = {"words": "text", "question": "text", "tags": "label", "target": "label", "answer": "label"}
PAIRS = {  # names of first texts and of the second ones that go with them
    "text": ("text_pair", "pair", "text2", "text_b", "second_text"),
    "text1": ("text2",),
    "text_a": ("text_b",),
    "sentence1": ("sentence2",),
    "sentence_a": ("sentence_b",),
    "premise": ("hypothesis",),
    "question": ("answer", "question2", "sentence"),
    "question1": ("question2",),
    "query": ("passage", "document", "positive", "pos"),
    "anchor": ("positive", "pos"),
}
SECOND = {name for seconds in PAIRS.values() for name in seconds} - {"document", "passage", "sentence"}
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?(_?\d+)?")  # names of columns of negatives
TOKENS = "token_offsets"  # where readers of tokenised texts put the (start, end) of each token
SAMPLE = 100  # rows that are looked at where values choose a column; the same ones, however the rows are read


@dataclass(frozen=True)
class Table:
    """The rows of one source, and how the recipe says they are read; what is found out about them goes into the notes."""

    source: str
    rows: Sequence[Row]
    options: Columns
    notes: list[str]
    bad: list[DataError] | None = None  # what is wrong with rows that are left out; None: the first one is raised

    def usable(self, items: Iterable[S], make: Callable[[S], T]) -> list[T]:
        """What is made of each item; one of which nothing can be made is left out where the bad ones are collected."""
        if self.bad is None:
            return [make(item) for item in items]
        made = []
        for item in items:
            try:
                made.append(make(item))
            except DataError as err:
                self.bad.append(err)
        return made

    @cached_property
    def names(self) -> list[str]:
        """The names of all columns; a record of JSON may lack some."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.values))
        if len(names) > MOST_COLUMNS:
            raise DataError(f"{self.source}: {len(names):,} columns; a table can have at most {MOST_COLUMNS:,}")
        return names

    def column(self, role: str, name: str | None) -> str | None:
        """The column that plays a role: the one of this name, or without a name the first usual one."""
        if name is not None:
            if name not in self.names:
                raise DataError(
                    f"{self.source}: data.{KEYS.get(role, role)} = {name!r} is not a column; {did_you_mean(name, self.names)}"
                )
            return name
        names = self.usual(role)
        if role == "label":  # records may carry spans beside a label
            names.sort(key=self.holds_spans)
        if role == "text":  # max takes the first of several; the longest may be the second text of a pair
            longest = max(names, key=self.length, default=None)
            return next((name for name in names if self.second(name) == longest), longest)
        return next(iter(names), None)

    def required(self, role: str, name: str | None) -> str:
        """The same, with a note where the name is guessed. Raises a DataError where there is no such column."""
        column = self.column(role, name)
        if column is None:
            looks_like_values = self.options.header is None and any(
                finite_number(name) is not None
                or name.count(" ") > 3
                or any(row.values.get(name) == name for row in self.rows[:SAMPLE])
                for name in self.names[:MOST_NAMES]
            )
            raise DataError(
                f"{self.source}: which column is the {role}? Set data.{KEYS.get(role, role)}=NAME; "
                f"columns: {listed(self.names)}" + (f"; {NO_HEADER}" if looks_like_values else self.likely(role))
            )
        if name is None:
            rivals = self.usual(role) if role == "text" else []
            others = [name for name in rivals if name not in (column, self.second(column)) and self.length(name) > 0]
            longest = f", the longest of {', '.join(map(repr, (column, *others)))}" if others else ""
            self.notes.append(f"{self.source}: {role} is column {column!r}{longest}")
        return column

    def likely(self, role: str) -> str:
        """For a message, the columns that look like texts (of three words on average) or like labels (four times each)."""
        likely = []
        for name in self.names[:MOST_NAMES]:
            values = [value for row in self.rows[:SAMPLE] if isinstance(value := row.values.get(name), str) and value]
            is_text = sum(map(len, map(str.split, values))) >= 3 * len(values) > 0
            is_label = not is_text and 1 < len({value.strip().casefold() for value in values}) <= len(values) / 4
            if (role == "text" and is_text) or (role == "label" and is_label):
                likely.append(f"data.{role}={name}")
        return f"; probably {' or '.join(likely)}" if likely else ""

    def usual(self, role: str) -> list[str]:
        """The columns whose names are usual for a role, in the order of these names, whatever their case."""
        plain: dict[str, list[str]] = {}
        for name in self.names:
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
        plain = {plain_name(name): name for name in self.names}
        return next((plain[name] for name in PAIRS.get(plain_name(text), ()) if name in plain), None)

    @property
    def label(self) -> str | None:
        """The one column that data.label names, where words are wanted or looked for."""
        label = self.options.label
        if isinstance(label, tuple):
            raise DataError(f"{self.source}: data.label names several columns, but tags and spans are in one")
        return label

    def holds_spans(self, column: str) -> bool:
        """Whether a column has a filled list of spans somewhere."""
        return any(is_spans(row.values.get(column)) for row in self.rows)

    def spans(self) -> str | None:
        """The column of spans: the one that data.label names, or the first of the usual names that holds some."""
        label = self.label
        names = self.usual("spans") if label is None else [label]
        empty = next((name for name in names if name == label or plain_name(name) in ("spans", "entities")), None)
        column = next(filter(self.holds_spans, names), empty)
        if column is None and not self.usual("label"):  # annotation tools name it as their users do
            return next(filter(self.holds_spans, self.names), None)
        return column

    def words_and_tags(self) -> tuple[str, str] | None:
        """The columns of words and of their tags, where there are such."""
        words, tags = self.column("words", self.options.text), self.column("tags", self.label)
        if not words or not tags:
            return None
        if tags == self.spans():  # a name that is usual for both
            lists = (value for row in self.rows if isinstance(value := row.values.get(tags), list))
            if not any(value and all(isinstance(name, str) for name in value) for value in lists):
                return None
        return words, tags


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
        examples = _examples(table, wants)
    except DataError as err:
        if table.bad and table.options.on_bad == "stop":  # of damaged lines columns may be lacking
            raise bad_records(table.source, in_order(table.bad)) from err
        raise
    if table.options.group is None:
        return [example for _, example in examples]
    column = table.required("group", table.options.group)

    def with_group(row_and_example: tuple[Row, Example]) -> Example:
        row, example = row_and_example
        value = row.values.get(column)
        if value is None or isinstance(value, (dict, list)) or not str(value).strip():
            raise DataError(f"{row.where}: column {column!r} holds {value!r}, not the name of a group")
        return replace(example, group=str(value))

    return table.usable(examples, with_group)


def _examples(table: Table, wants: Wants) -> list[tuple[Row, Example]]:
    if table.rows[0].lined:  # columns without names
        table = replace(table, options=Columns())
    if wants == "words":
        if columns := table.words_and_tags():
            return _tagged(table, *columns)
        if spans := table.spans():
            return _spanned(table, spans)
        raise DataError(
            f"{table.source}: this task needs tagged words: CoNLL columns, records with the lists 'tokens' and "
            f"'ner_tags', or texts with 'spans'; columns: {listed(table.names)}"
        )
    words = table.column("words", None)
    if words and table.column("text", table.options.text) is None:
        if wants == "text":
            return table.usable(table.rows, lambda row: (row, of_words(_strings(row, words), where=row.where)))
        raise DataError(
            f"{table.source}: it contains tagged words, but this task needs a text and its {wants} in each record; "
            "for words, set task.name=token_classification"
        )
    return _texts(table, wants)


def choose_columns(table: Table, wants: Wants) -> Columns:
    """The options with names for those columns that `examples_of` found in these rows: the rows that follow have
    them too."""
    options = table.options
    if wants == "words":
        words, tags = table.words_and_tags() or (table.column("text", options.text), table.spans())
        return replace(options, text=words, label=tags)
    if options.choices is not None:
        text, pair = question_columns(table)
        label, answers = table.label if wants == "text" else table.column("answer", table.label), options.answers
        if label and not answers:
            answers = reading_of(table.source, label, table.rows[:SAMPLE], options.choices)
        return replace(options, text=text, pair=pair, label=label, answers=answers)
    options = replace(options, text=table.column("text", options.text))
    if wants == "related":
        return replace(options, label=related_label(table), negative=negative_columns(table))
    return replace(options, label=options.label or table.column("target" if wants == "target" else "label", None))


def related_label(table: Table) -> str | None:
    """Of related texts the column of their classes, of how alike two are, or of a teacher's scores; None of pairs without."""
    options, source = table.options, table.source
    if isinstance(options.label, tuple):
        raise DataError(f"{source}: data.label names several columns, but classes and scores are in one")
    label = table.column("label", options.label)
    if options.pair is None:
        if label is None:
            raise DataError(
                f"{source}: which texts belong together? Set the column of second texts (data.pair=NAME) or of "
                f"classes (data.label=NAME); columns: {listed(table.names)}"
            )
        return label
    if options.label is None and label is not None:
        values = (row.values.get(label) for row in table.rows[:SAMPLE])
        is_score = (finite_number(value) is not None or _listed_numbers(value) for value in values)
        if label in negative_columns(table) or not all(is_score):
            return None  # something else about the pairs
    return label


def negative_columns(table: Table) -> tuple[str, ...]:
    """The columns that data.negative names, or those of pairs with a usual name."""
    named = table.options.negative
    if named is None:
        is_pair = table.options.pair is not None
        return tuple(name for name in table.names if is_pair and NEGATIVE.fullmatch(plain_name(name)))
    if table.options.pair is None:
        raise DataError(f"{table.source}: data.negative needs pairs; set the second text, data.pair")
    names = (named,) if isinstance(named, str) else named
    for name in names:
        table.column("negative", name)
    return names


def question_columns(table: Table) -> tuple[str | None, str | None]:
    """The column of questions; or that of texts they are about, and theirs, which stand before each choice."""
    options = table.options
    plain = {plain_name(name): name for name in table.names}
    for text, question in CONTEXTS.items():
        if {text, question} <= plain.keys() and options.text is None and options.pair is None:
            return plain[text], plain[question]
    return table.column("question", options.text), options.pair and table.required("pair", options.pair)


def _questions(table: Table, wants: Wants) -> list[tuple[Row, Example]]:
    """Questions with choices, where they are labelled with the letter of the right one."""
    options, columns = table.options, table.options.choices
    if columns is None:
        raise DataError(
            f"{table.source}: which columns are the choices? Set data.choices=NAME of a column of lists, or NAME,NAME,... of "
            f"one choice each; columns: {listed(table.names)}"
        )
    for name in (columns,) if isinstance(columns, str) else columns:
        table.column("choices", name)
    text, pair = question_columns(table)
    text = table.required("question", options.text) if text is None or pair is None else text
    if pair and not options.pair:
        table.notes.append(f"{table.source}: text is column {text!r}; column {pair!r} stands before each choice")
    label, how = None, options.answers
    if table.label or wants != "text":
        label = table.required("answer", table.label)
        how = how or reading_of(table.source, label, table.rows[:SAMPLE], columns)
        table.notes.append(f"{table.source}: an answer is {MEANING[how]}")

    def example(row: Row) -> tuple[Row, Example]:
        choices = choices_of(row, columns)
        begun = "" if pair is None else f"{_text(row, pair).strip()} "
        return row, Example(
            text=_text(row, text),
            label=right_choice(row, label, choices, how) if label and how else None,
            where=row.where,
            choices=tuple(begun + each for each in choices.texts),
        )

    return table.usable(table.rows, example)


def never_given(source: str, labels: Sequence[str], examples: Iterable[Example]) -> list[str]:
    """The note of the columns of labels that mark no example."""
    given = {name for example in examples if isinstance(example.label, (tuple, Mapping)) for name in example.label}
    never = [name for name in labels if name not in given]
    return [f"{source}: no record has the label {' or '.join(never)}"] if never else []


def _texts(table: Table, wants: Wants) -> list[tuple[Row, Example]]:
    options = table.options
    if wants == "choices" or options.choices is not None:
        return _questions(table, wants)
    text = table.required("text", options.text)
    label: str | tuple[str, ...] | None = None
    if wants == "related":
        label = related_label(table)
        if label and not options.label:
            table.notes.append(f"{table.source}: {'scores' if options.pair else 'classes'} are column {label!r}")
    elif isinstance(options.label, tuple):
        label = tuple(table.required("label", name) for name in options.label)
    elif options.label or wants != "text":
        label = table.required("target" if wants == "target" else "label", options.label)
    pair = table.required("pair", options.pair) if options.pair else None
    negatives = negative_columns(table) if wants == "related" else ()
    if negatives and not options.negative:
        table.notes.append(f"{table.source}: negatives are column {', '.join(map(repr, negatives))}")
    if wants == "related":
        wants = "number" if pair else "label"
    if options.pair is None and (second := table.second(text)) and second != label:
        table.notes.append(f"{table.source}: column {second!r} is not used; for pairs of texts set data.pair={second}")
    if isinstance(label, str):
        _check_labels(table, label, wants)
    target = label if wants == "target" and isinstance(label, str) else None
    to_label = None if label is None or target else label_reader(wants, label, options.label_separator)

    def example(row: Row) -> tuple[Row, Example]:
        texts = tuple(text for name in negatives for text in _texts_in(row, name))
        teacher = _teacher_scores(row, label, 1 + len(texts)) if pair and isinstance(label, str) else ()
        return row, Example(
            text=_text(row, text),
            label=None if to_label is None or teacher else to_label(row),
            target=None if target is None else _text(row, target),
            pair=None if pair is None else _text(row, pair),
            where=row.where,
            negatives=texts,
            teacher=teacher,
        )

    return table.usable(table.rows, example)


def _check_labels(table: Table, column: str, wants: Wants) -> None:
    """Refuse a column of labels that means something else, or add a note of what it may mean instead."""
    source, separator = table.source, table.options.label_separator
    rows = table.rows[:SAMPLE] if wants == "label" else table.rows
    cells = [cell for row in rows if isinstance(cell := row.values.get(column), str) and cell.strip()]
    if wants == "number" and any(map(has_decimal_comma, cells)):
        if point := next((cell for cell in cells if "." in cell), None):  # 1.000 may be a thousand there
            raise DataError(
                f"{source}: column {column!r} mixes decimal commas and {point!r}; write all numbers the same way"
            )
        table.notes.append(f"{source}: numbers with a decimal comma in column {column!r}")
    if wants == "labels":
        lists = [_items(row.values.get(column), separator) for row in table.rows[:SAMPLE]]
        flags = [[finite_number(item, flags=True) for item in items] for items in lists if items]
        is_vectors = len(flags) > 1 and len(set(map(len, flags))) == 1 < len(flags[0])
        if is_vectors and {x for f in flags for x in f} <= {0.0, 1.0}:
            raise DataError(
                f"{source}: column {column!r} has a 0 or 1 for each label, but not their names; write one column for "
                "each label, with its name, and set data.label=NAME,NAME,..."
            )
        marks = [mark for mark in ";|" if any(mark in cell for cell in cells)]
        if not any(separator in cell for cell in cells):
            table.notes.extend(
                f"{source}: column {column!r} holds {mark!r}; if it separates labels, set data.label_separator={mark}"
                for mark in marks
            )
    if wants == "label":
        numbers = [finite_number(cell) for cell in cells]
        if None not in numbers and any(x % 1 for x in numbers if x is not None):
            table.notes.append(
                f"{source}: column {column!r} has decimal numbers, and each becomes a label; to predict the number, set "
                "task.name=sequence_regression"
            )
        is_usual = table.options.header is not None or plain_name(column) in USUAL["label"]
        if not is_usual and any(row.values.get(column) == column for row in table.rows):
            raise DataError(
                f"{source}: the label column {column!r} has the same name as one of its labels; {NO_HEADER}; if it "
                "is the header, set data.header=true"
            )


def _texts_in(row: Row, column: str) -> list[str]:
    """The text of a cell, or those of its list; none of an empty one."""
    value = row.values.get(column)
    items = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    return [_text(Row({column: item}, row.where), column) for item in items]


def _listed_numbers(value: Any) -> list[float]:
    """The numbers of a list, also of one that stands in a cell as text; none of anything else."""
    items = written_list(value.strip(), ",") if isinstance(value, str) and value.strip()[:1] == "[" else value
    numbers = [finite_number(item) for item in items] if isinstance(items, list) else []
    return [number for number in numbers if number is not None] if None not in numbers else []


def _teacher_scores(row: Row, column: str, texts: int) -> tuple[float, ...]:
    """A score for each of the texts that are compared with the first one, or () where the cell is not a list."""
    scores = _listed_numbers(row.values.get(column))
    if scores and len(scores) != texts:
        raise DataError(
            f"{row.where}: column {column!r} holds {len(scores)} scores; there are {texts} texts to score, the second one and "
            f"{texts - 1} negatives"
        )
    return tuple(scores)


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} holds {short(value)}, not a text")
    if not value.strip():
        raise DataError(f"{row.where}: column {column!r} is empty")
    if "\0" in value:
        raise DataError(f"{row.where}: column {column!r} contains a NUL character, which text cannot have")
    return value


def _tagged(table: Table, words: str, column: str) -> list[tuple[Row, Example]]:
    """Sentences of words and tags of any scheme, converted to IOB2."""

    def sentence(row: Row) -> tuple[Row, list[str], list[str]]:
        own, tags = _strings(row, words), [standard(tag) for tag in _strings(row, column)]
        if len(tags) != len(own):
            raise DataError(f"{row.where}: {len(own)} words but {len(tags)} tags")
        for i, tag in enumerate(tags):
            if not is_tag(tag):
                raise DataError(
                    f"{row.word(i)}: {tag!r} is not a tag; expected O, or B- or I- and a type (E-, S-, L-, U- in "
                    "IOBES and BILOU)" + ("" if "-" in tag else f"; if it is a type, write I-{short(tag)[1:-1]}")
                )
        return row, own, tags

    if not table.rows[0].lined:
        table.notes.append(f"{table.source}: words are column {words!r}, tags are column {column!r}")
    sentences = table.usable(table.rows, sentence)
    kind = scheme(tags for _, _, tags in sentences)
    note = f"{table.source}: tag scheme {kind}"
    if odd := [f"{row.word(i)} {tags[i]}" for row, _, tags in sentences for i in odd_tags(tags, kind)]:
        (places,) = counted(f"tags that are not {kind}", odd)
        note = (
            f"{table.source}: tag scheme mixed, mostly {kind}, read as conlleval does and converted to IOB2; {places}"
        )
    elif kind != "IOB2":
        note += ", read as conlleval does and converted to IOB2"
    table.notes.append(note)
    return [(row, of_words(own, to_tags(entities(tags), len(own)), row.where)) for row, own, tags in sentences]


def _strings(row: Row, column: str) -> list[str]:
    value: Any = row.values.get(column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: column {column!r} is not a list of words or tags")
    for i, item in enumerate(value):
        if type(item) is int:
            raise DataError(
                f"{row.where}: column {column!r} has numbers whose names are not in the file; write the tags by "
                "name, such as O and B-PER"
            )
        if not isinstance(item, str) or not item:
            what = "is empty" if isinstance(item, str) else f"is {short(item)}, not a text"
            raise DataError(f"{row.where}: word {i + 1} of column {column!r} {what}")
    if any("\0" in item for item in value):
        raise DataError(f"{row.where}: column {column!r} contains a NUL character, which text cannot have")
    return value


def _spanned(table: Table, column: str) -> list[tuple[Row, Example]]:
    """Texts with spans, cut into words that carry them exactly."""
    text = table.required("text", table.options.text)
    if table.options.label is None:
        table.notes.append(f"{table.source}: spans are column {column!r}")
    rows = table.usable(
        table.rows,
        lambda row: (row, Marked(_text(row, text), spans_of(row.values.get(column), row.place), row.place)),
    )
    resolved, notes = settle([record for _, record in rows], table.options.overlaps, table.source)
    table.notes.extend(notes)

    def example(row_and_spans: tuple[tuple[Row, Marked], list[Span] | DataError]) -> tuple[Row, Example]:
        (row, record), spans = row_and_spans
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
    raise ConfigError(f"data.label names {len(columns)} columns ({', '.join(columns)}); this task needs one {wants}")


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
            f"{row.where}: column {column!r} holds {len(value)} labels, {short(value)}, but this task needs one; for "
            "several, set task.name=multi_label_classification"
        )
    if (name := _name(value)) is None:
        if isinstance(value, str) and not value.strip():
            raise DataError(f"{row.where}: column {column!r} is empty")
        number = "; for numbers, set task.name=sequence_regression" if isinstance(value, float) else ""
        raise DataError(
            f"{row.where}: column {column!r} holds {short(value)}, not a label (a text, a whole number, true or "
            f"false){number}"
        )
    return name


def shares(row: Row, values: Mapping[str, Any]) -> dict[str, float]:
    """A soft label: shares of at least 0 that sum to 1 within 1e-3; what is missing to 1 is made up for."""
    given: dict[str, float] = {}
    for name, value in values.items():
        share = finite_number(value)
        if share is None or share < 0:
            raise DataError(f"{row.where}: label {name!r} has {value!r}, not a share from 0 to 1")
        given[name] = share
    total = sum(given.values())
    if abs(total - 1) > SHARES_OFF:
        several = (
            "; for several labels, set task.name=multi_label_classification" if {*given.values()} <= {0, 1} else ""
        )
        raise DataError(f"{row.where}: the shares of the labels {listed([*given])} sum to {total:g}, not to 1{several}")
    return {name: share / total for name, share in given.items()}


def several_labels(row: Row, column: str, separator: str) -> tuple[str, ...]:
    """The names in a list, or in a cell that is cut at the separator; an empty one holds none."""
    value = row.values.get(column)
    if isinstance(value, dict) and all(finite_number(mark, flags=True) in (0, 1) for mark in value.values()):
        value = [name for name, mark in value.items() if finite_number(mark, flags=True)]
    items = _items(value, separator)
    names = [_name(item) for item in items or ()]
    labels = tuple(name for name in names if name is not None)
    if items is None or len(labels) < len(names):
        raise DataError(
            f"{row.where}: column {column!r} holds {short(row.values.get(column))}, not labels "
            f"(a list of names, names between which {separator!r} stands, or 0 or 1 under each name; empty for none)"
        )
    for i, name in enumerate(labels):
        if name in labels[:i]:
            raise DataError(f"{row.where}: label {name!r} appears twice in column {column!r}")
    return labels


def _items(value: Any, separator: str) -> list[Any] | None:
    """The items of a list, of one that pandas wrote into a cell, or of a cell that is cut at the separator."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else None
    cell = value.strip()
    if cell[:1] == "[" and cell[-1:] == "]":
        return written_list(cell, separator)
    return value.split(separator) if cell else []


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
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # not a number; an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None
