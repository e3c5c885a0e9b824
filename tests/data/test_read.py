"""From a source to a Dataset: which format, which columns, which records are refused."""

from __future__ import annotations

import hashlib
import json
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.documents import refusal

from lorakit.data.columns import USUAL
from lorakit.data.example import Columns, of_text, of_words
from lorakit.data.formats import FORMATS, LIBRARY
from lorakit.data.read import holds_words, read, usual_pair
from lorakit.errors import DataError, did_you_mean
from lorakit.recipe import FORMATS as NAMES

CSV = "text,label\na,x\nb,y\n"
TAGGED = "EU\tB-ORG\nrejects\tO\n\nPeter\tB-PER\n"
LABELLED_LINES = "".join(f"{number % 2} text number {number}\n" for number in range(40))


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
def test_format_of_an_unknown_ending_is_that_of_the_content(save, content, first):
    for name in ("noending", "a.train", "a.dev", "a.test", "a.txt", "a.data"):
        example = read(str(save(name, content))).examples[0]
        assert (example.text, example.label) == first


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
def test_tagged_words_of_an_unknown_ending_are_seen_in_the_content(save, content):
    for name in ("noending", "a.train", "a.dev", "a.test", "a.txt"):
        path = str(save(name, content))
        assert holds_words(path)
        assert [example.tags for example in read(path, "words").examples] == [("B-ORG", "O"), ("B-PER",)]


def test_endings_say_whether_a_file_holds_words(save):
    for ending in ("conll", "bio", "iob", "CONLL"):
        assert holds_words(str(save(f"a.{ending}", TAGGED)))
        assert holds_words(str(save(f"a.{ending}", "Ada B-PER\nsaw X-VERB\n")))  # and a bad tag
    for ending in ("csv", "CSV", "tsv", "jsonl", "txt"):
        assert not holds_words(str(save(f"a.{ending}", CSV)))


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


def test_format_key_beats_the_ending_and_a_name_may_have_a_number_sign(save):
    for name, format in (("a.jsonl", "csv"), ("c#.csv", "auto")):
        path = save(name, CSV)
        assert [example.text for example in read(str(path), format=format).examples] == ["a", "b"]
        assert not holds_words(str(path))


@pytest.mark.parametrize(("role", "other"), [("text", "label"), ("label", "text")])
def test_usual_column_names_are_taken_and_noted(save, role, other):
    for name in USUAL[role]:
        path = save("a.csv", f"number,{other},{name}\n1,a,b\n")
        dataset = read(str(path))
        assert getattr(dataset.examples[0], role) == "b"
        assert f"{path}: {role} is column {name!r}" in dataset.notes


def test_of_several_usual_names_the_longest_text_is_taken_or_the_first(save):
    path = save("a.csv", "title,Body,label\nWeather,It rains on the hill,x\nSport,The ball was round,y\n")
    dataset = read(str(path))
    assert [example.text for example in dataset.examples] == ["It rains on the hill", "The ball was round"]
    assert f"{path}: text is column 'Body', the longest of 'Body', 'title'" in dataset.notes
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
    said = f"{path}: column 'hypothesis' is not used; for pairs of texts set data.pair=hypothesis"
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


def test_parquet_without_a_label_is_refused_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", None]}), path)
    with pytest.raises(DataError, match=refusal(f"{path}:2", "column 'label' holds None, not a label")):
        read(str(path))


def test_missing_file_is_refused_with_the_nearest_name(save, monkeypatch):
    monkeypatch.chdir(save("train.csv", CSV).parent)
    for name in ("trian.csv", "train.jsonl", "./train.cvs"):
        with pytest.raises(DataError, match=refusal(name, "no such file; did you mean 'train.csv'?")):
            read(name)
    with pytest.raises(DataError, match=refusal("none/a.csv", "no such file")):
        read("none/a.csv")
    with pytest.raises(DataError, match=refusal("a.csv", "cannot be read: No such file or directory")):
        read("a.csv", format="csv")


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


def test_fingerprint_is_the_sha256_of_the_file(save):
    assert read(str(save("a.csv", CSV))).sha256 == hashlib.sha256(CSV.encode()).hexdigest()


@pytest.mark.parametrize(
    ("wrong", "known", "end"),
    [
        ("qurey", ["query", "key"], "did you mean 'query'?"),
        ("label", ["LABEL", "labels"], "did you mean 'LABEL'?"),
        ("x", ["b", "a"], "known: a, b"),
        ("x", [], "there are none"),
        ("x", [f"name {letter}" for letter in "abcdefghijklmn"], ", ..."),
    ],
)
def test_did_you_mean_names_what_there_is(wrong, known, end):
    assert did_you_mean(wrong, known).endswith(end)


def test_recipe_knows_every_format():
    assert {*NAMES} == {"auto", LIBRARY, *FORMATS}


def test_group_is_read_beside_whatever_the_task_wants(save):
    table = save("a.csv", "text,label,user\na film,good,7\na plot,bad,8\n")
    words = save("b.jsonl", '{"tokens": ["Ada"], "ner_tags": ["B-PER"], "user": 7}\n')
    for path, wants in ((table, "label"), (table, "text"), (words, "words")):
        assert read(str(path), wants, columns=Columns(group="user")).examples[0].group == "7"


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
    with pytest.raises(DataError, match=r"no columns, no labels.*set data\.format=label-first"):
        read(str(path))
    assert len(read(str(path), format="label-first").examples) == 40


def test_lines_of_fasttext_give_all_labels_without_their_mark(save):
    path = save("a.txt", "__label__soup __label__salt hot and salty\n__label__cake sweet\n")
    assert [(e.label, e.text) for e in read(str(path), "labels").examples] == [
        (("soup", "salt"), "hot and salty"),
        (("cake",), "sweet"),
    ]
    with pytest.raises(DataError, match=r"holds 2 labels, .* for several, set task\.name=multi_label_classification"):
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


# Examples keep offsets into the original text.


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=100)
def test_words_of_a_text_are_all_of_it_but_white_space(text):
    example = of_text(text)
    assert example.text == text
    assert example.words == tuple(text[start:end] for start, end in example.offsets)
    assert "".join(example.words) == "".join(text.split())
    assert list(example.offsets) == sorted(example.offsets)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  EU   rejects\tGerman\ncall. ", ["EU", "rejects", "German", "call", "."]),
        ("the U.S. won't pay $1,000!", ["the", "U.S", ".", "won", "'t", "pay", "$", "1,000", "!"]),
        ("mid-May (Peter's)", ["mid-May", "(", "Peter", "'s", ")"]),
        ("Paris,London and 1,000,000", ["Paris", ",", "London", "and", "1,000,000"]),
        ("São\u00a0Paulo 東京", ["São", "Paulo", "東京"]),
        ("cafe\u0301 Sa\u0303o", ["cafe\u0301", "Sa\u0303o"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("نمی\u200cکنم", ["نمی\u200cکنم"]),
        ("mid-E\u0301te\u0301 (o\u0308)", ["mid-E\u0301te\u0301", "(", "o\u0308", ")"]),
        ("I ❤\ufe0f 👍🏽", ["I", "❤\ufe0f", "👍", "🏽"]),
        (" \u0301a", ["\u0301", "a"]),
    ],
)
def test_raw_text_is_cut_as_conll_files_cut_it(text, words):
    assert list(of_text(text).words) == words


@given(text=st.text(st.sampled_from("aéoñ.,'- 1"), max_size=20))
def test_accents_are_cut_alike_composed_and_decomposed(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert [unicodedata.normalize("NFC", word) for word in of_text(decomposed).words] == list(of_text(composed).words)


@given(words=st.lists(st.text(min_size=1, max_size=5), max_size=6))
def test_offsets_of_words_point_into_their_text(words):
    example = of_words(words)
    assert [example.text[start:end] for start, end in example.offsets] == words
