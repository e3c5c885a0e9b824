"""The files that cannot be read, for all readers of single files: the line that refuses each, and how it begins."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.data.conftest import Save

from lorakit.data.example import Columns, Wants
from lorakit.data.formats import FORMATS
from lorakit.data.read import read
from lorakit.errors import DataError


class Bad(NamedTuple):
    """A file that is refused, with a message that begins so behind the file's name."""

    name: str
    content: str | bytes
    message: str
    wants: Wants = "label"
    columns: Columns = Columns()
    format: str = "auto"


def table(texts: list[str], separator: str = ",", newline: str = "\n") -> str:
    return newline.join([f"text{separator}label", *(f"{text}{separator}x" for text in texts), ""])


def records(texts: list[str]) -> str:
    return "\n".join(f'{{"text": "{text}", "label": "x"}}' for text in texts)


ALL = ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.conll", "a.txt", "a.train")
TABLE, LINE = "text,label\na,x\n", '{"text": "a", "label": "x"}\n'
WORDS, TAGS = '{"tokens": ["a"], "ner_tags": ["O"]}\n', "Ada\tB-PER\nleft\tO\n\n"
LABELLED_LINES = "".join(f"{number % 2} text number {number}\n" for number in range(40))
LATIN_1 = "is not valid UTF-8; set the file's encoding, for example data.encoding=cp1252"
NUL, SURROGATE = "a NUL character, which text cannot have", "a lone surrogate escape such as \\ud800 is not text"
NOT_A_LABEL = "not a label (a text, a whole number, true or false)"
NEEDS_WORDS = (
    ": this task needs tagged words: CoNLL columns, records with the lists 'tokens' and 'ner_tags', or texts with "
    "'spans'; columns: text, label"
)
NO_TAG = (
    "is not a tag; expected O, or B- or I- and a type (E-, S-, L-, U- in IOBES and BILOU); if it is a type, write I-"
)
JUDGED = "Nr,Satz,Gut,Wer\n" + "".join(
    f"{i},Der Satz {i} klingt gut,{'ja' if i % 2 else 'nein'},{'AB'[i % 3 > 1]}\n" for i in range(20)
)
HEADLESS = '"1","Headline 0","Body 0"\n"2","Headline 1","Body 1"\n"1","Headline 2","Body 2"\n'
BAD = [
    # bytes
    *(Bad(name, "x,y\na,b\ncafé,x\n".encode("latin-1"), f":3: byte 11 (0xe9) {LATIN_1}") for name in ALL),
    *(Bad(name, table(["a", "b\0c"]), f":3: {NUL}") for name in ALL if "json" not in name),
    *(Bad(n, table(["a"]).encode("utf-16"), ":1: the file is UTF-16; set data.encoding=utf-16") for n in ALL[:4:3]),
    *(Bad(n, table(["a"]).encode("utf-16-be"), f":1: {NUL}") for n in ALL[:4:3]),
    *(Bad(name, b"\xef\xbb\xbf\r\n", ": the file is empty") for name in ALL if name != "a.json"),
    *(Bad("a.csv", content, ": the file is empty") for content in (b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf")),
    # delimited tables
    Bad("a.csv", table(["a", "b,c"]), ":3: 3 columns, the header has 2: text, label"),
    Bad("a.csv", TABLE + "b\n", ":3: 1 columns, the header has 2: text, label"),
    Bad("a.csv", 'text,label\n"a\n\nb",x\nb\n', ":5: 1 columns, the header has 2: text, label"),
    Bad("a.tsv", 'text\tlabel\n"a\tb\nlonely\n', ":3: 1 columns, the header has 2: text, label"),
    Bad("a.csv", "My export\ntext,label\n", ":2: 2 columns, the header has 1: My export; remove the lines above the h"),
    Bad("a.csv", table(["a", '"b', "c"]), ":3: not valid CSV: unexpected end of data"),
    Bad("a.csv", table(['"a\nb"', '"b"c']), ":4: not valid CSV: ',' expected after '\"'"),
    Bad("a.csv", "text,label,text\na,b,c\n", ":1: a column name appears twice in the header: text, label, text"),
    Bad("a.csv", "good,good\na,b\n", ":1: a column name appears twice in the header: good, good; if the first line"),
    Bad("a.csv", "text,label\n", ": a header but no record"),
    Bad("a.tsv", "text\tlabel\n", ": a header but no record"),
    Bad("a.csv", TABLE + ",x", ":3: column 'text' is empty"),
    Bad("a.csv", TABLE + '" \n ",x', ":3: column 'text' is empty"),
    Bad("a.csv", TABLE + "a,", ":3: column 'label' is empty"),
    Bad("a.csv", TABLE + "a, ", ":3: column 'label' is empty"),
    Bad("a.csv", "a," * 20_000 + "b\n", ":1: 20,001 columns; a table can have at most 10,000"),
    Bad("a.csv", "text;x,label\na;b,c\n", ": the fields could be separated by comma (',') (2 columns) or semicolon"),
    Bad("a.tsv", 'text\tlabel\n"a\tx\nb"\ty\n', ": if quotes enclose fields, 2 lines of 2 columns or, if they are"),
    Bad("a.csv", HEADLESS, ": which column is the text? Set data.text=NAME; columns: 1, Headline 0, Body 0; if the fi"),
    Bad(
        *(
            "a.csv",
            HEADLESS,
            ": the label column '1' has the same name as one of its labels; if the first line is a record, set",
        ),
        columns=Columns(text="Headline 0", label="1"),
    ),
    Bad(
        "a.csv", "words,labels\nAda,B-X\n", ": each row is a word, but no column says which sentence it is in", "words"
    ),
    Bad(
        "a.csv",
        "sentence_id,words,labels\n1,a,O\n2,b,B-X\n1,c,O\n",
        ":4: sentence '1' continues after another",
        "words",
    ),
    Bad("a.csv", "tokens,ner_tags\n\"['Ada', 'left']\",\"[1, 0]\"\n", ":2: column 'ner_tags' has numbers", "words"),
    # columns and formats
    Bad(
        "a.csv", "words here,label\na,b\n", ": which column is the text? Set data.text=NAME; columns: words here, label"
    ),
    Bad("a.csv", "text,verdict\na,b\n", ": which column is the label? Set data.label=NAME; columns: text, verdict"),
    Bad(
        "a.csv",
        JUDGED,
        ": which column is the text? Set data.text=NAME; columns: Nr, Satz, Gut, Wer; probably data.text=Satz",
    ),
    Bad(
        "a.csv",
        JUDGED.replace("Satz", "text"),
        ": which column is the label? Set data.label=NAME; columns: Nr, text, Gut, Wer; probably data.label=Gut or data",
    ),
    *(
        Bad(
            "a.csv",
            TABLE,
            f": data.{role} = 'lable' is not a column; did you mean 'label'?",
            columns=Columns(**{role: "lable"}),
        )
        for role in ("text", "pair", "label", "group")
    ),
    Bad(
        "a.csv",
        "text,label,user\na,x,7\nb,y,\n",
        ":3: column 'user' holds '', not the na",
        columns=Columns(group="user"),
    ),
    *(
        Bad("a.csv", TABLE, f": data.encoding = {name!r} is not a known encoding", columns=Columns(encoding=name))
        for name in ("utf-9", "base64", "a\0b")
    ),
    Bad("a.csv", TABLE, ": format = 'prodgy' is not known; did you mean 'prodigy'?", format="prodgy"),
    Bad("a.data", "one line\nanother line\n", ": the format cannot be guessed from its name or first lines"),
    Bad("a.csv", TABLE, NEEDS_WORDS, "words"),
    # lines
    Bad("a.txt", LABELLED_LINES + "1\n", ":41: column 'text' is empty"),
    # records of JSON
    *(
        Bad("a.jsonl", records(["a\u2028b"]) + "\n" + bad + "\n", f":2: {message}")
        for bad, message in (
            ('{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
            ("text", "not JSON: Expecting value at column 1"),
            ('["a", "b"]', "a list, not a JSON object"),
            ('"a"', "a str, not a JSON object"),
            ("null", "a NoneType, not a JSON object"),
            (records(["b\0c"]), NUL),
            (records(["b\\u0000"]), "column 'text' contains a NUL character"),
            (records(["b\\ud800"]), SURROGATE),
            (r'{"text": "a", "la\udc00bel": "b"}', SURROGATE),
            ('{"text": "a", "text": "b"}', "not JSON: the key 'text' appears twice in an object"),
            ('{"text": "b", "more": {"x": 1, "x": 1}}', "not JSON: the key 'x' appears twice in an object"),
            ('{"text": "a", "label": ' + "1" * 5000 + "}", "not JSON: "),
            ("[" * 100_000, "not JSON: "),
            ('{"label": "x"}', "column 'text' holds None, not a text"),
            ('{"text": 7, "label": "x"}', "column 'text' holds 7, not a text"),
            ('{"text": ["a"], "label": "x"}', "column 'text' holds ['a'], not a text"),
            ('{"text": "a"}', f"column 'label' holds None, {NOT_A_LABEL}"),
            ('{"text": "a", "label": NaN}', "column 'label' holds nan, not a label"),
            ('{"text": "a", "label": 4.5}', f"column 'label' holds 4.5, {NOT_A_LABEL}; for numbers, set"),
            (
                '{"text": "a", "label": ["x", "y"]}',
                "column 'label' holds 2 labels, ['x', 'y'], but this task needs one; for",
            ),
            ('{"text": "a", "label": []}', "column 'label' holds [], not a label"),
        )
    ),
    *(
        Bad(f"a.json{'l' * (i % 2)}", content, message)  # whose first line is an array's, whatever the name
        for i, (content, message) in enumerate(
            (
                ("[\n" + records(["a\0"]) + "]", f":2: {NUL}"),
                ("[" + records(["b\\udfff"]) + "]", f":1, record 1: {SURROGATE}"),
                ('[{"text": "a"},\n {"text": "b"', ":2: not JSON: Expecting ',' delimiter at column 14"),
                (
                    '[{"text": "a"}\n\n {"text": "b"}]',
                    ":3: not JSON: expected a comma or the cl",
                ),
                ('[{"text": "a"},\n]', ":2: not JSON: Expecting value at column 1"),
                ('[{"text": "a"}', ":1: not JSON: expected a comma or the closing"),
                ('[{"text": "a"}]\n{"text": "b"}', ":1: not JSON: expected a comma or the closing"),
                ("[", ":1: not JSON: Expecting value"),
                ('[{"text": "a"},\n"b"]', ":2, record 2: a str, not a JSON object"),
                ('[{"text": "a"},\n["b"]]', ":2, record 2: a list, not a JSON object"),
                ('[{"text": "a"},\n{"text": ' + "1" * 5000 + "}]", ":2: not JSON: "),
                ('[{"text": "a"},\n' + "[" * 100_000, ":2: not JSON: "),
                (
                    '[{"text": "a"},\n{"text": "b", "text": "c"}]',
                    ":2: not JSON: the key 'text' appears twice in an object",
                ),
                ("[]", ": no record"),
                ("[ \n ]", ": no record"),
            )
        )
    ),
    Bad("a.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}', ":3: an object over several lines, and more after it; write"),
    Bad("a.json", '[["a", "x"], ["b", "y"]]', ':1, record 1: a list, not a JSON object; write {"text": ..., "label":'),
    Bad("a.json", '[\n["a", "x"]\n]', ':2, record 1: a list, not a JSON object; write {"text": ..., "label": ...}'),
    # tagged words
    *(
        Bad("a.conll", TAGS.replace("\n", newline) + bad, f":4: {message}", "words", format="conll")
        for newline, bad, message in (
            ("\n", "lonely", "1 column; the lines before have 2"),
            ("\r\n", "lonely", "1 column; the lines before have 2"),
            ("\r", "one\ttoo\tO", "3 columns; the lines before have 2"),
            ("\n", "word\tPER", f"'PER' {NO_TAG}PER"),
            ("\n", "word\tX", "'X' is not a tag"),
            ("\r", "word\tB-", "'B-' is not a tag"),
            ("\n", "\tO", "the word is empty"),
            ("\r\n", "word\t", "1 column; the lines before have 2"),
        )
    ),
    Bad("a.conll", "\nO", ":2: 1 column; a word and its tag are expected", "words"),
    Bad("a.conll", "-DOCSTART- -X- O O\n\n", ": no sentence in the file", "words"),
    Bad("a.conll", "Ada\tB-PER\n# a comment\nleft\tO\n", ":2: 3 columns; the lines before have 2", "words"),
    Bad("a.jsonl", '{"tokens": ["a"], "ner_tags": ["PER"]}', ":1, word 1: 'PER' is not a tag", "words"),
    *(
        Bad("a.jsonl", WORDS + bad, f":2: {message}", "words")
        for bad, message in (
            ('{"tokens": ["a", "b"], "ner_tags": ["O"]}', "2 words but 1 tags"),
            ('{"tokens": [], "ner_tags": []}', "column 'tokens' is not a list of words or tags"),
            ('{"tokens": ["a", ""], "ner_tags": ["O", "O"]}', "word 2 of column 'tokens' is empty"),
            ('{"tokens": [null], "ner_tags": ["O"]}', "word 1 of column 'tokens' is None, not a text"),
            (
                '{"tokens": ["a"], "ner_tags": [3]}',
                "column 'ner_tags' has numbers whose names are not in the file; write",
            ),
            ('{"tokens": "a", "ner_tags": ["O"]}', "column 'tokens' is not a list of words or tags"),
            ('{"tokens": ["a"]}', "column 'ner_tags' is not a list of words or tags"),
        )
    ),
]


@pytest.mark.parametrize("file", BAD, ids=lambda file: f"{file.name}{file.message}"[:60])
def test_bad_file_is_refused_with_its_line(save: Save, file: Bad) -> None:
    path = save(file.name, file.content)
    wants: Wants = "words" if file.name.endswith("conll") else file.wants
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}{file.message}')}") as caught:
        read(str(path), wants, columns=file.columns, format=file.format)
    if file.name == "a.data":
        assert str(caught.value).endswith("data.format=" + "|".join(FORMATS))


@pytest.mark.slow
def test_hostile_files_and_recipes_are_refused_or_read_in_bounds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.data.hostile", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= 100
    assert [r for r in results if r["code"] not in (0, 2, 3) or r["seconds"] > 5 or r["memory"] > 1000] == []
    assert [r for r in results if r["code"] and (len(r["message"]) > 4000 or "\n" in r["message"][:100])] == []
