"""Tables (CSV, TSV), labelled lines and CoNLL columns: rows as dicts, each with its place."""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorakit.data.example import Columns
from lorakit.data.tags import OUTSIDE, is_tag, standard
from lorakit.data.text import LONGEST, check_unpacked, listed, opened, stream_lines
from lorakit.errors import DataError, first_line

MOST_COLUMNS = 10_000
NO_HEADER = "if the first line is a record, set data.header=false; the columns are then called 1, 2, ..."


class Row(NamedTuple):
    """One record: its values by column, and file:line."""

    values: Mapping[str, Any]
    where: str
    lined: bool = False  # each word has a line of its own, from this one on

    @property
    def place(self) -> str:
        """Where it stands, with its id where it has one."""
        return f"{self.where} (id {self.values['id']})" if "id" in self.values else self.where

    def word(self, i: int) -> str:
        """The place of the record's i-th word."""
        if not self.lined:
            return f"{self.where}, word {i + 1}"
        file, _, line = self.where.rpartition(":")
        return f"{file}:{int(line) + i}"


def sound(rows: Iterable[Row | DataError]) -> Iterator[Row]:
    """The rows, up to the first thing that is wrong, which is raised."""
    with closing(rows) if isinstance(rows, Generator) else nullcontext():
        for row in rows:
            if isinstance(row, DataError):
                raise row
            yield row


DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
HEAD = 50  # lines in which the first record is looked for
TRIED = 10_000  # records that are cut at each delimiter where the first one can be cut at several


class Dialect(NamedTuple):
    """How a table is written: what stands between fields, whether a field may be quoted, and lines above the header."""

    delimiter: str
    quoted: bool = True
    above: int = 0  # Excel's line `sep=;`


def csv_rows(
    path: Path, options: Columns = Columns(), notes: list[str] | None = None, *, kind: str = "csv", by_name: bool = True
) -> Generator[Row | DataError]:
    """Rows of a table whose values are all strings, and in place of a record what is wrong with it.

    The delimiter is `options.delimiter`, or told from the first record; `kind` is csv (quoted fields as in RFC 4180) or tsv,
    where the format is not named (`by_name`) it is told from all fields whether some are quoted. What is not as the file's
    name says goes into `notes`. Without a header the columns are 1, 2, ....

    Raises:
        DataError: the file cannot be decoded, the header is wrong, or the first record can be cut in several ways.
    """
    dialect, dialect_notes = _dialect(path, options, kind, by_name)
    names: list[str] = []
    for where, fields in _records(dialect, path, stream_lines(path, options.encoding)):
        if not names:
            if notes is not None:
                notes += dialect_notes
            if options.header is False and not isinstance(fields, DataError):
                names = [str(number) for number in range(1, len(fields) + 1)]
            else:
                names = _header(fields, where)
                continue
        if isinstance(fields, DataError):
            yield fields
        elif len(fields) != len(names):
            hint = "; remove the lines above the header, or set data.delimiter" if len(names) == 1 else ""
            yield DataError(f"{where}: {len(fields)} columns, the header has {len(names)}: {listed(names)}{hint}")
        else:
            yield Row(dict(zip(names, fields, strict=True)), where)


def _dialect(path: Path, options: Columns, kind: str, by_name: bool) -> tuple[Dialect, list[str]]:
    """How a table is written, and the notes on it. A function of the file alone, whoever reads it."""
    usual = "\t" if kind == "tsv" else ","
    head = list(islice(stream_lines(path, options.encoding), HEAD))
    above, delimiter = 0, options.delimiter
    if match := re.fullmatch(r'"?sep=(.)"?\s*', head[0]):
        above, delimiter = 1, delimiter or match[1]
    if delimiter is None and (by_name or kind == "csv"):
        delimiter = _delimiter(path, options, usual, head)
    dialect = Dialect(delimiter or usual, above=above)
    notes = [] if dialect.delimiter == usual else [f"{path}: fields are separated by {_shown(dialect.delimiter)}"]
    if kind == "tsv" and not by_name:
        return dialect._replace(quoted=False), notes
    if dialect.delimiter == "\t" and by_name:
        quoted, more = _quotes(path, options, dialect)
        return dialect._replace(quoted=quoted), notes + more
    return dialect, notes


def _delimiter(path: Path, options: Columns, usual: str, head: Sequence[str]) -> str:
    """The one delimiter at which the first record can be cut, or the one of several at which all records can."""
    ways = {d: [Dialect(d), *([Dialect(d, quoted=False)] if d == "\t" else [])] for d in DELIMITERS}
    counts: dict[str, int] = {}  # of the fields of the first record
    for delimiter, dialects in ways.items():
        records = [next(_records(dialect, path, head), ("", list[str]()))[1] for dialect in dialects]
        counts[delimiter] = max(0 if isinstance(fields, DataError) else len(fields) for fields in records)
    if (columns := max(counts.values())) > MOST_COLUMNS:
        raise DataError(f"{path}:1: {columns:,} columns; a table can have at most {MOST_COLUMNS:,}")
    able = [delimiter for delimiter in DELIMITERS if counts[delimiter] > 1]
    if len(able) < 2:
        return able[0] if able else usual
    good = [d for d in able if any((_shape(way, path, options, TRIED) or (0, 0))[1] > 1 for way in ways[d])]
    if len(good) > 1:
        each = " or ".join(f"{_shown(d)} ({counts[d]} columns)" for d in good)
        raise DataError(f"{path}: the fields could be separated by {each}; set data.delimiter")
    return good[0] if good else usual if usual in able else max(able, key=counts.__getitem__)


def _shown(delimiter: str) -> str:
    return f"{DELIMITERS[delimiter]} ({delimiter!r})" if delimiter in DELIMITERS else repr(delimiter)


def _quotes(path: Path, options: Columns, dialect: Dialect) -> tuple[bool, list[str]]:
    """Whether fields between tabs are quoted, as spreadsheets and pandas write them, or a quote is text; a note where it matters.

    Who quotes fields, quotes all of them, all of a column, or those alone that hold a quote, a tab or a line end.
    """
    with opened(path) as file:  # most files are decided by their bytes
        if not any(b'"' in block for block in iter(partial(file.read, 2**20), b"")):
            return False, []
    if not any(line[0] == '"' or '\t"' in line for line in stream_lines(path, options.encoding)):
        return False, []
    raw = dialect._replace(quoted=False)
    if (shape := _shape(dialect, path, options)) is None:
        return False, []
    notes = [f"{path}: fields are in quotes, which are removed; data.format=tsv keeps them"]
    if (raw_shape := _shape(raw, path, options)) is None:
        return True, notes  # a quoted field holds a tab or a line end
    if raw_shape != shape:
        ways = " or, if they are text, ".join(f"{n:,} lines of {columns} columns" for n, columns in (shape, raw_shape))
        raise DataError(f"{path}: if quotes enclose fields, {ways}; set data.format=csv or data.format=tsv")
    n, columns = shape
    begin, hold = [0] * columns, [0] * columns  # how many fields of a column begin with a quote, and hold one too
    for _, fields in _records(raw, path, stream_lines(path, options.encoding)):
        for k, field in enumerate(fields if isinstance(fields, list) else ()):
            begin[k] += field.startswith('"')
            hold[k] += field.startswith('"') and '""' in field
    if all(count in (0, n) for count in begin) or begin == hold:
        return True, notes
    return False, [f"{path}: some fields are in quotes, which are kept as text; data.format=csv removes them"]


def _shape(dialect: Dialect, path: Path, options: Columns, most: int | None = None) -> tuple[int, int] | None:
    """The number of records (of many the first) and of their columns; None where they differ in it or one is not valid."""
    n, columns = 0, 0
    for _, fields in islice(_records(dialect, path, stream_lines(path, options.encoding)), most):
        columns = columns or len(fields if isinstance(fields, list) else ())
        if not isinstance(fields, list) or len(fields) != columns:
            return None
        n += 1
    return n, columns


def _records(dialect: Dialect, path: Path, lines: Iterable[str]) -> Iterator[tuple[str, list[str] | DataError]]:
    """The fields of each record that is not empty, and where it begins; `lines` begin with the first one of the file."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
    lines = islice(lines, dialect.above, None)
    reader = csv.reader(lines, delimiter=dialect.delimiter, quoting=quoting, strict=True)
    while True:
        where = f"{path}:{reader.line_num + dialect.above + 1}"
        limit = csv.field_size_limit(LONGEST)  # one for the whole process; it is put back, since others may count on it
        try:
            fields: list[str] | DataError = next(reader)
        except StopIteration:
            return
        except csv.Error as err:
            fields = DataError(f"{where}: not valid CSV: {err}; write a quote inside a quoted field twice")
        finally:
            csv.field_size_limit(limit)
        if fields:
            yield where, fields


def _header(fields: list[str] | DataError, where: str) -> list[str]:
    if isinstance(fields, DataError):
        raise fields
    if len(fields) > MOST_COLUMNS:
        raise DataError(f"{where}: {len(fields):,} columns; a table can have at most {MOST_COLUMNS:,}")
    header = [name.strip() for name in fields]
    named = [name for name in header if name]  # spreadsheets leave several empty columns without a name
    if len(set(named)) < len(named):
        raise DataError(f"{where}: a column name appears twice in the header: {listed(header)}; {NO_HEADER}")
    return header


def read_excel(path: Path, options: Columns = Columns(), notes: list[str] | None = None) -> Iterator[Row]:
    """Rows of the first sheet of a workbook that holds something, all values as strings: 5.0 is 5, a date is 2026-01-31.

    Raises:
        DataError: the reader is not installed, or the file is not a workbook.
    """
    try:
        from python_calamine import CalamineWorkbook
    except ImportError as err:
        raise DataError(f"{path}: reading a workbook needs the extra: pip install 'lorakit[excel]'") from err
    check_unpacked(path)
    try:
        workbook = CalamineWorkbook.from_path(str(path))
        sheets = {
            name: workbook.get_sheet_by_name(name).to_python(skip_empty_area=False) for name in workbook.sheet_names
        }
    except Exception as err:  # calamine raises many kinds for damaged bytes
        raise DataError(f"{path}: cannot be read as a workbook: {first_line(err)}; save it as CSV") from err
    filled = {name: rows for name, rows in sheets.items() if any(any(cell != "" for cell in row) for row in rows)}
    if len(filled) > 1 and notes is not None:
        notes.append(f"{path}: reads sheet {next(iter(filled))!r}, but not {listed(list(filled)[1:])}")

    def text(value: Any) -> str:
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return value.isoformat() if hasattr(value, "isoformat") else str(value)

    cells = [[text(value) for value in row] for row in next(iter(filled.values()), [])]
    used = [k for k in range(max(map(len, cells), default=0)) if any(row[k] for row in cells)]
    rows = ([row[k] for k in used] for row in cells)
    names: list[str] = []
    for number, fields in enumerate(rows, start=1):
        if not any(fields):
            continue
        if names or options.header is False:
            names = names or [str(k) for k in range(1, len(used) + 1)]
            yield Row(dict(zip(names, fields, strict=True)), f"{path}:{number}")
        else:
            names = _header(fields, f"{path}:{number}")


def read_lines(path: Path, options: Columns = Columns(), notes: list[str] | None = None) -> Iterator[Row]:
    """Each line as a text."""
    lines = enumerate(stream_lines(path, options.encoding), start=1)
    return (Row({"text": line.rstrip("\r\n")}, f"{path}:{number}") for number, line in lines)


MARK = "__label__"  # before each label in fastText's files
LABEL_LIKE = (re.compile(r"[+-]?\d+(\.\d+)?"), re.compile(r"[^\W\d][\w-]*:[\w-]*"))  # 1, spam:, DESC:manner


def is_label_first(lines: Sequence[str]) -> bool:
    """Whether lines begin with labels: fastText's; or numbers, or words with a colon, that come again and again."""
    firsts = [line.split(maxsplit=1)[0] for line in lines]
    if all(first.startswith(MARK) for first in firsts):
        return True
    alike = any(all(form.fullmatch(first) for first in firsts) for form in LABEL_LIKE)
    return alike and len(lines) >= 20 and len(set(firsts)) <= len(lines) // 5


def read_label_first(path: Path, options: Columns = Columns(), notes: list[str] | None = None) -> Iterator[Row]:
    """Lines of a label, white space and the text, without a header. Of fastText's, all labels in a list, without their mark."""
    for number, line in enumerate(stream_lines(path, options.encoding), start=1):
        if not line.strip():
            continue
        labels = [word.removeprefix(MARK) for word in takewhile(lambda word: word.startswith(MARK), line.split())]
        *firsts, text = [*line.split(maxsplit=len(labels) or 1), ""][: (len(labels) or 1) + 1]
        values = {"label": labels or firsts[0], "text": text.strip()}
        yield Row(values, f"{path}:{number}")


DOCSTART = "-DOCSTART-"
# types of phrases, in CoNLL's column of chunks
CHUNKS = {"ADJP", "ADVP", "CONJP", "INTJ", "LST", "NP", "PP", "PRT", "SBAR", "UCP", "VP"}
HEADERS = {
    *("tag", "tags", "ner", "ner_tag", "ner_tags", "ner-tag", "label", "labels", "iob", "bio", "entity", "entities"),
}
MOST_TAG_COLUMNS = 100
LAYOUT_LINES = 5000  # that show the layout of CoNLL columns
MOSTLY = 0.9  # share of lines whose field is a tag in a column of tags; the others are mistakes


class Layout(NamedTuple):
    """Columns of CoNLL lines, from 0: where word and tag stand, how many there are, and the header's line, or 0."""

    word: int
    tag: int
    columns: int
    header: int = 0

    def is_token(self, fields: Sequence[str]) -> bool:
        """Whether fields are those of a word with its tag."""
        return len(fields) == self.columns and is_tag(standard(fields[self.tag]))


def read_conll(path: Path, options: Columns = Columns(), notes: list[str] | None = None) -> Iterator[Row]:
    """The sentences of lines with two or more columns (tab or space): `tokens` and `ner_tags`, the tags as they stand.

    Lines that begin with # before the first word of a sentence are comments, unless they are a word with its tag.

    Raises:
        DataError: a line has one column or another number of columns than the first, a word is empty, there is no
            sentence, or several columns could be the tags.
    """
    layout = _layout(path, list(islice(stream_lines(path, options.encoding), LAYOUT_LINES)), options)
    if notes is not None and layout.header:
        notes.append(f"{path}: line {layout.header} is a header")
    if notes is not None and (layout.word, layout.tag) not in ((0, layout.columns - 1), (0, -1)):
        notes.append(f"{path}: words are column {layout.word + 1}, tags are column {layout.tag + 1}")
    words: list[str] = []
    tags: list[str] = []
    begin, sentences = 1, 0
    for number, line in enumerate(chain(stream_lines(path, options.encoding), [""]), start=1):
        fields = columns_of(line)
        if not any(fields) or fields[0] == DOCSTART:
            if words:
                sentences += 1
                yield Row({"tokens": words, "ner_tags": tags}, f"{path}:{begin}", lined=True)
            words, tags = [], []
            continue
        if number == layout.header or (not words and line.startswith("#") and not layout.is_token(fields)):
            continue
        if len(fields) != layout.columns or len(fields) < 2:
            expected = (
                f"the lines before have {layout.columns}" if layout.columns > 1 else "a word and its tag are expected"
            )
            raise DataError(f"{path}:{number}: {len(fields)} column{'s' * (len(fields) != 1)}; {expected}")
        if not fields[layout.word]:
            raise DataError(f"{path}:{number}: the word is empty")
        begin = begin if words else number
        words.append(fields[layout.word])
        tags.append(fields[layout.tag])
    if not sentences:
        raise DataError(f"{path}: no sentence in the file")


def columns_of(line: str) -> list[str]:
    """The columns of a line: split at tabs where there are any, else at runs of spaces."""
    line = line.rstrip(" \t\r\n")  # not rstrip(): a no-break space may be a word
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field]


def is_tagged_lines(lines: Sequence[str]) -> bool:
    """Whether lines are words with tags, at least one of them of an entity."""
    if max((len(columns_of(line)) for line in lines), default=0) > MOST_TAG_COLUMNS:
        return False
    try:
        layout = _layout(Path(), lines, Columns())
    except DataError:  # several columns of tags
        return True
    tokens = [fields for _, fields in chain(*_sentences(lines, layout.header))]
    return (
        bool(tokens)
        and layout.columns > 1
        and all(map(layout.is_token, tokens))
        and any(standard(fields[layout.tag]) != OUTSIDE for fields in tokens)
    )


def _layout(path: Path, lines: Sequence[str], options: Columns) -> Layout:
    """Which columns are words and which are tags: those that data.columns names, or what the lines show.

    Words are the first column but for one that counts the words of each sentence (or names it) and for tags; tags are the
    only column of tags, those of phrases left out, or the last column.
    """
    sentences = _sentences(lines)
    first = next(iter(chain(*sentences)), None)
    if first is None:
        return Layout(0, -1, 2)
    header, fields = first
    n = len(fields)
    if n > MOST_TAG_COLUMNS:
        raise DataError(f"{path}: {n:,} columns; lines of words and tags can have at most {MOST_TAG_COLUMNS}")
    lower = [field.lower() for field in fields]
    is_header = n > 1 and (
        (lower[-1] in HEADERS and not any(is_tag(standard(field)) for field in fields))
        or not ({"word", "token"}.isdisjoint(lower) or HEADERS.isdisjoint(lower))
    )
    header = header if is_header else 0
    sentences = _sentences(lines, header)
    tokens = [f for sentence in sentences for _, f in sentence if len(f) == n]
    columns = {k: [standard(f[k]) for f in tokens] for k in range(n)}
    tags = [k for k, column in columns.items() if column and sum(map(is_tag, column)) >= MOSTLY * len(column)]
    types = {k: {tag.partition("-")[2] for tag in columns[k] if tag != OUTSIDE} for k in tags}
    tags = [k for k in tags if not types[k] or not types[k] <= CHUNKS] or tags
    tags = [k for k in tags if types[k]] or tags
    words = [
        k for k in range(n) if k not in tags and not _is_index([[f[k] for _, f in s if len(f) == n] for s in sentences])
    ]
    named = {role: number - 1 for role, number in (options.columns or {}).items()}
    if outside := [number + 1 for number in named.values() if number >= n]:
        raise DataError(f"{path}: data.columns names column {outside[0]}; the lines have {n}")
    if len(tags) > 1 and "tag" not in named:
        ways = " and ".join(str(k + 1) for k in tags)
        word = words[0] + 1 if words else 1
        raise DataError(
            f"{path}: columns {ways} hold tags; name one of them: data.columns={{word={word},tag={tags[0] + 1}}}"
        )
    tag = named.get("tag", tags[0] if tags else n - 1)
    word = named.get("word", next((k for k in words if k != tag), 0))
    return Layout(word, tag, n, header)


def _sentences(lines: Sequence[str], header: int = 0) -> list[list[tuple[int, list[str]]]]:
    """The numbers and fields of the words of each sentence; comments are known by their number of fields."""
    rows = [(number, line, columns_of(line)) for number, line in enumerate(lines, start=1)]
    plain = (
        fields
        for number, line, fields in rows
        if any(fields) and line[0] != "#" and fields[0] != DOCSTART and number != header
    )
    n = len(next(plain, []))
    sentences: list[list[tuple[int, list[str]]]] = [[]]
    for number, line, fields in rows:
        if not any(fields) or fields[0] == DOCSTART:
            sentences.append([])
        elif number != header and not (
            line[0] == "#" and not sentences[-1] and (len(fields) != n or not any(map(is_tag, fields)))
        ):
            sentences[-1].append((number, fields))
    return [sentence for sentence in sentences if sentence]


def _is_index(sentences: Sequence[Sequence[str]]) -> bool:
    """Whether a column counts the words of each sentence, or all words, or says of each word in which sentence it is."""
    longer = [cells for cells in sentences if len(cells) > 1]
    if not longer:
        return False
    if all(len(set(cells)) == 1 for cells in longer):
        return len(longer) > 1 or all(cell.isdecimal() for cell in longer[0])
    if not all(cell.isascii() and cell.isdecimal() for cells in sentences for cell in cells):
        return False
    return all(int(after) == int(before) + 1 for cells in longer for before, after in pairwise(cells))


SENTENCE = ("sentence_id", "sentence#", "sentence", "sent_id", "sentid", "sentence_number", "sentence_idx")
WORD = ("word", "words", "token", "tokens")
TAG = ("tag", "tags", "ner", "ner_tag", "ner_tags", "label", "labels")


def word_rows(rows: Sequence[Row], options: Columns, source: str) -> tuple[list[Row], list[str]] | None:
    """The sentences of a table with a row a word: a column of sentences, of words and of tags; None of another table.

    Lists of words and tags that pandas wrote into cells are read too. A cell of the sentence that is empty means the
    sentence of the row before.

    Raises:
        DataError: there are words and tags but no sentences, or a sentence goes on after another one.
    """
    names = {plain_name(name): name for name in reversed(list(rows[0].values))}
    label = options.label if isinstance(options.label, str) else None
    word, tag = options.text or _first_of(WORD, names), label or _first_of(TAG, names)
    head = [row.values for row in rows[:100]]
    if not word or not tag or plain_name(word) not in WORD or not all(isinstance(v.get(word), str) for v in head):
        return None
    if all(QUOTED_LIST.fullmatch(v[word].strip()) and str(v.get(tag)).lstrip().startswith("[") for v in head):
        with_lists = []
        for row in rows:
            cells = {column: row.values.get(column) for column in (word, tag)}
            lists = {column: written_list(cell.strip(), ",") for column, cell in cells.items() if isinstance(cell, str)}
            with_lists.append(row._replace(values={**row.values, **lists}))
        return with_lists, [f"{source}: each row is a sentence, with its words in a list"]
    if not all(isinstance(cell := v.get(tag), str) and is_tag(standard(cell)) for v in head):
        return None
    sentence = _first_of(SENTENCE, names)
    if sentence is None:
        raise DataError(
            f"{source}: each row is a word, but no column says which sentence it is in; call that column sentence_id"
        )
    sentences: dict[str, Row] = {}
    last = ""
    for row in rows:
        name = str(row.values.get(sentence) or "").strip() or last
        if name not in sentences:
            sentences[name] = Row({"tokens": [], "ner_tags": []}, row.where, lined=True)
        elif name != last:
            raise DataError(f"{row.where}: sentence {name!r} continues after another one; sort the rows")
        last = name
        for key, column in (("tokens", word), ("ner_tags", tag)):
            sentences[name].values[key].append(row.values.get(column))
    return list(sentences.values()), [
        f"{source}: each row is a word: words are column {word!r}, tags {tag!r}, sentences {sentence!r}"
    ]


# A list as Python prints it, with names in quotes: ['x', 'y'], and ['x' 'y'] of numpy. No text matches in two ways, so
# that none takes exponential time.
QUOTED = r"""'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*\""""
QUOTED_LIST = re.compile(rf"[\[({{]\s*(?:(?:{QUOTED})(?:\s*,)?\s*)+[\])}}]")


def written_list(cell: str, separator: str) -> list[Any]:
    """The items of a list that pandas or numpy wrote into a cell, or of one whose names stand without quotes."""
    try:
        if QUOTED_LIST.fullmatch(cell):  # item by item, since to literal_eval 'x' 'y' are one string
            return [ast.literal_eval(item) if "\\" in item else item[1:-1] for item in re.findall(QUOTED, cell)]
        items = ast.literal_eval(cell)
        return items if isinstance(items, list) else [items]
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # names without quotes
        inner = cell[1:-1].strip()
        return inner.split(separator if separator in inner else None) if inner else []


def plain_name(name: str) -> str:
    """A column's name to compare with the usual ones: small letters, with _ for spaces and hyphens."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold()).replace("_#", "#")


def _first_of(usual: Sequence[str], names: Mapping[str, str]) -> str | None:
    return next((names[name] for name in usual if name in names), None)
