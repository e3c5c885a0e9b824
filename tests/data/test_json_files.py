"""JSON arrays against the json library; lines are in test_tables.py."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.documents import TEXTS

from lorakit.data.json_files import read_json
from lorakit.data.read import read
from lorakit.errors import DataError


def refusal(where: object, message: str) -> str:
    return "^" + re.escape(f"{where}: {message}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab]"), inner, max_size=2),
    max_leaves=3,
)
ROWS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=2), max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


@given(
    rows=ROWS, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), newline=st.sampled_from(["\n", "\r\n"])
)
@settings(max_examples=20, deadline=None)
def test_reading_an_array_gives_back_what_was_written(folder, rows, indent, ascii_only, newline):
    path = folder / "a.json"
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(b"\xef\xbb\xbf" + f"\n {content}\n".replace("\n", newline).encode())
    assert [row.values for row in read_json(path)] == rows


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("before", ["", "\n\n "])
def test_records_of_an_array_know_the_line_they_begin_on(save, indent, before):
    rows = [{"text": f"text {i}", "label": "x", "more": [i] * i} for i in range(4)]
    content = before + json.dumps(rows, indent=indent)
    path = save("a.json", content)
    records = list(read(str(path)).examples)
    # a record begins at the last { before its text
    begins = [content.rindex("{", 0, content.index(row["text"])) for row in rows]
    lines = [content.count("\n", 0, at) + 1 for at in begins]
    assert [record.where for record in records] == [
        f"{path}:{line}, record {number}" for number, line in enumerate(lines, start=1)
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "noending"])
@pytest.mark.parametrize("write", ["array", "lines"])
def test_arrays_and_lines_are_told_from_the_content(save, name, write):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    content = json.dumps(rows, indent=1) if write == "array" else "\n".join(map(json.dumps, rows))
    path = save(name, content)
    assert [example.text for example in read(str(path)).examples] == ["a", "b"]


def test_format_that_the_ending_does_not_say_is_said(save):
    path = save("a.data", '[{"text": "a", "label": "x"}]')
    assert read(str(path)).notes[0] == f"{path}: read as json"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('[{"text": "a"},\n {"text": "b"', 2, "no JSON: Expecting ',' delimiter at column 14"),
        ('[{"text": "a"}\n\n {"text": "b"}]', 3, "no JSON: after a record of the array comes a comma or the closing ]"),
        ('[{"text": "a"},\n]', 2, "no JSON: Expecting value at column 1"),
        ('[{"text": "a"}', 1, "no JSON: after a record of the array"),
        ('[{"text": "a"}]\n{"text": "b"}', 1, "no JSON: after a record of the array"),
        ("[", 1, "no JSON: Expecting value"),
        ('[{"text": "a"},\n"b"]', "2, record 2", "a str, not a JSON object"),
        ('[{"text": "a"},\n["b"]]', "2, record 2", "a list, not a JSON object"),
        ('[{"text": "a"},\n{"text": "\\ud800"}]', "2, record 2", "a lone surrogate escape such as \\ud800 is no text"),
        ('[{"text": "a"},\n{"text": ' + "1" * 5000 + "}]", 2, "no JSON: "),
        ('[{"text": "a"},\n' + "[" * 100_000, 2, "no JSON: "),
        ('[{"text": "a"},\n{"text": "b", "text": "c"}]', 2, "no JSON: key 'text' stands twice in an object"),
        ('{"text": "a"}\n{"text": "b", "more": {"x": 1, "x": 1}}', 2, "no JSON: key 'x' stands twice in an object"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_broken_array_is_refused_with_its_line(save, name, content, line, message):
    path = save(name, content)
    with pytest.raises(DataError, match=refusal(f"{path}:{line}", message)):
        read(str(path))


@pytest.mark.parametrize("content", ["[]", "[ \n ]"])
def test_empty_array_is_refused(save, content):
    path = save("a.json", content)
    with pytest.raises(DataError, match=refusal(path, "no record")):
        read(str(path))
