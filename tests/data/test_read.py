"""From a source to a Dataset: which format, which columns, which records are refused."""

from __future__ import annotations

import hashlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.data.columns import USUAL
from lorakit.data.example import Columns
from lorakit.data.read import FORMATS, LIBRARY, holds_words, read, usual_pair
from lorakit.errors import DataError, did_you_mean
from lorakit.recipe import FORMATS as NAMES

CSV = "text,label\na,x\nb,y\n"
TAGGED = "EU\tB-ORG\nrejects\tO\n\nPeter\tB-PER\n"
LABELLED_LINES = "".join(f"{number % 2} text number {number}\n" for number in range(40))


def refusal(where: object, message: str) -> str:
    return "^" + re.escape(f"{where}: {message}")


@pytest.mark.parametrize("name", ["noending", "a.train", "a.dev", "a.test", "a.txt", "a.data"])
@pytest.mark.parametrize(
    ("content", "first"),
    [
        (CSV, ("a", "x")),
        (CSV.replace(",", "\t"), ("a", "x")),
        (CSV.replace("\n", "\r\n"), ("a", "x")),
        ('\n{"text": "a", "label": "x"}\n', ("a", "x")),
        (LABELLED_LINES, ("text number 0", "0")),
        ('sentence,label\n"a, b",x\n', ("a, b", "x")),
    ],
    ids=["csv", "tsv", "crlf", "jsonl", "label-first", "quoted"],
)
def test_format_of_an_unknown_ending_is_told_from_the_content(save, name, content, first):
    example = read(str(save(name, content))).examples[0]
    assert (example.text, example.label) == first


@pytest.mark.parametrize("name", ["noending", "a.train", "a.dev", "a.test", "a.txt"])
@pytest.mark.parametrize(
    "content",
    [
        TAGGED,
        TAGGED.replace("\t", " "),
        TAGGED.replace("\n\n", "\n\t\n"),
        TAGGED.replace("\n", "\r\n"),
        TAGGED.replace("\n", "\r"),
        "-DOCSTART- -X- O O\n\n" + TAGGED.replace("\t", " NN I-NP "),
        TAGGED.replace("rejects", "10\u00a0000"),
        TAGGED.replace("rejects", "\u00a0"),
    ],
    ids=["tab", "space", "lone tab", "crlf", "cr", "four columns", "no-break space", "blank word"],
)
def test_tagged_words_of_an_unknown_ending_are_told_from_the_content(save, name, content):
    path = str(save(name, content))
    assert holds_words(path)
    assert [example.tags for example in read(path, "words").examples] == [("B-ORG", "O"), ("B-PER",)]


@pytest.mark.parametrize("ending", ["conll", "bio", "iob", "CONLL"])
def test_endings_of_tagged_words_are_known(save, ending):
    assert holds_words(str(save(f"a.{ending}", TAGGED)))


def test_conll_with_a_bad_tag_holds_words_all_the_same(save):
    assert holds_words(str(save("a.conll", "Ada B-PER\nsaw X-VERB\n")))


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.jsonl", "a.txt"])
def test_tables_hold_no_words(save, name):
    assert not holds_words(str(save(name, CSV)))


@pytest.mark.parametrize(
    ("record", "holds"),
    [
        ('{"tokens": ["a"], "ner_tags": ["B-X"]}', True),
        ('{"tokens": ["a"], "ner_tags": ["O"]}', True),
        ('{"text": "a", "label": "x", "words": 1, "tags": ["news"]}', False),
        ('{"text": "a", "label": "x", "words": 1, "tags": "B-X"}', False),
        ('{"text": "a", "label": ["x"]}', False),
        ("not JSON", False),
    ],
)
def test_words_of_json_are_told_from_the_first_record(save, record, holds):
    assert holds_words(str(save("a.jsonl", record))) == holds


def test_asked_format_beats_the_ending(save):
    path = save("a.jsonl", CSV)
    assert [example.text for example in read(str(path), format="csv").examples] == ["a", "b"]


def test_file_whose_name_has_a_number_sign_is_read(save):
    path = save("c#.csv", CSV)
    assert [example.text for example in read(str(path)).examples] == ["a", "b"]
    assert not holds_words(str(path))


def test_unclear_format_is_refused_with_the_formats_there_are(save):
    path = save("a.data", "one line\nanother line\n")
    with pytest.raises(DataError, match=refusal(path, "the format cannot be told from its name or first lines")) as err:
        read(str(path))
    assert str(err.value).endswith("data.format=" + "|".join(FORMATS))


@pytest.mark.parametrize("role", ["text", "label"])
@pytest.mark.parametrize("which", range(len(USUAL["label"])))
def test_usual_column_names_are_found_and_said(save, role, which):
    name = USUAL[role][which % len(USUAL[role])]
    other = {"text": "label", "label": "text"}[role]
    path = save("a.csv", f"number,{other},{name}\n1,a,b\n")
    dataset = read(str(path))
    assert getattr(dataset.examples[0], role) == "b"
    assert f"{path}: {role} is column {name!r}" in dataset.notes


def test_of_several_usual_names_the_longest_text_is_taken_and_said(save):
    path = save("a.csv", "title,Body,label\nWeather,It rains on the hill,x\nSport,The ball was round,y\n")
    dataset = read(str(path))
    assert [example.text for example in dataset.examples] == ["It rains on the hill", "The ball was round"]
    assert f"{path}: text is column 'Body', the longest of 'Body', 'title'" in dataset.notes


def test_usual_names_are_tried_in_their_order_where_texts_are_equally_long(save):
    names = [name for name in USUAL["text"] if name != "question1"]
    path = save("a.csv", ",".join([*reversed(names), "label"]) + "\n" + ",".join("x" for _ in [*names, ""]) + "\n")
    assert f"{path}: text is column {names[0]!r}" in "".join(read(str(path)).notes)


@pytest.mark.parametrize(("first", "second"), [("question", "sentence"), ("query", "document"), ("query", "passage")])
def test_longer_second_text_of_a_pair_is_not_taken_for_the_first(save, first, second):
    path = save("a.csv", f"{second},{first},label\nA long answer of many words,What?,yes\n")
    assert usual_pair(str(path)) == second
    (example,) = read(str(path), columns=Columns(pair=second)).examples
    assert (example.text, example.pair) == ("What?", "A long answer of many words")


@pytest.mark.parametrize("name", ["ents", "label_2"])
def test_spans_are_found_by_their_form_where_no_column_is_usual(save, name):
    record = {"text": "Ada left", name: [{"start": 0, "end": 3, "label": "PER"}]}
    path = save("a.jsonl", json.dumps(record) + "\n")
    assert holds_words(str(path))
    assert read(str(path), "words").examples[0].tags == ("B-PER", "O")
    path = save("b.jsonl", json.dumps({**record, "category": "x"}) + "\n")
    assert not holds_words(str(path))


def test_second_text_that_is_not_asked_for_is_said(save):
    path = save("a.csv", "premise,hypothesis,label\nIt rains.,It is wet.,yes\n")
    alone, pairs = read(str(path)), read(str(path), columns=Columns(pair="hypothesis"))
    said = f"{path}: column 'hypothesis' is not read; for pairs of texts say data.pair=hypothesis"
    assert said in alone.notes
    assert said not in pairs.notes


@pytest.mark.parametrize(
    ("header", "pair"),
    [
        ("question,answer,label", "answer"),
        ("Sentence1,Sentence2,label", "Sentence2"),
        ("label,premise,hypothesis", "hypothesis"),
        ("sentence_A,sentence_B,score", "sentence_B"),
        ("text,text_pair,label", "text_pair"),
        ("question,label,note", None),
        ("text,answer,label", None),  # an answer goes with a question
    ],
)
def test_columns_with_the_usual_names_of_pairs_pair_by_themselves(save, header, pair):
    path = str(save("a.csv", f"{header}\na,b,c\n"))
    assert usual_pair(path) == pair
    assert usual_pair(path, Columns(text=header.split(",")[0])) is None
    assert usual_pair(path, Columns(pair="note")) is None


def test_asked_columns_are_read_without_a_note(save):
    path = save("a.csv", "text,label,first,second,verdict\n1,2,a,b,c\n")
    dataset = read(str(path), columns=Columns(text="first", pair="second", label="verdict"))
    (example,) = dataset.examples
    assert (example.text, example.pair, example.label) == ("a", "b", "c")
    assert not dataset.notes


@pytest.mark.parametrize("role", ["text", "pair", "label"])
def test_wrong_column_is_refused_with_the_nearest_name(save, role):
    path = save("a.csv", "sentence,verdict\na,b\n")
    columns = Columns(**{"text": "sentence", "label": "verdict", role: "sentense"})
    message = f"data.{role} = 'sentense' is not a column; did you mean 'sentence'?"
    with pytest.raises(DataError, match=refusal(path, message)):
        read(str(path), columns=columns)


@pytest.mark.parametrize(("role", "header"), [("text", "words here,label"), ("label", "text,verdict")])
def test_missing_column_is_refused_with_the_knob_and_the_columns(save, role, header):
    path = save("a.csv", f"{header}\na,b\n")
    message = f"which column is the {role}? say data.{role}=NAME; columns: {header.replace(',', ', ')}"
    with pytest.raises(DataError, match=refusal(path, message)):
        read(str(path))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_header_alone_is_refused(save, name):
    path = save(name, CSV.splitlines(keepends=True)[0])
    with pytest.raises(DataError, match=refusal(path, "a header but no record")):
        read(str(path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (",x", "column 'text' is empty"),
        ('" \n ",x', "column 'text' is empty"),
        ("a,", "column 'label' holds '', not a label"),
        ("a, ", "column 'label' holds ' ', not a label"),
    ],
)
def test_empty_value_of_a_table_is_refused_with_its_line(save, bad, message):
    path = save("a.csv", CSV + bad + "\n")
    with pytest.raises(DataError, match=refusal(f"{path}:{CSV.count(chr(10)) + 1}", message)):
        read(str(path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"label": "x"}', "column 'text' holds None, not a text"),
        ('{"text": 7, "label": "x"}', "column 'text' holds 7, not a text"),
        ('{"text": ["a"], "label": "x"}', "column 'text' holds ['a'], not a text"),
        ('{"text": "a"}', "column 'label' holds None, not a label (a text, a whole number, true or false)"),
        ('{"text": "a", "label": 0.5}', "column 'label' holds 0.5, not a label"),
        ('{"text": "a", "label": NaN}', "column 'label' holds nan, not a label"),
        (
            '{"text": "a", "label": 4.5}',
            "column 'label' holds 4.5, not a label (a text, a whole number, true or false); for numbers say",
        ),
        (
            '{"text": "a", "label": ["x", "y"]}',
            "column 'label' holds 2 labels, ['x', 'y'], where one is wanted; for several say task.name=",
        ),
        ('{"text": "a", "label": []}', "column 'label' holds [], not a label"),
    ],
)
def test_value_of_another_kind_is_refused_with_its_line(save, bad, message):
    path = save("a.jsonl", '{"text": "a", "label": "x"}\n' + bad)
    with pytest.raises(DataError, match=refusal(f"{path}:2", message)):
        read(str(path))


def test_label_without_a_text_is_refused_with_its_line(save):
    path = save("a.txt", LABELLED_LINES + "1\n")
    with pytest.raises(
        DataError, match=refusal(f"{path}:{LABELLED_LINES.count(chr(10)) + 1}", "column 'text' is empty")
    ):
        read(str(path))


def test_parquet_without_a_label_is_refused_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", None]}), path)
    with pytest.raises(DataError, match=refusal(f"{path}:2", "column 'label' holds None, not a label")):
        read(str(path))


@pytest.mark.parametrize(
    ("asked", "there"), [("trian.csv", "train.csv"), ("train.jsonl", "train.csv"), ("./train.cvs", "train.csv")]
)
def test_missing_file_is_refused_with_the_nearest_name(save, monkeypatch, asked, there):
    monkeypatch.chdir(save(there, CSV).parent)
    with pytest.raises(DataError, match=refusal(asked, f"no such file; did you mean {there!r}?")):
        read(asked)


def test_missing_file_in_a_missing_folder_is_refused(tmp_path):
    path = tmp_path / "none" / "a.csv"
    with pytest.raises(DataError, match=refusal(path, "no such file; there are none")):
        read(str(path))


def test_missing_file_of_an_asked_format_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(DataError, match=refusal(path, "cannot be read: No such file or directory")):
        read(str(path), format="csv")


@pytest.mark.parametrize(("words", "tags"), [("tokens", "ner_tags"), ("words", "tags"), ("tokens", "labels")])
def test_records_of_words_and_tags_are_converted_and_said(save, words, tags):
    path = save("a.jsonl", f'{{"id": 0, "{words}": ["EU", "rejects"], "{tags}": ["I-ORG", "O"]}}\n')
    dataset = read(str(path), "words")
    (example,) = dataset.examples
    assert (example.words, example.tags) == (("EU", "rejects"), ("B-ORG", "O"))
    assert example.where == f"{path}:1"
    for asked in (Columns(text=words, label=tags), Columns(label=tags)):
        assert read(str(path), "words", columns=asked).examples == dataset.examples
    assert dataset.notes == [
        f"{path}: words are column {words!r}, tags are column {tags!r}",
        f"{path}: tag scheme IO, read as conlleval does and converted to IOB2",
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"tokens": ["a", "b"], "ner_tags": ["O"]}', "2 words but 1 tags"),
        ('{"tokens": ["a"], "ner_tags": ["PER"]}', "'PER' is not a tag; expected O, or B- or I- and a type"),
        ('{"tokens": [], "ner_tags": []}', "column 'tokens' is not a list of words or tags"),
        ('{"tokens": ["a", ""], "ner_tags": ["O", "O"]}', "word 2 of column 'tokens' is empty"),
        ('{"tokens": [null], "ner_tags": ["O"]}', "word 1 of column 'tokens' is None, not a text"),
        (
            '{"tokens": ["a"], "ner_tags": [3]}',
            "column 'ner_tags' holds numbers, whose names are not in the file; write the tags",
        ),
        ('{"tokens": "a", "ner_tags": ["O"]}', "column 'tokens' is not a list of words or tags"),
        ('{"tokens": ["a"]}', "column 'ner_tags' is not a list of words or tags"),
    ],
)
def test_bad_record_of_words_is_refused_with_its_line(save, bad, message):
    path = save("a.jsonl", '{"tokens": ["a"], "ner_tags": ["O"]}\n' + bad)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:2.*: {re.escape(message)}"):
        read(str(path), "words")


def test_table_without_words_is_refused_for_a_task_of_words(save):
    path = save("a.csv", CSV)
    message = (
        "this task needs tagged words: CoNLL columns, records with the lists 'tokens' and 'ner_tags', or texts with "
        "'spans'; columns: "
    )
    with pytest.raises(DataError, match=refusal(path, message + "text, label")):
        read(str(path), "words")


def test_fingerprint_is_the_sha256_of_the_file(save):
    assert read(str(save("a.csv", CSV))).sha256 == hashlib.sha256(CSV.encode()).hexdigest()


@pytest.mark.parametrize(
    ("wrong", "known", "end"),
    [
        ("qurey", ["query", "key"], "did you mean 'query'?"),
        ("x", ["b", "a"], "known: a, b"),
        ("x", [], "there are none"),
        ("x", [f"name {letter}" for letter in "abcdefghijklmn"], ", ..."),
    ],
)
def test_did_you_mean_names_what_there_is(wrong, known, end):
    assert did_you_mean(wrong, known).endswith(end)


def test_recipe_knows_every_format():
    assert {*NAMES} == {"auto", LIBRARY, *FORMATS}


def test_unknown_format_is_refused_with_the_nearest_name(save):
    path = save("a.csv", CSV)
    with pytest.raises(DataError, match=refusal(path, "format = 'prodgy' is not known; did you mean 'prodigy'?")):
        read(str(path), format="prodgy")


def test_nul_character_behind_an_escape_is_refused(save):
    record = '{"text": "a\\u0000b", "label": "x"}'
    path = save("a.jsonl", '{"text": "a", "label": "x"}\n' + record)
    with pytest.raises(DataError, match=refusal(f"{path}:2", "column 'text' holds a NUL character; text has none")):
        read(str(path))


def test_group_is_read_beside_whatever_the_task_wants(save):
    table = save("a.csv", "text,label,user\na film,good,7\na plot,bad,8\n")
    words = save("b.jsonl", '{"tokens": ["Ada"], "ner_tags": ["B-PER"], "user": 7}\n')
    for path, wants in ((table, "label"), (table, "text"), (words, "words")):
        assert read(str(path), wants, columns=Columns(group="user")).examples[0].group == "7"
    with pytest.raises(DataError, match=r"data\.group = 'usr' is not a column; did you mean 'user'"):
        read(str(table), columns=Columns(group="usr"))
    with pytest.raises(DataError, match=r"c\.csv:3: column 'user' holds '', not the name of a group"):
        read(str(save("c.csv", "text,label,user\na,x,7\nb,y,\n")), columns=Columns(group="user"))


# Lines that begin with a label


@pytest.mark.parametrize(
    "lines",
    [
        [f"{i % 2} text {i}" for i in range(20)],
        [f"{'ham' if i % 2 else 'spam'}: text {i}" for i in range(20)],
        [f"DESC:{'manner' if i % 2 else 'def'} How {i} ?" for i in range(20)],
        ["__label__a one", "__label__b two"],
    ],
)
def test_lines_that_begin_with_labels_are_told(save, lines):
    path = save("a.txt", "\n".join(lines))
    dataset = read(str(path), "labels" if "__" in lines[0] else "label")
    assert f"{path}: read as label-first" in dataset.notes
    assert len(dataset.examples) == len(lines)


@pytest.mark.parametrize(
    "line", ["show me train {}", "2024-01-02 12:30 started {}", "12:30 started {}", "http://a.example {}"]
)
def test_lines_that_begin_with_the_same_words_are_not_taken_for_labels(save, line):
    path = save("a.txt", "".join(line.format(i) + "\n" for i in range(40)))
    with pytest.raises(DataError, match=r"no columns, no labels.*say data\.format=label-first"):
        read(str(path))
    assert len(read(str(path), format="label-first").examples) == 40


def test_lines_of_fasttext_give_all_labels_without_their_mark(save):
    path = save("a.txt", "__label__soup __label__salt hot and salty\n__label__cake sweet\n")
    assert [(e.label, e.text) for e in read(str(path), "labels").examples] == [
        (("soup", "salt"), "hot and salty"),
        (("cake",), "sweet"),
    ]
    with pytest.raises(DataError, match=r"holds 2 labels, .* for several say task\.name=multi_label_classification"):
        read(str(path))


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_tagged_words_are_told_whatever_the_format_key_says(tmp_path, ending):
    path, records = tmp_path / f"a.{ending}", [{"tokens": ["Ada", "left"], "ner_tags": ["B-PER", "O"]}]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records[0]))
    assert holds_words(str(path))
    assert holds_words(str(path), format=ending)


def test_guesses_do_not_hold_a_columnar_file(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "a", "answer": "b", "label": "x"}]), path)
    monkeypatch.setattr(pq, "read_table", None)
    assert not holds_words(str(path))
    assert usual_pair(str(path)) == "answer"
