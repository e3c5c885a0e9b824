"""Files of annotation tools: brat's standoff, spaCy's DocBin, and Label Studio's exports. The only file that imports spaCy."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.data.delimited import Row
from lorakit.data.example import Columns
from lorakit.data.spans import Span, is_spans
from lorakit.data.text import counted, read_bytes, read_text
from lorakit.errors import DataError

ENTITY = re.compile(r"T\S*\t(?P<type>\S+) (?P<offsets>\d+ \d+(?:;\d+ \d+)*)\t(?P<text>.*)")
OTHERS = {
    "R": "relations",
    "*": "equivalences",
    "E": "events",
    "A": "attributes",
    "M": "attributes",
    "N": "links",
    "#": "notes",
}


def is_brat(path: Path) -> bool:
    """Whether a folder holds .ann files, or a file is one or stands beside its own."""
    return any(path.glob("*.ann")) if path.is_dir() else path.with_suffix(".ann").is_file()


def read_brat(path: Path, options: Columns = Columns(), notes: list[str] | None = None) -> Iterator[Row]:
    """A row for each document of a folder, in the order of names, or for one document: its text and its annotations.

    Raises:
        DataError: a text or its annotations are missing.
    """
    files = [file for ending in ("*.txt", "*.ann") for file in path.glob(ending)] if path.is_dir() else [path]
    for folder, name in sorted({(file.parent, file.stem) for file in files}):
        text_file, annotations = folder / f"{name}.txt", folder / f"{name}.ann"
        for file, other in ((text_file, annotations), (annotations, text_file)):
            if not file.is_file():
                raise DataError(
                    f"{other}: {file.name} is missing next to it; for a text without entities, make it empty"
                )
        text = read_text(text_file)
        yield Row({"text": text, "annotations": annotations}, f"{text_file}:1")


def with_spans(rows: Sequence[Row], source: str) -> tuple[list[Row], list[str]]:
    """The documents with the spans of their T lines, and notes of the lines of other kinds.

    Raises:
        DataError: a line is not an annotation, or an entity has several parts.
    """
    others: dict[str, list[str]] = defaultdict(list)
    plain = []
    for row in rows:
        spans = list(_spans(row.values["annotations"], row.values["text"], others))
        plain.append(row._replace(values={"text": row.values["text"], "spans": spans}))
    notes = [
        note for kind, places in others.items() for note in counted(f"{source}: {kind}, which are not read", places)
    ]
    return plain, notes


def _spans(path: Path, text: str, others: dict[str, list[str]]) -> Iterator[Span]:
    lines = read_text(path).split("\n") if path.read_bytes().strip() else []
    for number, line in enumerate(lines, start=1):
        line, where = line.rstrip("\r"), f"{path}:{number}"
        if line[:1] in OTHERS:
            others[OTHERS[line[:1]]].append(where)
        elif line.strip():
            yield _entity(line, text, where)


def _entity(line: str, text: str, where: str) -> Span:
    match = ENTITY.fullmatch(line)
    if match is None:
        raise DataError(f"{where}: {line[:60]!r} is not a brat annotation; expected ID, tab, TYPE START END, tab, text")
    parts = [tuple(map(int, part.split())) for part in match["offsets"].split(";")]
    # brat cuts an entity at each line end; with nothing but white space between them the parts are one
    if any(text[end:start].strip() or start < end for (_, end), (start, _) in pairwise(parts)):
        raise DataError(f"{where}: an entity in several parts ({match['offsets']}), which word tags cannot express")
    start, end = parts[0][0], parts[-1][1]
    return Span(start, end, match["type"], match["text"], where)


def read_docbin(path: Path, options: Columns = Columns(), notes: list[str] | None = None) -> Iterator[Row]:
    """A row for each document: its text, where its tokens are, its entities and categories, and a column a span group.

    Categories that are all 0 or 1 become the list of those that are 1.

    Raises:
        DataError: spaCy is not installed, or the file is not a DocBin.
    """
    try:
        from spacy.tokens import DocBin
        from spacy.vocab import Vocab
    except ImportError as err:
        raise DataError(f"{path}: reading a DocBin needs the extra: pip install 'lorakit[spacy]'") from err
    data = read_bytes(path)
    try:
        docs = list(DocBin().from_bytes(data).get_docs(Vocab()))
    except Exception as err:  # zlib, msgpack and spaCy raise many kinds for damaged bytes
        raise DataError(f"{path}: not a spaCy DocBin: {type(err).__name__} {err}") from err
    for number, doc in enumerate(docs, start=1):
        yield Row(_values(doc, f"{path}:{number}"), f"{path}:{number}")


def _values(doc: Any, where: str) -> dict[str, Any]:
    def spans(doc_spans: Any) -> list[Span]:
        return [Span(span.start_char, span.end_char, span.label_, where=where) for span in doc_spans]

    values = {
        "text": doc.text,
        "token_offsets": [(token.idx, token.idx + len(token)) for token in doc],
        "entities": spans(doc.ents) if doc.has_annotation("ENT_IOB") else None,
        **{name: spans(group) for name, group in doc.spans.items()},
    }
    if doc.cats:
        hard = set(doc.cats.values()) <= {0.0, 1.0}
        values["label"] = [name for name, value in doc.cats.items() if value] if hard else dict(doc.cats)
    return values


# Label Studio's exports JSON, JSON_MIN and CSV, as records whose columns are the data's and the annotations' names.


SPANS = "labels"
# Results that are labels of the whole text, and the key of each under `value`.
LABELS = {"choices": "choices", "rating": "rating", "number": "number", "taxonomy": "taxonomy", "textarea": "text"}
UNREAD = {"hypertextlabels": "places in HTML", "paragraphlabels": "places in a dialogue"}  # spans, but not of a text
MIN_KEYS = ("annotation_id", "annotator", "lead_time")
ANNOTATIONS = ("annotations", "completions")  # the second one until 2021


class Flat(NamedTuple):
    """A task in two parts; nobody has annotated it where the second is None."""

    data: Mapping[str, Any]
    annotated: Mapping[str, Any] | None


def is_label_studio(row: Row) -> bool:
    """Whether a record is a task of the full export, or a record of JSON_MIN."""
    return _is_task(row) or any(key in row.values for key in MIN_KEYS)


def _is_task(row: Row) -> bool:
    return isinstance(row.values.get("data"), dict) and any(key in row.values for key in ANNOTATIONS)


def flatten_label_studio(rows: Sequence[Row], source: str) -> tuple[list[Row], list[str]]:
    """Records with a column for each name of an annotation, which holds spans or choices; and notes.

    Raises:
        DataError: a task has several annotations that differ, spans that are not of a text, or is not what the export
            writes.
    """
    others: dict[str, list[str]] = defaultdict(list)
    tasks = [_flat_task(row, others) if _is_task(row) else _flat_record(row) for row in rows]
    # both exports leave out the name of what was marked nowhere in a task
    names = sorted({name for task in tasks for name, value in (task.annotated or {}).items() if is_spans(value)})
    plain = [
        row._replace(
            values={
                **task.data,
                **dict.fromkeys(names, None if task.annotated is None else []),
                # CSV leaves the cell of what was marked nowhere empty
                **{name: value for name, value in (task.annotated or {}).items() if name not in names or value != ""},
            }
        )
        for row, task in zip(rows, tasks, strict=True)
    ]
    notes = [
        note
        for kind, places in others.items()
        for note in counted(f"{source}: results of type {kind!r}, which are not read", places)
    ]
    return plain, notes


def _flat_record(row: Row) -> Flat:
    """JSON_MIN writes one choice as a string and several as an object around a list; CSV what is no string as JSON."""
    values = {}
    for name, value in row.values.items():
        content = _parsed(value) if isinstance(value, str) else value
        if _is_objects(content):
            _check_read(row.place, name, {key for item in content for key in item})
        one = content[0] if _is_objects(content) and len(content) == 1 else content
        key = next(iter(one)) if isinstance(one, dict) and len(one) == 1 else None
        values[name] = _label(key, one[key]) if key in LABELS.values() else content
    return Flat({}, values)


def _parsed(cell: str) -> Any:
    """The spans or choices that a cell of the CSV export holds; any other cell as it is."""
    try:
        value = json.loads(cell) if cell.startswith(("[{", "{")) else cell
    except ValueError:
        return cell
    return value if _is_objects(value) or (isinstance(value, dict) and {*value} <= {*LABELS.values()}) else cell


def _label(key: object, value: Any) -> Any:
    """Choices and numbers as they are; of a taxonomy the names from the root on; the one text that was written."""
    if key == LABELS["taxonomy"] and isinstance(value, list):
        return [" / ".join(map(str, path)) if isinstance(path, list) else path for path in value]
    return value[0] if key == LABELS["textarea"] and isinstance(value, list) and len(value) == 1 else value


def _check_read(where: str, name: object, kinds: Iterable[str]) -> None:
    for kind in UNREAD.keys() & kinds:
        raise DataError(
            f"{where}: {name!r} has a result of type {kind!r}, which marks {UNREAD[kind]} and is not read; label plain "
            "texts, with <Text> and <Labels>"
        )


def _flat_task(row: Row, others: dict[str, list[str]]) -> Flat:
    where = row.place
    data = {"id": row.values.get("id"), **row.values["data"]}
    results = _results(row)
    if results is None:
        return Flat(data, None)
    answers: dict[str, Any] = {}
    for result in results:
        kind, value, name = (result.get(key) for key in ("type", "value", "from_name"))
        _check_read(where, name, [str(kind)])
        if kind != SPANS and kind not in LABELS:
            others[str(kind)].append(where)
        elif not isinstance(value, dict) or not isinstance(name, str):
            raise DataError(f"{where}: a result of type {kind!r} has no value or no from_name")
        elif kind == SPANS:
            answers.setdefault(name, []).append(value)
        else:
            answers[name] = _label(LABELS[str(kind)], value.get(LABELS[str(kind)]))
    return Flat(data, answers)


def _results(row: Row) -> Sequence[Mapping[str, Any]] | None:
    """The results of the one annotation that counts, or None where every one was cancelled or there is none."""
    key = next(key for key in ANNOTATIONS if key in row.values)
    annotations = row.values[key]
    if not _is_objects(annotations) or not all(_is_objects(annotation.get("result")) for annotation in annotations):
        raise DataError(f"{row.place}: {key} is not a list of annotations with a list of results each")
    finished = [annotation for annotation in annotations if not annotation.get("was_cancelled")]
    finished = [annotation for annotation in finished if annotation.get("ground_truth")] or finished
    results: list[Sequence[Mapping[str, Any]]] = [annotation["result"] for annotation in finished]
    if any(_content(result) != _content(results[0]) for result in results[1:]):
        raise DataError(
            f"{row.place}: {len(results)} annotations that differ; mark one as ground truth, or keep only one"
        )
    return results[0] if results else None


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _content(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What annotators agree on: everything but the random ids of regions, in any order."""
    return sorted(repr((item.get("type"), item.get("from_name"), item.get("value"))) for item in results)
