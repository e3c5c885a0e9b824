"""The files that other readers lose rows on without a word: how many rows are kept, or the line that refuses them.

A table for the whole of the readers; each format's own tests have the details. Defaults of pandas lose 4 of the 5 texts
named NA; those of pandas, polars and pyarrow fail at a lone quote; `str.splitlines` gives 3 records for 2 of JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from lorakit.data.read import read
from lorakit.errors import DataError

NULLS = ["NA", "null", "None", "nan", "NULL"]
QUOTES = ['"', 'a "', '"b', '"c" d', "e'", '""']


class Good(NamedTuple):
    """A file whose rows are all kept."""

    case: str
    name: str
    content: str | bytes
    texts: list[str]


class Bad(NamedTuple):
    """A file that is refused, at a line, with a message."""

    case: str
    name: str
    content: str | bytes
    line: int | str
    message: str


def table(texts, separator=",", newline="\n") -> str:
    return newline.join([f"text{separator}label", *(f"{text}{separator}x" for text in texts), ""])


def records(texts) -> str:
    return "\n".join(f'{{"text": "{text}", "label": "x"}}' for text in texts)


GOOD = [
    Good("null words", "a.csv", table(NULLS), NULLS),
    Good("null words", "a.tsv", table(NULLS, "\t"), NULLS),
    Good("null words", "a.jsonl", records(NULLS), NULLS),
    Good("null words", "a.json", "[" + records(NULLS).replace("\n", ",\n") + "]", NULLS),
    Good("null words", "a.txt", "".join(f"{i % 2} {text}\n" for i in range(5) for text in NULLS), NULLS * 5),
    Good("lone quote", "a.tsv", table(QUOTES, "\t"), QUOTES),
    Good("byte-order mark", "a.csv", "\ufeff" + table(["a", "b"]), ["a", "b"]),
    Good("byte-order mark", "a.tsv", "\ufeff" + table(["a", "b"], "\t"), ["a", "b"]),
    Good("byte-order mark", "a.jsonl", "\ufeff" + records(["a", "b"]), ["a", "b"]),
    Good("byte-order mark", "a.json", "\ufeff[" + records(["a"]) + "]", ["a"]),
    Good("CR only", "a.csv", table(["a", "b"], newline="\r"), ["a", "b"]),
    Good("CR only", "a.tsv", table(["a", "b"], "\t", "\r"), ["a", "b"]),
    Good("U+2028", "a.csv", table(["a\u2028b", "c"]), ["a\u2028b", "c"]),
    Good("U+2028", "a.tsv", table(["a\u2028b", "c"], "\t"), ["a\u2028b", "c"]),
    Good("U+2028", "a.jsonl", records(["a\u2028b", "c"]), ["a\u2028b", "c"]),
    Good("no line end", "a.csv", table(["a", "b"]).rstrip("\n"), ["a", "b"]),
    Good("quoted line end", "a.csv", table(['"a\nb"', '"c"']), ["a\nb", "c"]),
    Good("one row", "a.csv", table(["a"]), ["a"]),
    Good("long field", "a.csv", table(["y" * 10**6]), ["y" * 10**6]),
    Good("long field", "a.tsv", table(["y" * 10**6], "\t"), ["y" * 10**6]),
    Good("long field", "a.jsonl", records(["y" * 10**6]), ["y" * 10**6]),
]

LATIN_1 = "name the file's encoding, for example data.encoding=cp1252"
BAD = [
    *(
        bad
        for name in ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.conll", "a.txt", "a.train")
        for bad in (
            Bad(
                "Latin-1",
                name,
                "x,y\na,b\ncafé,x\n".encode("latin-1"),
                3,
                f"byte 11 (0xe9) is not valid UTF-8; {LATIN_1}",
            ),
            Bad("UTF-16", name, table(["a"]).encode("utf-16"), 1, "the file is UTF-16: say data.encoding=utf-16"),
            Bad("UTF-16 without a mark", name, table(["a"]).encode("utf-16-be"), 1, "a NUL character; text has none"),
            Bad("NUL", name, table(["a", "b\0c"]), 3, "a NUL character; text has none"),
        )
        if not (bad.case == "NUL" and "json" in name)
    ),
    Bad("NUL", "a.jsonl", records(["a", "b\0c"]), 2, "a NUL character; text has none"),
    Bad("NUL", "a.json", "[\n" + records(["a\0"]) + "]", 2, "a NUL character; text has none"),
    Bad("NUL behind an escape", "a.jsonl", records(["a", "b\\u0000"]), 2, "column 'text' holds a NUL character"),
    Bad(
        "lone surrogate",
        "a.jsonl",
        records(["a", "b\\ud800"]),
        2,
        "a lone surrogate escape such as \\ud800 is not text",
    ),
    Bad("lone surrogate", "a.json", "[" + records(["b\\udfff"]) + "]", "1, record 1", "a lone surrogate escape"),
    Bad("ragged", "a.csv", table(["a", "b,c"]), 3, "3 columns, the header has 2: text, label"),
    Bad("ragged", "a.csv", "text,label\na,x\nb\n", 3, "1 columns, the header has 2: text, label"),
    Bad("ragged", "a.csv", 'text,label\n"a\n\nb",x\nb\n', 5, "1 columns, the header has 2: text, label"),
    Bad("ragged", "a.tsv", "text\tlabel\nb\n", 2, "1 columns, the header has 2: text, label"),
    Bad("ragged", "a.conll", "a O\nb\n", 2, "1 column; the lines before have 2"),
    Bad("ragged", "a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}', 2, "column 'label' holds None, not a label"),
    Bad("open quote", "a.csv", table(["a", '"b', "c"]), 3, "not valid CSV: unexpected end of data"),
    Bad("text after a quote", "a.csv", table(["a", '"b"c']), 3, "not valid CSV: ',' expected after '\"'"),
    Bad("empty text", "a.csv", table(["a", " "]), 3, "column 'text' is empty"),
    Bad("missing label", "a.csv", "text,label\na,x\nb,\n", 3, "column 'label' holds '', not a label"),
    Bad("key twice", "a.jsonl", '{"text": "a", "text": "b"}', 1, "not JSON: key 'text' stands twice in an object"),
]


@pytest.mark.parametrize("file", GOOD, ids=lambda file: f"{file.case}-{file.name}")
def test_every_row_is_kept(save, file):
    dataset = read(str(save(file.name, file.content)))
    assert [example.text for example in dataset.examples] == file.texts


@pytest.mark.parametrize("file", BAD, ids=lambda file: f"{file.case}-{file.name}")
def test_bad_file_is_refused_with_its_line(save, file):
    path = save(file.name, file.content)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}:{file.line}: {file.message}')}"):
        read(str(path), "words" if file.name.endswith("conll") else "label")


@pytest.mark.slow
def test_hostile_files_and_recipes_are_refused_or_read_in_bounds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.hostile", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= 100
    assert [r for r in results if r["code"] not in (0, 2, 3) or r["seconds"] > 5 or r["memory"] > 1000] == []
    assert [r for r in results if r["code"] and (len(r["said"]) > 4000 or "\n" in r["said"].strip()[:100])] == []
