"""spaCy's DocBin. The only file that imports spaCy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.data.spans import Span
from lorakit.data.tables import Row
from lorakit.data.text import read_bytes
from lorakit.errors import DataError


def read_docbin(path: Path) -> Iterator[Row]:
    """A row for each document: its text, where its tokens are, its entities and categories, and a column a span group.

    Categories that are all 0 or 1 become the list of those that are 1.

    Raises:
        DataError: spaCy is not installed, or the file is no DocBin.
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
    def spans(found: Any) -> list[Span]:
        return [Span(span.start_char, span.end_char, span.label_, where=where) for span in found]

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
