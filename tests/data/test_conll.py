"""CoNLL columns: every shape found in the wild, and refusals with file and line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.example import Columns, Example
from lorakit.data.read import holds_words, read
from lorakit.data.tags import Entity, entities
from lorakit.errors import DataError

SENTENCES = [
    (("EU", "rejects", "German", "call"), ("B-ORG", "O", "B-MISC", "O")),
    (("Peter", "Blackburn"), ("B-PER", "I-PER")),
]
# The shape of CoNLL-2003: four columns, one space, IOB1; B- only where an entity touches one of its own type.
CONLL_2003 = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- O O

W NNP I-NP I-LOC
T NNP I-NP I-LOC
Georgia NNP I-NP B-LOC
England NNP B-NP B-LOC
"""
EXTRA = ("NN", "I-NP")


def content(
    sentences: Sequence[tuple[Sequence[str], Sequence[str]]],
    separator: str = "\t",
    columns: int = 2,
    newline: str = "\n",
    gap: str = "",
) -> str:
    """The text of a CoNLL file."""
    lines = []
    for words, tags in sentences:
        lines += [separator.join([word, *EXTRA[: columns - 2], tag]) for word, tag in zip(words, tags, strict=True)]
        lines.append(gap)
    return newline.join(lines)


def read_conll(path: Path) -> tuple[Sequence[Example], Sequence[str]]:
    dataset = read(str(path), "words", format="conll")
    return dataset.examples, dataset.notes


def read_back(path: Path) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(example.words, example.tags) for example in read_conll(path)[0]]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("separator", ["\t", " ", "   "], ids=["tab", "space", "spaces"])
def test_sentences_are_read_from_every_shape(save, separator, newline):
    for columns in (2, 3, 4):
        text = content(SENTENCES, separator, columns, newline)
        for each in (text, text.rstrip(newline), "\ufeff" + text):
            assert read_back(save("a.conll", each)) == SENTENCES


@pytest.mark.parametrize("gap", ["\t", " ", " \t ", "\n\n", "-DOCSTART- O\n", "\n-DOCSTART- -X- O O\n"])
def test_sentences_end_at_blank_lines_and_document_starts(save, gap):
    assert read_back(save("a.conll", content(SENTENCES, gap=gap))) == SENTENCES


@pytest.mark.parametrize("separator", ["\t", " "])
def test_words_with_odd_characters_are_kept(save, separator):
    for word in ("10\u00a0000", "\u00a0", "\u2028", "\x85", "a\u3000b", '"', "'", "#", ",", "O"):
        sentences = [((word, "x"), ("B-ORG", "O")), (("x", word), ("O", "B-ORG"))]
        assert read_back(save("a.conll", content(sentences, separator))) == sentences


def test_conll_2003_finds_the_entities_that_a_reader_of_beginnings_misses(save):
    path = save("a.conll", CONLL_2003)
    examples, notes = read_conll(path)
    assert [entities(example.tags) for example in examples] == [
        [Entity("ORG", 0, 1), Entity("MISC", 2, 3)],
        [Entity("PER", 0, 2)],
        [Entity("LOC", 0, 2), Entity("LOC", 2, 3), Entity("LOC", 3, 4)],
    ]
    found = sum(len(entities(example.tags)) for example in examples)
    begun = [line for line in CONLL_2003.splitlines() if line.rpartition(" ")[2].startswith("B-")]
    assert sum(tag.startswith("B-") for example in examples for tag in example.tags) == found > 2 * len(begun)
    assert notes == [f"{path}: tag scheme IOB1, read as conlleval does and converted to IOB2"]


def test_text_is_the_words_joined_by_spaces_with_their_offsets(save):
    (example, *_), _ = read_conll(save("a.conll", content(SENTENCES)))
    assert example.text == " ".join(example.words)
    assert tuple(example.text[start:end] for start, end in example.offsets) == example.words


def test_tagged_words_are_texts_to_predict_on_but_have_no_label(save):
    path = save("a.conll", content(SENTENCES))
    assert [example.text for example in read(str(path), "text").examples] == [" ".join(words) for words, _ in SENTENCES]
    with pytest.raises(DataError, match=re.escape(f"{path}: it contains tagged words, but this task needs a text")):
        read(str(path))


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0 \t\r\n"), min_size=1, max_size=6)
TAGS = st.sampled_from(["O", "B-PER", "B-LOC"])
TAGGED = st.lists(st.tuples(WORDS.filter(lambda word: word != "-DOCSTART-"), TAGS), min_size=1, max_size=6)


SCHEMES_OF_PAIRS = {  # the same two entities of a type that touch, and one alone
    "IOB2": "B-A I-A I-A B-A I-A O B-B",
    "IOB1": "I-A I-A I-A B-A I-A O I-B",
    "IOBES": "B-A I-A E-A B-A E-A O S-B",
    "BMES": "B-A M-A E-A B-A E-A O S-B",
    "BILOU": "B-A I-A L-A B-A L-A O U-B",
}


@pytest.mark.parametrize("kind", SCHEMES_OF_PAIRS)
def test_every_scheme_is_stated_and_converted(save, kind):
    path = save("a.conll", content([("abcdefg", SCHEMES_OF_PAIRS[kind].split())]))
    (example,), notes = read_conll(path)
    assert list(example.tags) == SCHEMES_OF_PAIRS["IOB2"].split()
    end = "" if kind == "IOB2" else ", read as conlleval does and converted to IOB2"
    assert notes == [f"{path}: tag scheme {kind.replace('BM', 'IOB')}{end}"]


def test_tags_that_break_the_scheme_are_counted_with_their_lines(save):
    sentences = [(("a", "b", "c"), ("B-PER", "I-PER", "O")), (("d", "e"), ("I-LOC", "O")), (("f",), ("S-ORG",))]
    path = save("a.conll", "-DOCSTART- O\n\n" + content(sentences))
    examples, notes = read_conll(path)
    assert [example.tags for example in examples] == [("B-PER", "I-PER", "O"), ("B-LOC", "O"), ("B-ORG",)]
    assert notes == [
        f"{path}: tag scheme mixed, mostly IOB2, read as conlleval does and converted to IOB2; "
        f"tags that are not IOB2: 2 ({path}:7 I-LOC, {path}:10 S-ORG)"
    ]


def test_tags_of_records_that_break_the_scheme_are_counted_with_their_words(save):
    path = save(
        "a.jsonl", '{"tokens": ["a", "b"], "tags": ["B-X", "I-X"]}\n{"tokens": ["a", "b"], "tags": ["O", "I-X"]}'
    )
    assert read(str(path), "words").notes[-1].endswith(f"tags that are not IOB2: 1 ({path}:2, word 2 I-X)")


@given(rows=st.lists(TAGGED, min_size=1, max_size=4), separator=st.sampled_from("\t "), columns=st.integers(2, 4))
def test_reading_gives_back_what_was_written(tmp_path_factory, rows, separator, columns):
    sentences = [tuple(zip(*row, strict=True)) for row in rows]
    path = tmp_path_factory.getbasetemp() / "written.conll"
    path.write_bytes(b"\xef\xbb\xbf" + content(sentences, separator, columns).encode())  # so that a word may be U+FEFF
    assert read_back(path) == sentences


# Which columns are words and tags

WORDS = [(("Ada", "left"), ("B-PER", "O")), (("She", "saw", "Oslo"), ("O", "O", "B-LOC"))]


def laid_out(*columns: Callable[..., str], header: str = "", comment: str = "", gap: str = "\t") -> str:
    """Lines whose columns are made by functions of the number of the word (from 0), the word and its tag."""
    blocks = [
        comment + "".join(gap.join(make(i, *both) for make in columns) + "\n" for i, both in enumerate(zip(*sentence)))  # noqa: B905
        for sentence in WORDS
    ]
    return header + "\n".join(blocks)


def w(i: int, word: str, tag: str) -> str:
    return word


def t(i: int, word: str, tag: str) -> str:
    return tag


def under(i: int, word: str, tag: str) -> str:
    return "_"


@pytest.mark.parametrize(
    "content",
    [
        laid_out(lambda i, *_: str(i), w, t),
        laid_out(lambda i, *_: str(i + 1), w, under, t),
        laid_out(t, w),
        laid_out(t, w, gap=" "),
        laid_out(w, under, under, t, gap=" "),
        laid_out(w, under, under, under, t, under, under),
        laid_out(lambda *_: "doc1", w, t),
        laid_out(w, lambda i, *_: "B-NP", t),
        laid_out(w, t, comment="# id s0 split=train\n# two\n"),
        laid_out(w, under, under, t, gap=" ", comment="# sent = 1\n"),
        laid_out(w, t, header="word\ttag\n"),
        laid_out(w, under, t, header="Token POS NER\n\n", gap=" "),
        laid_out(w, lambda i, word, tag: tag.lower()),
        laid_out(lambda i, *_: str(i + 1), w, t, under, under, comment="# text = x\n"),
    ],
    ids=range(14),
)
@pytest.mark.parametrize("name", ["a.conll", "a.txt"])
def test_words_and_tags_are_found_in_whatever_columns(save, name, content):
    path = save(name, content)
    assert holds_words(str(path))
    found = [(e.words, tuple(tag[:2] + tag[2:].upper() for tag in e.tags)) for e in read(str(path), "words").examples]
    assert found == WORDS


def test_columns_that_are_told_are_said(save):
    path = save("a.conll", laid_out(lambda i, *_: str(i), w, t, header="id\tword\ttag\n"))
    notes = read(str(path), "words").notes
    assert f"{path}: line 1 is a header" in notes
    assert f"{path}: words are column 2, tags are column 3" in notes


def test_nested_tags_are_asked_about_and_chosen(save):
    path = save("a.conll", "1\tAda\tB-PER\tO\n2\tof\tI-PER\tO\n3\tOslo\tI-PER\tB-LOC\n")
    with pytest.raises(
        DataError, match=re.escape("columns 3 and 4 hold tags; name one of them: data.columns={word=2,tag=3}")
    ):
        read(str(path), "words")
    outer, inner = (
        read(str(path), "words", columns=Columns(columns={"word": 2, "tag": tag})).examples[0].tags for tag in (3, 4)
    )
    assert (outer, inner) == (("B-PER", "I-PER", "I-PER"), ("O", "O", "B-LOC"))
    with pytest.raises(DataError, match=r"data\.columns names column 9; the lines have 4"):
        read(str(path), "words", columns=Columns(columns={"tag": 9}))


def test_word_that_is_a_number_sign_is_a_word(save):
    path = save("a.conll", "#\tO\nAda\tB-PER\n\n# comment\n#ada\tB-X\n# O\tO\n")
    assert [example.words for example in read(str(path), "words").examples] == [("#", "Ada"), ("#ada", "# O")]


def test_tagged_words_are_told_in_a_file_of_tabs(save):
    path = save("a.tsv", "Ada\tB-PER\nleft\tO\n\nOslo\tB-LOC\n")
    assert holds_words(str(path))
    assert f"{path}: read as conll" in read(str(path), "words").notes
    assert not holds_words(str(save("b.tsv", "text\tlabel\nAda\tB-\nleft\tO\n")))


LISTS = st.lists(st.text(st.characters(categories=["L", "P"]), min_size=1), min_size=1)


@given(st.lists(LISTS, min_size=1))
def test_lists_of_words_that_pandas_writes_into_cells_are_read_back(tmp_path_factory, sentences):
    path = tmp_path_factory.getbasetemp() / "words.csv"
    tags = [["B-PER", *["O"] * (len(words) - 1)] for words in sentences]
    pd.DataFrame({"tokens": sentences, "ner_tags": tags}).to_csv(path, index=False)
    assert holds_words(str(path))
    dataset = read(str(path), "words")
    assert [list(example.words) for example in dataset.examples] == sentences
    assert [list(example.tags) for example in dataset.examples] == tags
    assert f"{path}: each row is a sentence, with its words in a list" in dataset.notes
