"""Data files and recipes that are made to break a reader; run as a program it checks each and prints how it went.

`python -m tests.data.hostile FOLDER` writes them into a folder, runs `lorakit check` on each in a process of its own, and prints
a line of JSON for each: its name, exit code, CPU seconds, the most memory in MB, and the message.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MB = 2**20
OPEN = "[" * 100_000


def zipped(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def encrypted() -> bytes:
    data = bytearray(zipped(("a.csv", b"text,label\na,b\n")))
    for at in (6, data.index(b"PK\1\2") + 8):  # the flag of an encrypted member, in both headers
        data[at] |= 1
    return bytes(data)


def tables() -> Iterator[tuple[str, bytes]]:
    head = b"text,label\n"
    yield "empty.csv", b""
    yield "blank.csv", b" \n\r\n\t\n"
    yield "nul.csv", b"\0" * MB
    yield "nul_in_cell.csv", head + b"a\0b,x\n"
    yield "random.csv", bytes(range(256)) * 4096
    yield "a_million_columns.csv", b",".join(b"c%d" % i for i in range(10**6)) + b"\n1\n"
    yield "a_million_equal_columns.csv", b"c," * 10**6 + b"c\n1\n"
    yield "nine_thousand_columns.csv", b",".join(b"c%d" % i for i in range(9000)) + b"\n1\n"
    yield "a_million_commas_in_a_row.csv", head + b"," * 10**6 + b"\n"
    yield "open_quote.csv", head + b'"' + b"a,b\n" * 500_000
    yield "quotes_alone.csv", b'"' * 3 * MB
    yield "quotes_alone.tsv", b'"\t' * MB
    yield "one_line.csv", b"a" * 40 * MB
    yield "one_line.txt", b"a " * 20 * MB
    yield "one_line_of_commas.txt", b"," * 20 * MB
    yield "a_cell_of_20_mb.csv", head + b'"' + b"a" * 20 * MB + b'",x\n'
    yield "long_name.csv", b"a" * MB + b",label\n1,2\n"
    yield "long_label.csv", head + b"a," + b"x" * MB + b"\nb,y\n"
    yield "a_label_each.csv", head + b"".join(b"text %d,label %d\n" % (i, i) for i in range(30_000))
    yield "utf16.csv", "text,label\na,b\n".encode("utf-16")
    yield "utf32.csv", "text,label\na,b\n".encode("utf-32")
    yield "half_a_character.csv", head + "é,x\n".encode()[:1]
    yield "surrogate.csv", head + b"\xed\xa0\x80,x\n"
    yield "overlong.csv", head + b"\xc0\xaf,x\n"
    yield "escape.csv", head + b"\x1b]0;owned\x07,\x1b[31mred\n" * 30
    yield "sep_alone.csv", b"sep=;"
    yield "sep_of_a_quote.csv", b'sep="\ntext"label\na"b\n'
    yield "sep_of_a_line_end.csv", b"sep=\n\ntext\nlabel\n"
    yield "header_alone.csv", head
    yield "no_names.csv", b",,,\n1,2,3,4\n"
    yield "formula.csv", head + b"=cmd|' /C calc'!A0,x\n" * 30
    yield "carriage_returns.csv", b"\r" * MB
    yield "lines.csv", b"\n" * 5 * MB
    yield "marks.csv", b"\xef\xbb\xbf" * 1000
    yield "rows.tsv", b"text\tlabel\n" + b'"a\tb\n' * 100_000


def records() -> Iterator[tuple[str, bytes]]:
    yield "open_brackets.json", OPEN.encode()
    yield "open_brackets.jsonl", OPEN.encode()
    yield "open_braces.jsonl", b'{"a":' * 100_000
    yield "deep.jsonl", b'{"text": "a", "label": ' + OPEN.encode() + b"]" * 100_000 + b"}"
    yield "big_number.jsonl", b'{"text": "a", "label": ' + b"9" * 100_000 + b"}"
    yield "exponent.jsonl", b'{"text": "a", "label": 1e999999}'
    yield "nan.jsonl", b'{"text": "a", "label": NaN}'
    yield "many_keys.jsonl", b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}"
    yield "a_key_twice.jsonl", b'{"text": "a", "text": "b"}'
    yield "surrogate.jsonl", b'{"text": "\\ud800", "label": "x"}'
    yield "null.jsonl", b"null\n" * 1000
    yield "numbers.json", b"[" + b"1," * 10**6 + b"1]"
    yield "lists.jsonl", b"[[[]]]\n" * 1000
    yield "labels.jsonl", b'{"text": "a", "label": [' + b'"x",' * 300_000 + b'"x"]}'
    yield "tags_of_numbers.jsonl", b'{"tokens": ["a"], "ner_tags": [1]}'
    yield "spans_outside.jsonl", b'{"text": "a", "label": [[-5, 99999999999999999999, "X"]]}' * 1
    yield "half.json", b'[{"text": "a"'
    yield "html.json", b"<!doctype html><html>" * 1000


def tagged() -> Iterator[tuple[str, bytes]]:
    yield "one_sentence.conll", b"word O\n" * 200_000
    yield "no_tags.conll", b"word word word\n" * 1000
    yield "tags_alone.conll", b"O O O O\n" * 1000
    yield "comments_alone.conll", b"# a\n" * 100_000
    yield "a_thousand_columns.conll", b"a " * 1000 + b"O\n" + b"b " * 1000 + b"O\n"
    yield "ragged.conll", b"a O\nb\nc O O\n" * 1000
    yield "docstarts.conll", b"-DOCSTART- O\n" * 100_000
    yield "labels_alone.txt", b"__label__a\n" * 1000
    yield "marks_alone.txt", b"__label__ " * 100_000


def packed() -> Iterator[tuple[str, bytes]]:
    zeros, rows = b"\0" * 60 * MB, b"a,b\n" * 16 * MB
    yield "zeros.csv.gz", gzip.compress(zeros, 1)
    yield "rows.csv.gz", gzip.compress(rows, 9)
    yield "rows.csv.bz2", bz2.compress(rows[: 16 * MB])
    yield "rows.csv.xz", lzma.compress(rows, preset=0)
    yield "rows.zip", zipped(("a.csv", rows))
    yield "rows.jsonl.gz", gzip.compress(b"{}\n" * 20 * MB, 9)
    yield "array.json.gz", gzip.compress(b"[" + b"1," * 20 * MB, 9)
    yield "rows.conll.gz", gzip.compress(b"a O\n" * 16 * MB, 9)
    yield "no_gzip.csv.gz", b"text,label\n"
    yield "half.csv.gz", gzip.compress(os.urandom(100_000))[:50_000]
    yield "trailing.csv.gz", gzip.compress(b"text,label\na,b\n") + b"garbage"
    yield "encrypted.zip", encrypted()
    yield "empty.zip", zipped()
    yield "above.zip", zipped(("../../../a.csv", b"text,label\na,b\n"))
    yield "zip_in_zip.zip", zipped(("a.zip", zipped(("a.csv", b"text,label\n"))))
    yield "many.zip", zipped(*((f"{i}.csv", b"a") for i in range(5000)))
    yield "rows.xlsx", zipped(("xl/workbook.xml", b" " * 60 * MB))
    yield "no_workbook.xlsx", b"PK\3\4 no"
    yield "no_parquet.parquet", b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1"
    yield "half.parquet", b"PAR1" + b"\0" * 100
    yield "no_arrow.arrow", b"ARROW1\0\0" + struct.pack("<i", 2**30) * 100
    yield "no_docbin.spacy", b"x\x9c" + os.urandom(1000)


def recipes(data: Path) -> Iterator[tuple[str, bytes]]:
    def recipe(lines: str) -> bytes:
        return f'[model]\nbase = ""\n[data]\ntrain = {str(data)!r}\n{lines}\n'.encode()

    yield "delimiter_of_two.toml", recipe('delimiter = ";;"')
    yield "delimiter_of_a_line_end.toml", recipe('delimiter = "\\n"')
    yield "delimiter_of_a_quote.toml", recipe("delimiter = '\"'")
    yield "encoding_unknown.toml", recipe('encoding = "utf-9"')
    yield "encoding_of_bytes.toml", recipe('encoding = "base64"')
    yield "encoding_of_names.toml", recipe('encoding = "idna"')
    yield "encoding_with_nul.toml", recipe('encoding = "a\\u0000b"')
    yield "columns_of_zero.toml", recipe("columns = {word = 0}")
    yield "columns_of_millions.toml", recipe("columns = {tag = 999999999999999999999999}")
    yield "columns_of_others.toml", recipe("columns = {nothing = 1}")
    yield "header_of_text.toml", recipe('header = "no"')
    yield "open_brackets.toml", ("a = " + OPEN).encode()
    yield "big_number.toml", recipe("max_length = " + "9" * 10_000)
    yield "no_toml.toml", b"\0" * 1000
    yield "long_name.toml", b"[data]\ntrain = '" + b"a" * 100_000 + b".csv'\n[model]\nbase = ''\n"
    yield "nul_name.toml", b'[data]\ntrain = "a\\u0000b.csv"\n[model]\nbase = ""\n'


def special(folder: Path) -> list[Path]:
    """What is no file, and links."""
    os.mkfifo(folder / "pipe.csv")
    (folder / "device.csv").symlink_to("/dev/zero")
    (folder / "loop.csv").symlink_to("loop.csv")
    (folder / "empty_folder").mkdir()
    (folder / "folder.csv").mkdir()
    deep = folder / "deep"
    deep.joinpath(*["d"] * 200).mkdir(parents=True)
    return [folder / name for name in ("pipe.csv", "device.csv", "loop.csv", "empty_folder", "folder.csv", "deep")]


def cases(folder: Path) -> Iterator[Path]:
    """Each file, written just before it is asked for and removed after."""
    for path in special(folder):
        yield path
    data = folder / "data.csv"
    data.write_text("text,label\n" + "a,x\nb,y\n" * 20)
    for made in (tables(), records(), tagged(), packed(), recipes(data)):
        for name, content in made:
            path = folder / name
            path.write_bytes(content)
            yield path
            path.unlink()


def checked(path: Path) -> dict[str, Any]:
    from lorakit.app.cli import main

    message, begun, code = io.StringIO(), time.process_time(), 0
    with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(["check", str(path)])
        except SystemExit as end:
            code = int(end.code or 0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "case": path.name,
        "code": code,
        "seconds": round(time.process_time() - begun, 2),
        "memory": memory,
        "message": message.getvalue().strip(),
    }


if __name__ == "__main__":
    import lorakit.app.commands.check  # noqa: F401 (before the forks, each of which checks one case)

    for path in cases(Path(sys.argv[1])):
        if (child := os.fork()) == 0:
            print(json.dumps(checked(path)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
