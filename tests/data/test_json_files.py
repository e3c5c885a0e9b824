"""JSON arrays against the json library; lines are in test_tables.py."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.documents import TEXTS

from lorakit.data.json_files import read_json
from lorakit.data.read import read
from lorakit.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab]"), inner, max_size=2),
    max_leaves=3,
)
# Two lists of objects in one object would be refused: records of two parts.
RECORD = st.dictionaries(TEXTS, VALUES, max_size=2).filter(
    lambda record: len(record) < 2 or not any(isinstance(v, list) and v for v in record.values())
)
ROWS = st.lists(RECORD, max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@given(
    rows=ROWS, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), newline=st.sampled_from(["\n", "\r\n"])
)
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


@pytest.mark.parametrize("write", ["array", "lines"])
def test_arrays_and_lines_are_known_by_the_content(save, write):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    content = json.dumps(rows, indent=1) if write == "array" else "\n".join(map(json.dumps, rows))
    for name in ("a.json", "a.jsonl", "a.txt", "noending"):
        assert [example.text for example in read(str(save(name, content))).examples] == ["a", "b"]
    path = save("a.data", content)
    assert read(str(path)).notes[0] == f"{path}: read as json{'l' * (write == 'lines')}"


# One value that takes up the whole file

RECORDS = [{"text": "one", "label": "a"}, {"text": "two\u2028x", "label": "b"}, {"text": "three", "label": "a"}]
WHOLE = {
    "data": {"version": "1.0", "data": RECORDS, "more": [1, 2]},
    "any key alone": {"reviews": RECORDS},
    "array": RECORDS,
}


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("kind", WHOLE)
def test_records_are_found_in_one_value(save, kind, indent):
    for name, again in (("a.json", False), ("a.jsonl", True)):
        found = read(str(save(name, json.dumps(WHOLE[kind], indent=indent))), again=again).examples
        assert [{"text": e.text, "label": e.label} for e in found] == RECORDS


def test_columns_of_pandas_are_refused_with_the_remedy(tmp_path):
    path = tmp_path / "a.json"
    pd.DataFrame(RECORDS).to_json(path)
    with pytest.raises(
        DataError, match=r"columns of records under their numbers; write them with pandas' orient=\"rec"
    ):
        read(str(path))
    pd.DataFrame(RECORDS).to_json(path, orient="table")
    assert [{"text": e.text, "label": e.label} for e in read(str(path)).examples] == RECORDS


def test_records_in_an_object_know_their_lines(save):
    bad = [*RECORDS, {"text": "", "label": "a"}]
    path = save("a.json", json.dumps({"version": [1], "data": bad}, indent=1))
    with pytest.raises(DataError, match=rf"{path}:18, record 4: column 'text' is empty"):
        read(str(path))


@pytest.mark.parametrize("indent", [None, 1])
def test_one_record_alone_is_one_record(save, indent):
    for record in (
        {"text": "one", "label": "a", "spans": [{"start": 0, "end": 1, "label": "X"}]},
        {"text": "one", "label": ["a"], "data": {"x": [{"y": 1}]}},
    ):
        (example,) = read(str(save("a.json", json.dumps(record, indent=indent)))).examples
        assert (example.text, example.label) == ("one", "a")
    sentence = {"tokens": ["Ada", "left"], "ner_tags": ["B-PER", "O"]}  # not a table of columns
    (example,) = read(str(save("a.json", json.dumps(sentence, indent=indent))), "words").examples
    assert example.words == ("Ada", "left")


@pytest.mark.parametrize("as_lines", [True, False])
def test_pairs_of_spacy_are_read(save, as_lines):
    pairs = [
        ["Ada left", {"entities": [[0, 3, "PER"]]}],
        ["Omar left", {"entities": [[0, 4, "PER"]], "cats": {"x": 1, "y": 0}}],
    ]
    content = "".join(json.dumps(pair) + "\n" for pair in pairs) if as_lines else json.dumps(pairs)
    for name, again in (("a.json", False), ("a.jsonl", True)):
        found = read(str(save(name, content)), "words", again=again).examples
        assert [(e.words[0], e.tags) for e in found] == [("Ada", ("B-PER", "O")), ("Omar", ("B-PER", "O"))]


def test_old_export_of_doccano_has_numbers_for_labels(save):
    span = {"label": 2, "start_offset": 0, "end_offset": 4, "user": 1}
    path = save("a.jsonl", json.dumps({"id": 1, "text": "Mila slept", "annotations": [span]}))
    with pytest.raises(DataError, match=r"is a number whose name is not in the file; export with names \(of doccano"):
        read(str(path), "words")
    path = save("b.jsonl", json.dumps({"text": "Mila slept", "annotations": [{**span, "label": "PER"}]}))
    assert read(str(path), "words").examples[0].tags == ("B-PER", "O")


@pytest.mark.parametrize("indent", [None, 1])
def test_parts_of_one_value_are_refused_with_the_remedy(save, indent):
    parts = {"train": [{"text": "a", "label": "x"}], "test": [{"text": "b", "label": "x"}]}
    with pytest.raises(DataError, match="are under train, test; write each part to its own file"):
        read(str(save("a.json", json.dumps(parts, indent=indent))))


KEYS = st.sampled_from(
    ["text", "label", "data", "columns", "index", "0", "1", "paragraphs", "qas", "answers", "tokens", "x"]
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(values=st.lists(ANY, min_size=1, max_size=3), indent=st.sampled_from([None, 1]))
@settings(max_examples=100)
def test_any_json_is_read_or_refused(tmp_path_factory, values, indent):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(json.dumps(value, indent=indent) for value in values) + "\n")
    for wants in ("label", "labels", "words", "text"):
        for again in (False, True):
            with contextlib.suppress(DataError):
                assert all(example.text for example in read(str(path), wants, again=again).examples)


def test_deep_nesting_is_refused(save):
    content = '{"a":' * 900 + "1" + "}" * 900
    for text in (content, content * 200, "[" * 100_000, '["' + "[" * 5000):
        with pytest.raises(DataError):
            read(str(save("a.json", text)))
