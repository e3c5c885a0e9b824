"""Files of annotation tools that are not JSON: brat's standoff, and spaCy's DocBin. The only file that imports spaCy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorakit.data.delimited import Row
from lorakit.data.example import Columns
from lorakit.data.spans import Span
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
                raise DataError(f"{other}: there is no {file.name} beside it; a text without entities has an empty one")
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
        raise DataError(f"{where}: {line[:60]!r} is not an annotation of brat's: ID, tab, TYPE START END, tab, text")
    parts = [tuple(map(int, part.split())) for part in match["offsets"].split(";")]
    # brat cuts an entity at each line end; with nothing but white space between them the parts are one
    if any(text[end:start].strip() or start < end for (_, end), (start, _) in pairwise(parts)):
        raise DataError(f"{where}: an entity of several parts ({match['offsets']}), which no tags of words can say")
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
        raise DataError(f"{path}: no DocBin of spaCy's: {type(err).__name__} {err}") from err
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
