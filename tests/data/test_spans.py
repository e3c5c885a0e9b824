"""Character spans: what is written is read back, by every key and unit; what cannot be right is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.documents import ANCHOR, FILES, Document, code_units, documents, found, refusal

from lorakit.data.example import Columns, columns_of, of_spans, of_text
from lorakit.data.read import holds_words, read
from lorakit.data.spans import Span
from lorakit.errors import DataError
from lorakit.recipe import make_recipe

KEYS = [
    ("start", "end", "label"),
    ("start", "end", "type"),
    ("start", "end", "entity_group"),
    ("start_offset", "end_offset", "label"),
]


def as_objects(
    document: Document, keys: Sequence[str] = KEYS[0], units: bool = False, own: bool = False
) -> list[dict[str, Any]]:
    text = document.text
    offset = (lambda at: code_units(text, at)) if units else (lambda at: at)
    return [
        dict(zip(keys, (offset(start), offset(end), kind), strict=True)) | ({"text": text[start:end]} if own else {})
        for start, end, kind in document.spans
    ]


def lines(records: Iterable[object]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spans")


def read_back(path: Path, content: str, **options: Any) -> list[Document]:
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    return [found(example) for example in read(str(path), "words", **options).examples]


@given(file=FILES, keys=st.sampled_from(KEYS), column=st.sampled_from(["spans", "entities"]))
def test_reading_objects_gives_back_what_was_written(folder, keys, column, file):
    content = lines({"text": document.text, column: as_objects(document, keys)} for document in file)
    assert read_back(folder / "a.jsonl", content) == file


@given(file=FILES, column=st.sampled_from(["label", "labels", "entities"]))
def test_reading_doccano_gives_back_what_was_written(folder, column, file):
    file = [ANCHOR, *file]
    content = lines({"id": i, "text": text, column: spans} for i, (text, spans) in enumerate(file))
    assert read_back(folder / "a.jsonl", content) == file
    assert read_back(folder / "a.txt", content, format="doccano") == file


@given(file=FILES, units=st.booleans())
def test_reading_spans_with_their_texts_tells_characters_from_code_units(folder, file, units):
    file = [ANCHOR, *file]
    content = lines({"text": document.text, "spans": as_objects(document, units=units, own=True)} for document in file)
    assert read_back(folder / "a.jsonl", content) == file
    notes = read(str(folder / "a.jsonl"), "words").notes
    assert any("UTF-16 code units, as JavaScript does" in note for note in notes) == units


def test_file_that_counts_in_two_ways_is_refused(save):
    records = [{"text": ANCHOR.text, "spans": as_objects(ANCHOR, units=units, own=True)} for units in (False, True)]
    path = save("a.jsonl", lines(records))
    message = f"offsets count UTF-16 code units here, but characters at {path}:1; a file must use one of them"
    with pytest.raises(DataError, match=refusal(f"{path}:2", message)):
        read(str(path), "words")


def test_predictions_of_ours_are_read(save):
    line = {
        "text": "Peter spoke",
        "entities": [{"entity_group": "PER", "word": "Peter", "start": 0, "end": 5, "score": 0.9}],
        "expected": [],
    }
    path = save("predictions.jsonl", lines([line, {"text": "no one", "entities": [], "expected": []}]))
    assert [found(e) for e in read(str(path), "words").examples] == [
        Document("Peter spoke", ((0, 5, "PER"),)),
        Document("no one", ()),
    ]


def test_columns_are_those_named_or_noted(save):
    record = {"body": "Peter spoke", "text": "x", "ner": [[0, 5, "PER"]], "spans": [[0, 1, "X"]]}
    path = save("a.jsonl", lines([record]))
    dataset = read(str(path), "words", columns=Columns(text="body", label="ner"))
    assert [found(example) for example in dataset.examples] == [Document("Peter spoke", ((0, 5, "PER"),))]
    assert dataset.notes == []
    path = save("b.jsonl", lines([{"text": "Peter", "label": [[0, 5, "PER"]]}]))
    assert read(str(path), "words").notes == [f"{path}: text is column 'text'", f"{path}: spans are column 'label'"]


@pytest.mark.parametrize("column", ["spans", "label"])
def test_spans_make_a_source_of_words(save, column):
    assert holds_words(str(save("a.jsonl", lines([{"text": "a", column: []}, {"text": "b", column: [[0, 1, "X"]]}]))))
    assert not holds_words(str(save("b.jsonl", lines([{"text": "a", column: []}, {"text": "b", column: ["X"]}]))))


def test_label_beside_spans_is_a_label(save):
    path = save("a.jsonl", lines([{"text": "a", "labels": "x", "label": [[0, 1, "PER"]]}]))
    assert [example.label for example in read(str(path)).examples] == ["x"]


def test_white_space_at_the_ends_of_spans_is_cut_and_noted(save):
    records = [
        {"text": "Peter spoke \n", "spans": [[0, 6, "PER"]]},
        {"text": "he spoke", "spans": [[2, 3, "PER"]]},
        {"text": "he", "spans": [[0, 2, "PER"]]},
    ]
    path = save("a.jsonl", lines(records))
    dataset = read(str(path), "words")
    assert [found(example).spans for example in dataset.examples] == [((0, 5, "PER"),), (), ((0, 2, "PER"),)]
    assert dataset.notes[-2:] == [
        f"{path}: white space removed at the ends of spans: 1 ({path}:1)",
        f"{path}: spans of only white space, left out: 1 ({path}:2)",
    ]
    path = save("b.jsonl", lines([{"text": "a b", "spans": [[0, 2, "X"]]}] * 7))  # places are listed five at most
    note = read(str(path), "words").notes[-1]
    assert note.endswith(f"spans: 7 ({', '.join(f'{path}:{line}' for line in range(1, 6))}, ...)")


def span(start: object, end: object, label: object = "PER", **more: object) -> dict[str, object]:
    return {"start": start, "end": end, "label": label, **more}


BAD = [
    (span(0, 12), "span 0-12 (PER) is outside the text, which has 11 characters"),
    (span(-1, 5), "span -1-5 (PER) is outside the text, which has 11 characters"),
    (span(12, 13), "span 12-13 (PER) is outside the text"),
    (span(3, 3), "span 3-3 (PER) is empty; its end is the offset after its last character"),
    (span(5, 3), "span 5-3 (PER) is empty"),
    (span(1, 6, text="Peter"), "span 1-6 (PER) reads 'eter ', but should read 'Peter'; that is at 0-5"),
    (span(0, 4, text="Peter"), "span 0-4 (PER) reads 'Pete', but should read 'Peter'; that is at 0-5"),
    (span(0, 5, text="Paul"), "span 0-5 (PER) reads 'Peter', but should read 'Paul'"),
    (span("0", 5), "{'start': '0', 'end': 5, 'label': 'PER'}: start and end of a span are whole numbers of characters"),
    (span(0.0, 5), "{'start': 0.0, 'end': 5, 'label': 'PER'}: start and end"),
    (span(False, True), "{'start': False, 'end': True, 'label': 'PER'}: start and end"),
    ({"start": 0, "label": "PER"}, "{'start': 0, 'label': 'PER'}: start and end"),
    (span(0, 5, None), "{'start': 0, 'end': 5, 'label': None}: a span needs a type under one of the keys label, type"),
    (span(0, 5, " "), "{'start': 0, 'end': 5, 'label': ' '}: a span needs a type"),
    (span(0, 5, []), "{'start': 0, 'end': 5, 'label': []}: a span needs a type"),
    ({"start": 0, "end": 5}, "{'start': 0, 'end': 5}: a span needs a type"),
    ([0, 5], "[0, 5] is not a span; expected [start, end, type] or an object with these keys"),
    ("PER", "'PER' is not a span"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_span_is_refused_with_line_and_id(save, bad, message):
    record, first = {"text": "Peter spoke", "spans": [bad]}, {"text": "a", "spans": [[0, 1, "PER"]]}
    for last, name in ((record, ""), ({"id": 7, **record}, " (id 7)")):
        path = save("a.jsonl", lines([first, last]))
        with pytest.raises(DataError, match=refusal(f"{path}:2{name}", message)):
            read(str(path), "words")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "not annotated; use [] for a text without entities"),
        ({"spans": None}, "not annotated; use [] for a text without entities"),
        ({"spans": "PER"}, "'PER' is not a list of spans"),
        ({"spans": {"0": "x" * 100}}, "{'0': '" + "x" * 70 + "... is not a list of spans"),
    ],
)
def test_record_without_a_list_of_spans_is_refused(save, value, message):
    path = save("a.jsonl", lines([{"text": "a", "spans": [[0, 1, "PER"]]}, {"text": "b", **value}]))
    with pytest.raises(DataError, match=refusal(f"{path}:2", message)):
        read(str(path), "words")


OVERLAPPING = [
    ([(0, 5, "A"), (3, 8, "B")], "span 0-5 (A) and span 3-8 (B)", [(0, 5, "A")]),
    ([(3, 8, "B"), (0, 4, "A")], "span 0-4 (A) and span 3-8 (B)", [(3, 8, "B")]),
    ([(0, 8, "A"), (2, 4, "B"), (5, 7, "C")], "span 0-8 (A) and span 2-4 (B)", [(0, 8, "A")]),
    ([(0, 4, "A"), (0, 4, "B")], "span 0-4 (A) and span 0-4 (B)", [(0, 4, "A")]),
    ([(0, 4, "A"), (0, 4, "A")], "span 0-4 (A) and span 0-4 (A)", [(0, 4, "A")]),
    ([(0, 3, "A"), (2, 6, "B"), (5, 8, "C")], "span 0-3 (A) and span 2-6 (B)", [(2, 6, "B")]),
    ([(0, 3, "A"), (2, 5, "B"), (4, 8, "C")], "span 0-3 (A) and span 2-5 (B)", [(0, 3, "A"), (4, 8, "C")]),
    ([(0, 8, "A"), (0, 2, "B"), (8, 9, "C")], "span 0-2 (B) and span 0-8 (A)", [(0, 8, "A"), (8, 9, "C")]),
]


@pytest.mark.parametrize(("spans", "message", "longest"), OVERLAPPING)
def test_overlaps_are_refused_or_the_longest_is_taken_and_noted(save, spans, message, longest):
    path = save("a.jsonl", lines([{"id": "x", "text": "abcdefghij", "spans": spans}]))
    where, rule = f"{path}:1 (id x)", f"{message} overlap, but a word can have only one tag; "
    with pytest.raises(DataError, match=refusal(where, rule) + r".*data\.overlaps=longest"):
        read(str(path), "words")
    dataset = read(str(path), "words", columns=Columns(overlaps="longest"))
    assert [found(example).spans for example in dataset.examples] == [tuple(longest)]
    n = len(spans) - len(longest)
    assert dataset.notes[-1] == f"{path}: spans that overlap longer ones, left out: {n} ({', '.join([where] * n)})"


def test_recipe_says_what_becomes_of_overlaps():
    changes = ["model.base=x", "data.train=a.jsonl", "data.overlaps=longest"]
    assert columns_of(make_recipe({}, changes).data).overlaps == "longest"
    assert columns_of(make_recipe({}, changes[:2]).data).overlaps == "error"


@given(document=documents())
def test_spans_cut_words_only_at_their_borders(document):
    example = of_spans(document.text, [Span(*entry) for entry in document.spans])
    borders = {border for start, end, _ in document.spans for border in (start, end)}
    plain = of_text(document.text)
    assert (
        {border for offset in plain.offsets for border in offset}
        <= {border for offset in example.offsets for border in offset}
        <= {border for offset in plain.offsets for border in offset} | borders
    )
    assert found(example) == document


@given(document=documents(), data=st.data())
def test_tokens_of_the_file_are_its_words(document, data):
    text = document.text
    cuts = [*data.draw(st.lists(st.integers(0, len(text)), max_size=5)), 0, len(text)]
    tokens = list(zip(sorted(set(cuts)), sorted(set(cuts))[1:], strict=False))
    example = of_spans(text, [Span(*entry) for entry in document.spans], tokens)
    borders = {border for entry in document.spans for border in entry[:2]} | set(cuts)
    assert found(example) == document
    assert "".join("".join(example.words).split()) == "".join(text.split())
    for start, end in example.offsets:
        assert not any(start < border < end for border in borders)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([(0, 2), (3, 5)], "'c' at 2 is in no token"),
        ([(0, 3)], "'de' at 3 is in no token"),
        ([(0, 3), (2, 5)], "token 2-5 overlaps the one before or is outside the text"),
        ([(0, 6)], "token 0-6 overlaps the one before or is outside the text"),
        ([(3, 5), (0, 3)], "'abc' at 0 is in no token"),
    ],
)
def test_tokens_that_do_not_cover_the_text_are_refused(tokens, message):
    with pytest.raises(DataError, match=refusal("here", message)):
        of_spans("abcde", [], tokens, "here")


# Spans inside words

TEXT = "Über die Brücke fuhren 🚲 Anna Berg und Øyvind Dahl nach Kraków zurück"
NAMES = ("Brücke", "Anna Berg", "Øyvind Dahl", "Kraków")


def counted_otherwise(text: str, how: str) -> list[tuple[int, int, str]]:
    """Spans of the names, whose offsets count otherwise than in characters."""
    offset = {
        "UTF-16": lambda at: code_units(text, at),
        "bytes": lambda at: len(text[:at].encode()),
        "two characters": lambda at: at + text[:at].count("\n"),
    }.get(how, lambda at: at)
    starts = [(text.index(name), text.index(name) + len(name) - (how == "last characters")) for name in NAMES]
    return [(offset(start), offset(end), "X") for start, end in starts]


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ("UTF-16", "they would not if offsets count UTF-16 code units"),
        ("bytes", "they would not if offsets count bytes of UTF-8"),
        ("last characters", "they would not if ends are those of last characters"),
        ("two characters", "they would not if line ends count two characters"),
    ],
)
def test_spans_inside_words_are_noted_or_refused_where_they_are_many(save, how, hint):
    text = TEXT.replace("🚲", "\n\n") if how == "two characters" else TEXT
    record = {"text": text, "spans": counted_otherwise(text, how)}
    right = save("b.jsonl", lines([{**record, "spans": counted_otherwise(text, "characters")}]))
    assert not any("inside a word" in note for note in read(str(right), "words").notes)
    path = save("a.jsonl", lines([record]))
    (note,) = [note for note in read(str(path), "words").notes if "inside a word" in note]
    assert re.search(rf"[2-4] of 4 spans begin or end inside a word \(first .*a\.jsonl:1: span .*{hint}", note)
    path = save("a.jsonl", lines([record] * 5))
    with pytest.raises(DataError, match=rf"\d+ of 20 spans begin or end inside a word \(first {path}:1: .*{hint}"):
        read(str(path), "words")


def test_scripts_without_spaces_and_units_behind_numbers_are_no_cut_words(save):
    records = [("東京都庁に行く", [0, 3, "X"]), ("서울에서", [0, 2, "X"]), ("take 5mg now", [5, 6, "X"])]
    found = read(str(save("a.jsonl", lines({"text": text, "spans": [span]} for text, span in records))), "words")
    assert not any("inside a word" in note for note in found.notes)
