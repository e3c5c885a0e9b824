"""Exports of Label Studio, Prodigy, brat and spaCy: what is written is read back, what is left out is said."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.documents import ANCHOR, FILES, Document, code_units, found, refusal

from lorakit.data.example import Columns
from lorakit.data.read import holds_words, read
from lorakit.errors import DataError

PETER = Document("Peter spoke", ((0, 5, "PER"),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


def words(path: Path, **options: Any) -> list[Document]:
    return [found(example) for example in read(str(path), "words", **options).examples]


# Label Studio


def region(document: Document, entry: tuple[int, int, str], units: bool = False) -> dict[str, Any]:
    start, end, kind = entry
    offsets = [code_units(document.text, at) if units else at for at in (start, end)]
    own = document.text[start:end].replace("\n", "\\n")  # as its page does
    return {"start": offsets[0], "end": offsets[1], "text": own, "labels": [kind]}


def result(value: object, kind: str = "labels", name: str = "label") -> dict[str, Any]:
    return {"id": "f3", "from_name": name, "to_name": "text", "type": kind, "value": value}


def task(document: Document, *more: object, units: bool = False, number: int = 1) -> dict[str, Any]:
    results = [*(result(region(document, entry, units)) for entry in document.spans), *more]
    return {"id": number, "data": {"text": document.text}, "annotations": [{"result": results}]}


def minimal(document: Document, units: bool = False) -> dict[str, Any]:
    spans = [region(document, entry, units) for entry in document.spans]
    record = {"id": 1, "text": document.text, "annotation_id": 4, "annotator": 1, "lead_time": 2.5}
    return {**record, **({"label": spans} if spans else {})}


def as_csv(*records: dict[str, Any]) -> str:
    """The CSV export, by pandas as Label Studio does: what is no string is JSON, and what is missing is empty."""
    columns = dict.fromkeys(key for record in records for key in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    for record in records:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in record.items()})
    return text.getvalue()


def as_json(*records: dict[str, Any]) -> str:
    return json.dumps(records, indent=1)


@pytest.mark.parametrize(
    ("export", "kind"), [("json", "hypertextlabels"), ("json_min", "paragraphlabels"), ("csv", "paragraphlabels")]
)
def test_spans_that_are_not_of_a_text_are_refused(save, kind, export):
    """Left out, they would be words outside of every entity."""
    value = {"start": "/p[1]", "end": "/p[1]", "startOffset": 0, "endOffset": 5, kind: ["PER"]}
    record = task(PETER, result(value, kind)) if export == "json" else {**minimal(PETER), "label": [value]}
    path = save("a.csv", as_csv(record)) if export == "csv" else save("a.json", as_json(record))
    with pytest.raises(DataError, match=rf"a\..*'label' has a result of type '{kind}', which marks places in .*<Text>"):
        read(str(path), "words")


@pytest.mark.parametrize("write", [task, minimal, as_csv], ids=["json", "json_min", "csv"])
@settings(max_examples=6)  # of each of three forms, several files in each example
@given(file=FILES, units=st.booleans(), indent=st.sampled_from([None, 2]))
def test_reading_label_studio_gives_back_what_was_written(folder, write, indent, file, units):
    file = [ANCHOR, *file]
    records = [(task if write is task else minimal)(document, units=units) for document in file]
    path = folder / ("a.csv" if write is as_csv else "a.json")
    content = as_csv(*records) if write is as_csv else json.dumps(records, indent=indent)
    path.write_text(content, encoding="utf-8", newline="")
    assert words(path) == file
    assert holds_words(str(path))
    if write is not as_csv:
        assert words(path, format="label-studio") == file
        assert f"{path}: read as label-studio" in read(str(path), "words").notes


POSITIVE = result({"choices": ["positive"]}, "choices", "sentiment")


@pytest.mark.parametrize(
    "record",
    [
        task(PETER, POSITIVE),
        task(PETER, POSITIVE) | {"predictions": []},
        {"id": 1, "data": {"text": PETER.text}, "completions": [{"result": [POSITIVE]}]},
        {**minimal(PETER), "sentiment": "positive"},
        {**minimal(PETER), "sentiment": {"choices": ["positive"]}},
    ],
)
def test_choices_of_label_studio_are_labels(save, record):
    (example,) = read(str(save("a.json", as_json(record))), "label").examples
    assert (example.text, example.label) == (PETER.text, "positive")
    if "sentiment" in record:
        texts = [{**minimal(Document('{"a": 1}', ())), "sentiment": x} for x in ("x", {"choices": ["x", "y"]})]
        examples = read(str(save("a.csv", as_csv(*texts))), "labels").examples
        assert [(e.text, e.label) for e in examples] == [('{"a": 1}', ("x",)), ('{"a": 1}', ("x", "y"))]


@pytest.mark.parametrize(
    ("kind", "value", "short", "wants", "label"),
    [
        ("rating", {"rating": 4}, [{"rating": 4}], "label", "4"),
        ("rating", {"rating": 4}, [{"rating": 4}], "number", 4.0),
        ("number", {"number": 3.5}, [{"number": 3.5}], "number", 3.5),
        ("taxonomy", {"taxonomy": [["Bird", "Owl"]]}, [{"taxonomy": [["Bird", "Owl"]]}], "label", "Bird / Owl"),
        ("taxonomy", *[{"taxonomy": [["Bird", "Owl"], ["Cat"]]}] * 2, "labels", ("Bird / Owl", "Cat")),
        ("textarea", {"text": ["an owl"]}, "an owl", "label", "an owl"),
    ],
)
def test_labels_of_other_kinds_of_label_studio_are_read(save, kind, value, short, wants, label):
    full = {"id": 1, "data": {"text": PETER.text}, "annotations": [{"result": [result(value, kind, "mine")]}]}
    record = {**minimal(Document(PETER.text, ())), "mine": short}
    for name, content in (("a.json", as_json(full)), ("a.json", as_json(record)), ("a.csv", as_csv(record))):
        (example,) = read(str(save(name, content)), wants, columns=Columns(label="mine")).examples
        assert (example.text, example.label) == (PETER.text, label)


def test_results_that_are_not_spans_are_noted_and_columns_may_be_named(save):
    first = task(PETER, {"type": "relation"}, result(region(PETER, (6, 11, "ACT")), name="verbs"))
    path = save("a.json", as_json(first, task(PETER, {"type": "datetime"}, number=2)))
    notes = read(str(path), "words", columns=Columns(label="label")).notes
    line = len(as_json(first).splitlines())
    assert f"{path}: results of type 'relation', which are not read: 1 ({path}:2, record 1 (id 1))" in notes
    assert f"{path}: results of type 'datetime', which are not read: 1 ({path}:{line}, record 2 (id 2))" in notes
    path = save("b.json", as_json(first))
    assert words(path, columns=Columns(label="verbs")) == [Document(PETER.text, ((6, 11, "ACT"),))]


def test_cancelled_annotations_and_other_opinions_do_not_count(save):
    annotated, nothing = task(PETER), {"result": []}
    (own,) = annotated["annotations"]
    for both in ([{**nothing, "was_cancelled": True}, own], [own, own], [nothing, {**own, "ground_truth": True}]):
        assert words(save("a.json", as_json({**annotated, "annotations": both}))) == [PETER]
    path = save("a.json", as_json({**annotated, "annotations": []}))  # to predict on
    assert [example.text for example in read(str(path), "text").examples] == [PETER.text]


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"result": []}, {"result": [result(region(PETER, (0, 5, "PER")))]}], "2 annotations that differ;"),
        ([], "not annotated; use [] for a text without entities"),
        ([{"was_cancelled": True, "result": []}], "not annotated"),
        ({}, "annotations is not a list of annotations with a list of results each"),
        ([{"result": None}], "annotations is not a list of annotations"),
        ([{"result": [7]}], "annotations is not a list of annotations"),
        ([{"result": [result("x")]}], "a result of type 'labels' has no value or no from_name"),
        ([{"result": [result({"start": "/p[1]", "end": "/p[1]", "labels": ["X"]})]}], "{'start': '/p[1]'"),
    ],
)
def test_bad_task_of_label_studio_is_refused_with_line_and_id(save, annotations, message):
    good = task(PETER)
    path = save("a.json", as_json(good, {**task(PETER, number=9), "annotations": annotations}))
    line = len(as_json(good).splitlines())
    with pytest.raises(DataError, match=refusal(f"{path}:{line}, record 2 (id 9)", message)):
        read(str(path), "words")


# Prodigy


def prodigy(document: Document, tokens: Sequence[tuple[int, int]] = (), answer: str = "accept") -> dict[str, Any]:
    spans = [dict(zip(("start", "end", "label"), entry, strict=True)) for entry in document.spans]
    record = {"text": document.text, "_input_hash": 5, "answer": answer, **({"spans": spans} if spans else {})}
    pieces = [{"text": document.text[a:b], "start": a, "end": b, "id": i} for i, (a, b) in enumerate(tokens)]
    return {**record, **({"tokens": pieces} if tokens else {})}


def lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@given(file=FILES, tokenised=st.booleans())
def test_reading_prodigy_gives_back_what_was_written(folder, file, tokenised):
    path = folder / "a.jsonl"
    tokens = [[(0, len(document.text))] if tokenised else [] for document in file]
    path.write_text(lines(map(prodigy, file, tokens)), encoding="utf-8", newline="")
    assert words(path) == words(path, format="prodigy") == file


def test_records_that_were_not_accepted_are_left_out_and_noted(save):
    document, tokens = Document("don't go", ()), [(0, 2), (2, 5), (5, 6), (6, 8)]
    answers = ["accept", "reject", "ignore", "accept"]
    path = save("a.jsonl", lines(prodigy(document, tokens, answer) for answer in answers))
    dataset = read(str(path), "words", format="prodigy")
    assert [(e.words, e.where) for e in dataset.examples] == [(("do", "n't", "go"), f"{path}:{i}") for i in (1, 4)]
    note = f"{path}: records that were not accepted, left out: 2 ({path}:2 (reject), {path}:3 (ignore))"
    assert note in dataset.notes
    path = save("b.jsonl", lines([prodigy(PETER, answer="reject")]))
    with pytest.raises(DataError, match=refusal(path, "no record was accepted")):
        read(str(path), "words")


def test_rejected_records_of_one_label_are_the_other_class(save):
    answers = ("accept", "reject", "ignore", "reject")
    path = save("a.jsonl", lines({"text": "a", "label": "BILL", "answer": answer} for answer in answers))
    found = read(str(path))
    assert [example.label for example in found.examples] == ["BILL", "not BILL", "not BILL"]
    assert f"{path}: rejected records, which have the label 'not BILL': 2 ({path}:2, {path}:4)" in found.notes
    other = lines(
        {"text": "a", "label": label, "answer": answer} for label, answer in (("A", "accept"), ("B", "reject"))
    )
    assert [example.label for example in read(str(save("b.jsonl", other))).examples] == ["A"]


@pytest.mark.parametrize("more", [{"label": "x"}, {"options": [{"id": "x"}, {"id": "y"}], "accept": ["x"]}])
def test_accepted_labels_of_prodigy_are_labels(save, more):
    path = save("a.jsonl", lines([{"text": "a", "answer": "accept", **more}]))
    assert [example.label for example in read(str(path)).examples] == ["x"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"answer": None}, "answer None; expected accept, reject, ignore"),
        ({"answer": "yes"}, "answer 'yes'; expected accept, reject, ignore"),
        ({"tokens": [{"text": "Peter"}]}, "tokens have no start and end"),
        ({"tokens": [{"start": 0, "end": 5}]}, "'spoke' at 5 is in no token"),
    ],
)
def test_bad_record_of_prodigy_is_refused_with_its_line(save, bad, message):
    path = save("a.jsonl", lines([prodigy(PETER), {**prodigy(PETER), **bad}]))
    with pytest.raises(DataError, match=refusal(f"{path}:2", message)):
        read(str(path), "words")


# brat


def annotations(document: Document) -> str:
    return "".join(
        f"T{i}\t{kind} {start} {end}\t{document.text[start:end]}\n".replace("\n", " ").rstrip(" ") + "\n"
        for i, (start, end, kind) in enumerate(document.spans, start=1)
    )


def save_brat(folder: Path, file: Sequence[Document]) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for i, document in enumerate(file):
        (folder / f"doc.{i}.txt").write_bytes(b"\xef\xbb\xbf" + document.text.encode())
        (folder / f"doc.{i}.ann").write_bytes(annotations(document).encode())


@given(file=FILES)
def test_reading_brat_gives_back_what_was_written(folder, file):
    save_brat(folder / "brat", file)
    assert words(folder / "brat") == file
    for ending in ("txt", "ann"):
        assert words(folder / "brat" / f"doc.0.{ending}") == file[:1]


@pytest.fixture
def brat(tmp_path: Path) -> Path:
    """A folder with one document, whose annotations a test may replace."""
    save_brat(tmp_path / "brat", [PETER])
    return tmp_path / "brat"


def test_folder_of_brat_is_a_source_of_words_whose_records_are_documents(brat):
    assert holds_words(str(brat))
    dataset = read(str(brat), "words")
    assert [example.where for example in dataset.examples] == [f"{brat / 'doc.0.txt'}:1"]
    assert dataset.notes[0] == f"{brat}: read as brat"


def test_lines_of_brat_that_are_not_entities_are_noted(brat):
    others = [
        "R1\tSees Arg1:T1 Arg2:T1",
        "E1\tX:T1",
        "A1\tNegated T1",
        "#1\tAnnotatorNotes T1\tx",
        "*\tEquiv T1 T2",
        "",
    ]
    (brat / "doc.0.ann").write_text(annotations(PETER) + "\n".join(others))
    dataset = read(str(brat), "words")
    assert [found(example) for example in dataset.examples] == [PETER]
    kinds = enumerate(["relations", "events", "attributes", "notes", "equivalences"], start=2)
    assert dataset.notes[1:6] == [
        f"{brat}: {k}, which are not read: 1 ({brat / 'doc.0.ann'}:{line})" for line, k in kinds
    ]


def test_parts_that_touch_but_for_white_space_are_one_entity(brat):
    (brat / "doc.0.txt").write_text("the harbour\n  master slept")
    (brat / "doc.0.ann").write_text("T1\tROLE 4 11;14 20\tharbour master\n")
    assert words(brat) == [Document("the harbour\n  master slept", ((4, 20, "ROLE"),))]


def test_fingerprint_of_brat_follows_its_annotations(brat):
    before = read(str(brat / "doc.0.txt"), "words").sha256
    (brat / "doc.0.ann").write_text("")
    assert read(str(brat / "doc.0.txt"), "words").sha256 != before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("T2\tPER 0 2;3 5\tPe er", "an entity in several parts (0 2;3 5), which word tags cannot express"),
        (
            "T2\tPER 0 5 Peter",
            "'T2\\tPER 0 5 Peter' is not a brat annotation; expected ID, tab, TYPE START END, tab, text",
        ),
        ("T2\tPER -1 5\tPeter", "'T2\\tPER -1 5\\tPeter' is not a brat annotation"),
        ("what is this", "'what is this' is not a brat annotation"),
        ("T2\tPER 6 10\tspoke", "span 6-10 (PER) reads 'spok', but should read 'spoke'; that is at 6-11"),
        ("T2\tPER 6 40\tspoke", "span 6-40 (PER) is outside the text, which has 11 characters"),
        ("T2\tORG 0 5\tPeter", "span 0-5 (PER) and span 0-5 (ORG) overlap"),
    ],
)
def test_bad_line_of_brat_is_refused_with_its_number(brat, bad, message):
    (brat / "doc.0.ann").write_text(annotations(PETER) + "#1\tx\n" + bad + "\n")
    with pytest.raises(DataError, match=refusal(f"{brat / 'doc.0.ann'}:3", message)):
        read(str(brat), "words")


def test_empty_text_and_half_of_a_pair_of_brat_are_refused(brat):
    (brat / "doc.0.txt").write_text("\n")
    with pytest.raises(DataError, match=refusal(brat / "doc.0.txt", "the file is empty")):
        read(str(brat), "words")
    for left, lost in (("txt", "ann"), ("ann", "txt")):
        save_brat(brat, [PETER, PETER])
        (brat / f"doc.0.{lost}").unlink()
        with pytest.raises(DataError, match=refusal(brat / f"doc.0.{left}", f"doc.0.{lost} is missing next to it; ")):
            read(str(brat), "words")


# spaCy


def doc_of(document: Document, vocab: Any) -> Any:
    """A Doc whose tokens end where spans and white space begin and end."""
    spacy = pytest.importorskip("spacy", reason="the extra spacy is not installed")
    text = document.text
    spaces = {at for i, c in enumerate(text) if c.isspace() for at in (i, i + 1)}
    cuts = sorted({0, len(text), *spaces, *(at for entry in document.spans for at in entry[:2])})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    doc = spacy.tokens.Doc(vocab, words=pieces, spaces=[False] * len(pieces))
    doc.set_ents([doc.char_span(start, end, kind) for start, end, kind in document.spans])
    return doc


def save_docs(path: Path, docs: Sequence[Any]) -> None:
    from spacy.tokens import DocBin

    DocBin(docs=docs, store_user_data=True).to_disk(path)


@pytest.fixture(scope="module")
def vocab() -> Any:
    return pytest.importorskip("spacy", reason="the extra spacy is not installed").vocab.Vocab()


@given(file=FILES)
def test_reading_docbin_gives_back_what_was_written(folder, vocab, file):
    save_docs(folder / "a.spacy", [doc_of(document, vocab) for document in file])
    assert words(folder / "a.spacy") == file


def test_docbin_keeps_the_tokens_and_knows_its_rows(tmp_path, vocab):
    from spacy.tokens import Doc

    path = tmp_path / "a.spacy"
    doc = Doc(vocab, words=["do", "n't", "go"], spaces=[False, True, False], ents=["O", "O", "B-ACT"])
    save_docs(path, [doc])
    assert holds_words(str(path))
    (example,) = read(str(path), "words").examples
    assert (example.text, example.words, example.tags) == ("don't go", ("do", "n't", "go"), ("O", "O", "B-ACT"))
    assert example.where == f"{path}:1"
    save_docs(path, [doc, Doc(vocab, words=["a"])])
    with pytest.raises(DataError, match=refusal(f"{path}:2", "not annotated; ")):
        read(str(path), "words")


def test_categories_of_docbin_are_labels_and_span_groups_may_be_named(tmp_path, vocab):
    path, doc = tmp_path / "a.spacy", doc_of(Document(PETER.text, ((6, 11, "ACT"),)), vocab)
    doc.spans["sc"] = [doc.char_span(0, 6, "PER")]
    for cats in ({"x": 1.0, "y": 0.0}, {"x": 1, "y": 0}):
        doc.cats = cats
        save_docs(path, [doc])
        assert [example.label for example in read(str(path)).examples] == ["x"]
    assert words(path, columns=Columns(label="sc")) == [PETER]


@pytest.mark.parametrize("content", ["text,label\na,b\n", b"\x78\x9c\x03\x00\x00\x00\x00\x01"])
def test_file_that_is_no_docbin_is_refused(save, vocab, content):
    path = save("a.spacy", content)
    with pytest.raises(DataError, match=refusal(path, "not a spaCy DocBin: ")):
        read(str(path), "words")


def test_missing_spacy_is_refused_with_the_command_that_installs_it(save, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy.tokens", None)
    with pytest.raises(DataError, match=re.escape("pip install 'lorakit[spacy]'")):
        read(str(save("a.spacy", "x")), "words")
