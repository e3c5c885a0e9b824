"""Tables: bytes that other readers lose rows on, against the csv, json and pyarrow libraries."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.documents import refusal

from lorakit.data.delimited import csv_rows, sound
from lorakit.data.read import read, read_texts
from lorakit.errors import DataError

# Defaults of pandas lose the texts named NA; `str.splitlines` cuts at U+2028; a fresh csv module refuses long fields.
NASTY = ["NA", "null", "None", "nan", "a,b", 'say "hi"', "two\nlines", "\ntwo\r\nmore", " 'x' ", "\u2028x", "é", "012"]
NASTY += ["y" * 10**6]


def records(path: Path) -> list[tuple[str, object]]:
    return [(example.text, example.label) for example in read(str(path)).examples]


def as_csv(rows: Iterable[Sequence[str]], newline: str = "\r\n", quoting: int = csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=newline, quoting=quoting)
    writer.writerows([("text", "label"), *rows])
    return out.getvalue()


def as_jsonl(rows: Iterable[Sequence[str]], ascii_only: bool = True) -> str:
    return "".join(json.dumps({"text": t, "label": l}, ensure_ascii=ascii_only) + "\n" for t, l in rows)


@pytest.mark.parametrize(
    ("newline", "quoting", "bom"),
    [
        ("\n", csv.QUOTE_MINIMAL, "\ufeff"),
        ("\n", csv.QUOTE_ALL, ""),
        ("\r\n", csv.QUOTE_MINIMAL, ""),
        ("\r\n", csv.QUOTE_ALL, "\ufeff"),
        ("\r", csv.QUOTE_ALL, "\ufeff"),  # csv.writer leaves \n bare where it ends no line
    ],
    ids=repr,
)
def test_csv_keeps_every_text_in_order(save, newline, quoting, bom):
    rows = [(text, str(i)) for i, text in enumerate(NASTY)]
    content = bom + as_csv(rows, newline, quoting)
    for each in (content, content.removesuffix(newline)):
        assert records(save("a.csv", each)) == rows


def test_limit_of_the_csv_module_is_put_back(save):
    before = 131_072  # characters, of a fresh csv module
    csv.field_size_limit(before)
    for content in ("text,label\na,b\n", "text,label\na\n"):
        with suppress(DataError):
            read(str(save("a.csv", content)))
        assert csv.field_size_limit() == before


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_tsv_knows_no_quotes(save, newline):
    for text in ('"', '"a', 'a "b" c', '"a" b', "'", "a,b", "\\", "a ", "\u2028x", "NA", "y" * 10**6):
        rows = [(text, "1"), ("next", "2")]
        lines = ["text\tlabel", *("\t".join(row) for row in rows), ""]
        assert records(save("a.tsv", newline.join(lines))) == rows


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("ending", ["jsonl", "ndjson"])
def test_jsonl_keeps_every_text_in_order(save, ending, ascii_only):
    rows = [(text, str(i)) for i, text in enumerate([*NASTY, "a\u2028b", "a\x85b", "a\x0bb", "\U0001f600"])]
    assert records(save(f"a.{ending}", as_jsonl(rows, ascii_only))) == rows


@pytest.mark.parametrize(
    "content",
    ['{"text": "a", "label": 1}\r\n\r\n{"text": "b", "label": -1}', "\ufeff" + as_jsonl([("a", "1"), ("b", "-1")])],
)
def test_jsonl_takes_whole_numbers_blank_lines_and_carriage_returns(save, content):
    assert records(save("a.jsonl", content)) == [("a", "1"), ("b", "-1")]


@pytest.mark.parametrize(
    ("gap", "newline"), [(" ", "\n"), ("\t", "\r\n"), ("  ", "\r")], ids=["space", "tab", "spaces"]
)
def test_label_first_lines_are_split_at_the_first_gap(save, newline, gap):
    rows = [("a fine film", "1"), ('"dull" , and long', "0"), ("a\u00a0b c", "1")]
    path = save("a.txt", newline.join([*(f"{label}{gap}{text}" for text, label in rows), ""]))
    assert [(e.text, e.label) for e in read(str(path), format="label-first").examples] == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL], ids=["minimal", "all"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_csv_rows_know_their_first_line(save, newline, quoting):
    texts = ["a", "b\nc", "d", "e\n\n\nf", "g"]
    path = save("a.csv", as_csv([(text, "x") for text in texts], newline, quoting))
    begins = accumulate((text.count("\n") + 1 for text in texts), initial=2)
    assert [example.where for example in read(str(path)).examples] == [
        f"{path}:{begin}" for begin, _ in zip(begins, texts, strict=False)
    ]


def test_blank_lines_are_skipped_but_counted(save):
    for blank in ("", "\n", "\n\n"):
        path = save("a.csv", f"{blank}text,label\n{blank}a,b\n")
        (example,) = read(str(path)).examples
        assert (example.text, example.where) == ("a", f"{path}:{2 * len(blank) + 2}")
    for name, content in (("a.jsonl", "\n" + as_jsonl([("a", "1")])), ("a.txt", "\n1 a\n")):
        path = save(name, content)
        examples = read(str(path), format="label-first" if name == "a.txt" else "auto").examples
        assert [example.where for example in examples] == [f"{path}:2"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(
    ("before", "lines", "bad"),
    [
        ([], 0, "lonely"),
        (["a,b"], 1, "one,too,many"),
        (['"two\nlines",b'], 2, '"x,y"'),
        (['"a ""quoted""\r\nline\n",b', "c,d"], 4, "lonely"),
    ],
    ids=["first", "second", "after a newline", "after more"],
)
def test_csv_row_of_another_length_is_refused_with_its_line(save, before, lines, bad, newline):
    path = save("a.csv", newline.join(["text,label", *before, bad, "c,d", ""]))
    message = f"{len(next(csv.reader([bad])))} columns, the header has 2: text, label"
    with pytest.raises(DataError, match=refusal(f"{path}:{lines + 2}", message)):
        read(str(path))


def test_pair_of_surrogates_is_a_character(save):
    assert records(save("a.jsonl", r'{"text": "\ud83d\ude00", "label": "b"}')) == [("\U0001f600", "b")]


@pytest.mark.parametrize(("newline", "end"), [("\n", True), ("\r\n", False), ("\r", True)], ids=["lf", "crlf", "cr"])
def test_texts_of_a_txt_file_are_its_lines(save, newline, end):
    texts = ["first", " second, \u2028 still ", "NA"]
    path = save("a.txt", newline.join(texts) + newline * end)
    assert [example.text for example in read_texts(path).examples] == texts


def test_empty_line_of_a_txt_file_is_refused_with_its_number(save):
    path = save("a.txt", "first\n \nthird\n")
    with pytest.raises(DataError, match=refusal(f"{path}:2", "the line is empty")):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text\nfirst\n"second, and more"\n'),
        ("a.tsv", "id\tsentence\n1\tfirst\n2\tsecond, and more\n"),
        ("a.jsonl", '{"text": "first"}\n{"text": "second, and more", "label": null}\n'),
        ("a.conll", "first\tO\n\nsecond,\tO\nand\tO\nmore\tO\n"),
    ],
)
def test_texts_of_a_table_need_no_label(save, name, content):
    assert [example.text for example in read_texts(save(name, content)).examples] == ["first", "second, and more"]


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
LABELS = st.text(CHARACTERS, min_size=1, max_size=5).map(str.strip).filter(bool)
FILLED = st.text(CHARACTERS, min_size=1, max_size=12).filter(str.strip)
ROWS = st.lists(st.tuples(FILLED, LABELS), min_size=1, max_size=5)
ONE_LINE = CHARACTERS.filter(lambda character: character not in "\t\r\n")
TSV_ROWS = st.lists(
    st.tuples(
        st.text(ONE_LINE, min_size=1, max_size=12).filter(str.strip),
        st.text(ONE_LINE, min_size=1, max_size=5).map(str.strip).filter(bool),
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


STRICT = pa.csv.ConvertOptions(strings_can_be_null=False, column_types={"text": pa.string(), "label": pa.string()})


@given(rows=ROWS, newline=st.sampled_from(["\n", "\r\n", "\r"]))
def test_csv_is_what_was_written_and_read_as_strict_pyarrow_and_pandas_read_it(folder, rows, newline):
    path = folder / "b.csv"
    path.write_bytes(as_csv(rows, newline, csv.QUOTE_ALL).encode())
    assert records(path) == rows
    if newline == "\r":
        return  # which pyarrow does not know
    quoted = pa.csv.ParseOptions(newlines_in_values=True)
    table = pa.csv.read_csv(path, parse_options=quoted, convert_options=STRICT)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    found = [tuple(row.values.values()) for row in sound(csv_rows(path))]
    assert found == [tuple(row.values()) for row in table.to_pylist()] == list(frame.itertuples(index=False, name=None))


@given(rows=TSV_ROWS, newline=st.sampled_from(["\n", "\r\n", "\r"]))
def test_tsv_is_what_was_written_and_read_as_strict_pyarrow_and_pandas_read_it(folder, rows, newline):
    path = folder / "b.tsv"
    path.write_bytes(newline.join(["text\tlabel", *("\t".join(row) for row in rows), ""]).encode())
    kept = read(str(path), format="tsv").examples  # which keeps quotes that all fields have
    assert [(example.text, example.label) for example in kept] == rows
    if newline != "\n":
        return
    plain = pa.csv.ParseOptions(delimiter="\t", quote_char=False)
    table = pa.csv.read_csv(path, parse_options=plain, convert_options=STRICT)
    frame = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    found = [tuple(row.values.values()) for row in sound(csv_rows(path, kind="tsv", by_name=False))]
    assert found == [tuple(row.values()) for row in table.to_pylist()] == list(frame.itertuples(index=False, name=None))


@given(rows=ROWS, ascii_only=st.booleans())
def test_reading_jsonl_gives_back_what_was_written(folder, rows, ascii_only):
    path = folder / "a.jsonl"
    path.write_bytes(as_jsonl(rows, ascii_only).encode())
    assert records(path) == rows
