"""How tables and lines are written: delimiters, quotes, headers, encodings, compressions, and one way of cutting a file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from lorakit.data.example import Columns
from lorakit.data.read import holds_words, read, read_texts
from lorakit.data.streaming import stream
from lorakit.errors import DataError
from lorakit.recipe import known_keys

ROWS = [("fine, really; or | not", "good"), ('she said "no"', "bad"), ("two\nlines", "good"), ("tab\there", "bad")]


def records(path: Path, columns: Columns = Columns()) -> list[tuple[str, str]]:
    return [(example.text, example.label) for example in read(str(path), columns=columns).examples]


def written(delimiter: str, quoting: int = csv.QUOTE_MINIMAL, header: bool = True) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting).writerows([("text", "label")] * header + ROWS)
    return out.getvalue()


def refuses(path: Path, message: str, columns: Columns = Columns(), format: str = "auto") -> None:
    with pytest.raises(DataError, match="^" + re.escape(f"{path}{message}")):
        read(str(path), columns=columns, format=format)


# Delimiters


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize(("delimiter", "name"), [(",", "comma"), (";", "semicolon"), ("\t", "tab"), ("|", "bar")])
def test_delimiter_is_that_of_the_content_and_noted(save, delimiter, name, quoting):
    for ending, usual in (("csv", ","), ("tsv", "\t"), ("txt", ",\t")):
        path = save(f"a.{ending}", written(delimiter, quoting))
        assert records(path) == ROWS
        note = f"{path}: fields are separated by {name} ({delimiter!r})"
        assert (note in read(str(path)).notes) == (delimiter not in usual)


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "sep=;\r"])
def test_line_of_excel_names_the_delimiter(save, line):
    path = save("a.csv", f"{line}\ntext;label\na,b;x\n")
    assert records(path) == [("a,b", "x")]
    assert read(str(path)).examples[0].where == f"{path}:3"


@pytest.mark.parametrize(
    ("content", "columns", "rows"),
    [
        ("text~label\na,b;c|d~x\n", Columns(delimiter="~"), [("a,b;c|d", "x")]),
        ("text;x,label\na;b,c\n", Columns(delimiter=";", text="text", label="x,label"), [("a", "b,c")]),
        ("text;label (a|b)\none;a\ntwo;b\n", Columns(label="label (a|b)"), [("one", "a"), ("two", "b")]),
    ],
    ids=["named", "between two", "not in every record"],
)
def test_delimiter_is_the_one_named_or_that_of_all_records(save, content, columns, rows):
    assert records(save("a.csv", content), columns) == rows


# Quotes between tabs


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_quoted_fields_between_tabs_are_read_as_pandas_writes_them(tmp_path, quoting):
    path = tmp_path / "a.tsv"
    pd.DataFrame(ROWS, columns=["text", "label"]).to_csv(path, sep="\t", index=False, quoting=quoting)
    assert records(path) == ROWS
    assert any("are in quotes, which are removed" in note for note in read(str(path)).notes)


@pytest.mark.parametrize("texts", [['"a" b', '"c"'], ['"c"', "d"], ['"', "d"], ['""', '"c" d "e"']])
def test_quotes_that_nothing_asked_for_are_text(save, texts):
    path = save("a.tsv", "text\tlabel\n" + "".join(f"{text}\tx\n" for text in texts))
    assert [text for text, _ in records(path)] == texts


def test_asked_format_says_how_quotes_are_read(save):
    path = save("a.tsv", 'text\tlabel\n"a"\tx\n"b ""c"""\ty\nd\tx\n')
    notes = read(str(path)).notes
    assert f"{path}: some fields are in quotes, which are kept as text; data.format=csv removes them" in notes
    as_csv = read(str(path), columns=Columns(delimiter="\t"), format="csv")
    assert [example.text for example in as_csv.examples] == ["a", 'b "c"', "d"]
    assert read(str(path), format="tsv").examples[0].text == '"a"'


# Headers


HEADLESS = '"1","Headline 0","Body 0"\n"2","Headline 1","Body 1"\n"1","Headline 2","Body 2"\n'


def test_table_without_a_header_loses_no_row(save):
    path = save("a.csv", HEADLESS)
    assert records(path, Columns(header=False, text="2", label="1")) == [(f"Headline {i}", "121"[i]) for i in range(3)]
    assert read(str(path), columns=Columns(header=False, text="3", label="1")).examples[0].where == f"{path}:1"
    assert len(records(path, Columns(text="Headline 0", label="1", header=True))) == 2


def test_columns_without_a_name_may_be_several(save):
    assert records(save("a.csv", 'text,label,,,\nham,good,,,\n"a, b",bad,,x,\n')) == [("ham", "good"), ("a, b", "bad")]


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("ham,wins \u00a3100\nspam,caf\u00e9\n", "cp1252", None),
        ("of,caf\u2019s\n", "cp1252", None),
        ("\u015bniadanie, \u017ale si\u0119 czuj\u0119, ju\u017c \u015bpi\u0119\n" * 5, "cp1250", "cp1250"),
        (
            "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, \u0444\u0438\u043b\u044c\u043c\n" * 5,
            "cp1251",
            "cp1251",
        ),
    ],
)
def test_no_other_code_page_is_suggested_where_the_common_one_is_as_likely(save, text, encoding, guess):
    with pytest.raises(DataError, match=r"data\.encoding=cp1252") as caught:
        read(str(save("a.csv", ("text,label\n" + text).encode(encoding))))
    assert str(caught.value).partition("it looks like ")[2] == (guess or "")


# Encodings


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\n{},x\n"),
        ("a.tsv", "text\tlabel\n{}\tx\n"),
        ("a.jsonl", '{{"text": "{}", "label": "x"}}\n'),
        ("a.conll", "{} B-X\n"),
    ],
)
def test_encoding_of_the_recipe_is_read_and_noted(save, name, content):
    for encoding in ("cp1252", "latin-1", "utf-16", "cp1251", "gb18030"):
        word = {"cp1251": "зима", "gb18030": "冬天"}.get(encoding, "café")
        path = save(name, content.format(word).encode(encoding))
        dataset = read(str(path), "words" if name == "a.conll" else "label", columns=Columns(encoding=encoding))
        assert dataset.examples[0].text == word
        assert any(note.startswith(f"{path}: read as {encoding}") for note in dataset.notes)


def test_name_that_no_file_can_have_is_refused():
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read("a" * 5000 + ".csv")


@pytest.mark.parametrize("head", ["", "x" * 20000 + "\n\r"])
def test_byte_of_another_encoding_is_told_with_its_place(save, head):
    path = save("a.txt", head.encode() + b"one\r\ncaf\xe9\n")
    position, line = len(head) + 8, head.count("\n") + head.count("\r") + 2
    with pytest.raises(DataError, match=re.escape(f"{path}:{line}: byte {position} (0xe9) is not valid UTF-8")):
        read_texts(path)


# Compressions


def zipped(data: bytes, *names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names or ("a.csv",):
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.csv.gz", gzip.compress), ("a.csv.bz2", bz2.compress), ("a.csv.xz", lzma.compress), ("any.zip", zipped)],
)
def test_compressed_tables_are_read(save, name, pack):
    path = save(name, pack(written(";").encode()))
    assert records(path) == ROWS
    assert [row.values["text"] for row in stream(path)] == [text for text, _ in ROWS]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv.gz", b"text,label\n", ": cannot be read: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"text,label\n" * 999)[:40], ": damaged: "),
        ("a.csv.bz2", bz2.compress(b"text,label\n" * 999)[:40], ": damaged: "),
        ("a.zip", b"text,label\n", ": damaged: File is not a zip file"),
        ("a.zip", zipped(b"x", "a.csv", "b.csv"), ": 2 files in the archive: a.csv, b.csv; unpack it and give the one"),
        ("a.csv.gz", gzip.compress(b"a,b\n" * 2_000_000), ": unpacks to more than 50 times its size"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), ": a compressed parquet file cannot be read; unpack it first"),
        ("a.csv", gzip.compress(b"text,label\n"), ": not text but gzip data, whose name ends in .gz"),
        ("a.csv", zipped(b"x"), ": not text but a zip archive or an Excel workbook"),
        ("a.csv", b"PAR1....", ": not text but Parquet"),
    ],
    ids=[str(i) for i in range(10)],  # gzip writes the time, which two processes of the tests would name differently
)
def test_damaged_and_disguised_files_are_refused(save, name, data, message):
    refuses(save(name, data), message)


# One way of cutting a file into rows


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv"])
def test_mixed_line_ends_give_the_same_rows_to_both_readers(save, name):
    for content in ("one\rtwo\r\nthree\n", "one\ntwo\rthree", "one\r\ntwo\nthree\r"):
        path = save(name, content if name == "a.txt" else "text\n" + content)
        held = [example.text for example in read_texts(path).examples]
        assert held == [row.values["text"] for row in stream(path)] == ["one", "two", "three"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("shape", ["lines", "array"])
def test_records_of_json_are_the_same_to_both_readers(save, shape, end):
    one, two = '{"text": "a\u2028b"}', '{"text": "c"}'
    path = save("a.jsonl", f"{one}{end}{two}{end}" if shape == "lines" else f"[{one},{end}{two}]{end}")
    held = [example.text for example in read_texts(path).examples]
    assert held == [row.values["text"] for row in stream(path)] == ["a\u2028b", "c"]


# What is not a file of rows


def test_pipes_and_devices_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    os.mkfifo(path)
    refuses(path, ": not a regular file but a pipe or a device; write its content to a file first")
    with pytest.raises(DataError, match="not a regular file"):
        list(stream(path))
    refuses(Path("/dev/zero"), ": not a regular file but a pipe or a device", format="csv")


def test_messages_stay_short_however_long_names_and_values_are(save):
    wide = ",".join(f"column{i}" for i in range(5000))
    for path in (
        save("a.csv", wide + "\n1\n"),
        save("b.csv", wide + "\n" + "1," * 4999 + "1\n"),
        save("c.csv", f"text,label\n{'x' * 100_000},\n"),
        save("d.csv", f"{'x' * 100_000},label\n1,2\n"),
        save("e.jsonl", '{"text": "a", "label": [' + "1," * 100_000 + "1]}"),
    ):
        with pytest.raises(DataError) as err:
            read(str(path))
        assert len(str(err.value)) < len(str(path)) + 1000


# A row a word


@pytest.mark.parametrize("asked", [Columns(), Columns(text="Word"), Columns(text="Word", label="Tag")])
def test_rows_of_words_are_grouped_to_sentences(save, asked):
    path = save("a.csv", "Sentence #,Word,POS,Tag\nSentence: 1,Ada,N,B-per\n,left,V,O\nSentence: 2,Oslo,N,B-geo\n")
    assert holds_words(str(path), asked)
    dataset = read(str(path), "words", columns=asked)
    assert [(e.words, e.tags) for e in dataset.examples] == [(("Ada", "left"), ("B-per", "O")), (("Oslo",), ("B-geo",))]
    assert [example.where for example in dataset.examples] == [f"{path}:2", f"{path}:4"]
    assert (
        dataset.notes[0] == f"{path}: each row is a word: words are column 'Word', tags 'Tag', sentences 'Sentence #'"
    )
    assert not any("'tokens'" in note for note in dataset.notes)  # of which the file has no column


# The table in the documents

TABLE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FORMS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.partition("| form | file |")[2].partition("\n\n")[0].splitlines()[2:]
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form[0])
def test_forms_of_the_documents_are_told_as_they_say(tmp_path, form):
    _, names, examples, said, key = form
    files = re.findall("`([^`]+)`", names)
    for name, content in zip(files, re.findall("`([^`]+)`", examples), strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace("⏎", "\n").replace("⇥", "\t") + "\n", newline="")
    source = str(tmp_path / files[0].split("/")[0])
    wants = (
        "words"
        if holds_words(source)
        else "labels"
        if "__label__" in examples
        else "number"
        if "3,5" in examples
        else "label"
    )
    assert f"{source}: {said}" in read(source, wants).notes
    assert key.strip("`") in known_keys()
