"""Exports of Label Studio, Prodigy, brat and spaCy: what is written is read back, what is left out is said."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.documents import ANCHOR, FILES, Document, code_units, found

from lorakit.data.example import Columns
from lorakit.data.read import holds_words, read
from lorakit.errors import DataError

PETER = Document("Peter spoke", ((0, 5, "PER"),))


def refusal(where: object, message: str) -> str:
    return "^" + re.escape(f"{where}: {message}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tools")


def words(path, **options):
    return [found(example) for example in read(str(path), "words", **options).examples]


# Label Studio


def region(document, entry, units=False):
    start, end, kind = entry
    offsets = [code_units(document.text, at) if units else at for at in (start, end)]
    own = document.text[start:end].replace("\n", "\\n")  # as its page does
    return {"start": offsets[0], "end": offsets[1], "text": own, "labels": [kind]}


def result(value, kind="labels", name="label"):
    return {"id": "f3", "from_name": name, "to_name": "text", "type": kind, "value": value}


def task(document, *more, units=False, number=1, **annotation):
    results = [*(result(region(document, entry, units)) for entry in document.spans), *more]
    return {"id": number, "data": {"text": document.text}, "annotations": [{"result": results, **annotation}]}


def minimal(document, units=False):
    spans = [region(document, entry, units) for entry in document.spans]
    return {"id": 1, "text": document.text, "annotation_id": 4, **({"label": spans} if spans else {})}


def as_csv(records) -> str:
    """The CSV export, by pandas as Label Studio does: what is no string is JSON, and what is missing is empty."""
    columns = dict.fromkeys(key for record in records for key in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    for record in records:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in record.items()})
    return text.getvalue()


@given(file=FILES, units=st.booleans())
@settings(max_examples=20, deadline=None)
def test_reading_csv_of_label_studio_gives_back_what_was_written(folder, file, units):
    file = [ANCHOR, *file]
    path = folder / "export.csv"
    records = [{**minimal(document, units), "annotator": 1, "lead_time": 3.2} for document in file]
    path.write_text(as_csv(records), encoding="utf-8", newline="")
    assert words(path) == file
    assert holds_words(str(path))


def test_choices_in_csv_of_label_studio_are_labels(save):
    common = {"annotation_id": 1, "annotator": 1, "lead_time": 2.5}
    choices = ["positive", {"choices": ["positive", "ironic"]}]
    path = save("a.csv", as_csv([{**common, "text": '{"a": 1}', "sentiment": choice} for choice in choices]))
    found = read(str(path), "labels").examples
    assert [(e.text, e.label) for e in found] == [('{"a": 1}', ("positive",)), ('{"a": 1}', ("positive", "ironic"))]


@pytest.mark.parametrize("kind", ["hypertextlabels", "paragraphlabels"])
@pytest.mark.parametrize("export", ["json", "json_min", "csv"])
def test_spans_that_are_not_of_a_text_are_refused(save, kind, export):
    """Left out, they would be words outside of every entity."""
    value = {"start": "/p[1]", "end": "/p[1]", "startOffset": 0, "endOffset": 5, kind: ["PER"]}
    record = {**minimal(PETER), "annotator": 1, "lead_time": 2.5, "label": [value]}
    bad, name = (as_csv([record]), "a.csv") if export == "csv" else (as_json(record), "a.json")
    if export == "json":
        bad = as_json(task(PETER, result(value, kind)))
    with pytest.raises(DataError, match=rf"a\..*'label' has a result of type '{kind}', which marks places in .*<Text>"):
        read(str(save(name, bad)), "words")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("write", [task, minimal], ids=["json", "json_min"])
@given(file=FILES, units=st.booleans())
@settings(max_examples=20, deadline=None)
def test_reading_label_studio_gives_back_what_was_written(folder, write, indent, file, units):
    file = [ANCHOR, *file]
    path = folder / "export.json"
    path.write_text(json.dumps([write(document, units=units) for document in file], indent=indent), encoding="utf-8")
    assert words(path) == words(path, format="label-studio") == file
    assert holds_words(str(path))
    assert f"{path}: read as label-studio" in read(str(path), "words").notes


def as_json(*records) -> str:
    return json.dumps(records, indent=1)


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


@pytest.mark.parametrize(
    ("kind", "value", "short", "wants", "label"),
    [
        ("rating", {"rating": 4}, [{"rating": 4}], "label", "4"),
        ("rating", {"rating": 4}, [{"rating": 4}], "number", 4.0),
        ("number", {"number": 3.5}, [{"number": 3.5}], "number", 3.5),
        ("taxonomy", {"taxonomy": [["Bird", "Owl"]]}, [{"taxonomy": [["Bird", "Owl"]]}], "label", "Bird / Owl"),
        (
            "taxonomy",
            {"taxonomy": [["Bird", "Owl"], ["Cat"]]},
            {"taxonomy": [["Bird", "Owl"], ["Cat"]]},
            "labels",
            ("Bird / Owl", "Cat"),
        ),
        ("textarea", {"text": ["an owl"]}, "an owl", "label", "an owl"),
    ],
)
def test_labels_of_other_kinds_of_label_studio_are_read(save, kind, value, short, wants, label):
    full = {"id": 1, "data": {"text": PETER.text}, "annotations": [{"result": [result(value, kind, "mine")]}]}
    record = {"id": 1, "text": PETER.text, "annotation_id": 4, "annotator": 1, "lead_time": 2.5, "mine": short}
    for name, content in (("a.json", as_json(full)), ("a.json", as_json(record)), ("a.csv", as_csv([record]))):
        (example,) = read(str(save(name, content)), wants, columns=Columns(label="mine")).examples
        assert (example.text, example.label) == (PETER.text, label)


def test_columns_of_label_studio_may_be_named(save):
    record = task(PETER, result(region(PETER, (6, 11, "ACT")), name="verbs"))
    path = save("a.json", as_json(record))
    assert words(path, columns=Columns(label="verbs")) == [Document(PETER.text, ((6, 11, "ACT"),))]


def test_results_that_are_no_spans_are_said(save):
    first = task(PETER, {"type": "relation"})
    path = save("a.json", as_json(first, task(PETER, {"type": "datetime"}, number=2)))
    notes = read(str(path), "words").notes
    line = len(as_json(first).splitlines())
    assert f"{path}: results of type 'relation', which are not read: 1 ({path}:2, record 1 (id 1))" in notes
    assert f"{path}: results of type 'datetime', which are not read: 1 ({path}:{line}, record 2 (id 2))" in notes


def test_cancelled_annotations_and_other_opinions_do_not_count(save):
    annotated = task(PETER)
    nothing = {"result": []}
    for others in ([{**nothing, "was_cancelled": True}], [annotated["annotations"][0]]):
        record = {**annotated, "annotations": [*others, *annotated["annotations"]]}
        assert words(save("a.json", as_json(record))) == [PETER]
    truth = {**annotated["annotations"][0], "ground_truth": True}
    assert words(save("a.json", as_json({**annotated, "annotations": [nothing, truth]}))) == [PETER]


BAD_TASKS = [
    (
        {"annotations": [{"result": []}, {"result": [result(region(PETER, (0, 5, "PER")))]}]},
        "2 annotations that differ;",
    ),
    ({"annotations": []}, "not annotated; a text without any entity says []"),
    ({"annotations": [{"was_cancelled": True, "result": []}]}, "not annotated"),
    ({"annotations": {}}, "annotations is not a list of annotations with a list of results each"),
    ({"annotations": [{"result": None}]}, "annotations is not a list of annotations"),
    ({"annotations": [{"result": [7]}]}, "annotations is not a list of annotations"),
    ({"annotations": [{"result": [result("x")]}]}, "a result of type 'labels' without a value or a from_name"),
    ({"annotations": [{"result": [result({"start": "/p[1]", "end": "/p[1]", "labels": ["X"]})]}]}, "{'start': '/p[1]'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_TASKS)
def test_bad_task_of_label_studio_is_refused_with_line_and_id(save, bad, message):
    good = task(PETER)
    path = save("a.json", as_json(good, {**task(PETER, number=9), **bad}))
    line = len(as_json(good).splitlines())
    with pytest.raises(DataError, match=refusal(f"{path}:{line}, record 2 (id 9)", message)):
        read(str(path), "words")


def test_texts_of_tasks_that_nobody_annotated_can_be_predicted(save):
    path = save("a.json", as_json({"id": 1, "data": {"text": "a"}, "annotations": []}))
    assert [example.text for example in read(str(path), "text").examples] == ["a"]


# Prodigy


def prodigy(document, tokens=None, answer="accept"):
    spans = [dict(zip(("start", "end", "label"), entry, strict=True)) for entry in document.spans]
    record = {"text": document.text, "_input_hash": 5, "answer": answer, **({"spans": spans} if spans else {})}
    if tokens is not None:
        record["tokens"] = [
            {"text": document.text[a:b], "start": a, "end": b, "id": i} for i, (a, b) in enumerate(tokens)
        ]
    return record


def lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@given(file=FILES, tokenised=st.booleans())
@settings(max_examples=20, deadline=None)
def test_reading_prodigy_gives_back_what_was_written(folder, file, tokenised):
    path = folder / "a.jsonl"
    tokens = [[(0, len(document.text))] if tokenised else None for document in file]
    path.write_text(lines(map(prodigy, file, tokens)), encoding="utf-8", newline="")
    assert words(path) == words(path, format="prodigy") == file


def test_tokens_of_prodigy_are_the_words(save):
    path = save("a.jsonl", lines([prodigy(Document("don't go", ()), [(0, 2), (2, 5), (5, 6), (6, 8)])]))
    (example,) = read(str(path), "words").examples
    assert example.words == ("do", "n't", "go")


def test_records_that_were_not_accepted_are_left_out_and_said(save):
    answers = ["accept", "reject", "ignore", "accept"]
    path = save("a.jsonl", lines(prodigy(PETER, answer=answer) for answer in answers))
    dataset = read(str(path), "words")
    assert [example.where for example in dataset.examples] == [f"{path}:1", f"{path}:4"]
    assert dataset.notes[:2] == [
        f"{path}: read as prodigy",
        f"{path}: records that were not accepted, left out: 2 ({path}:2 (reject), {path}:3 (ignore))",
    ]


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
    ("bad", "where", "message"),
    [
        ({"answer": None}, ":2", "answer None; expected accept, reject, ignore"),
        ({"answer": "yes"}, ":2", "answer 'yes'; expected accept, reject, ignore"),
        ({"tokens": [{"text": "Peter"}]}, ":2", "tokens have no start and end"),
        ({"tokens": [{"start": 0, "end": 5}]}, ":2", "'spoke' at 5 is in no token"),
    ],
)
def test_bad_record_of_prodigy_is_refused_with_its_line(save, bad, where, message):
    path = save("a.jsonl", lines([prodigy(PETER), {**prodigy(PETER), **bad}]))
    with pytest.raises(DataError, match=refusal(f"{path}{where}", message)):
        read(str(path), "words")


def test_file_without_an_accepted_record_is_refused(save):
    path = save("a.jsonl", lines([prodigy(PETER, answer="reject")]))
    with pytest.raises(DataError, match=refusal(path, "no record was accepted")):
        read(str(path), "words")


# brat


def annotations(document) -> str:
    return "".join(
        f"T{i}\t{kind} {start} {end}\t{document.text[start:end]}\n".replace("\n", " ").rstrip(" ") + "\n"
        for i, (start, end, kind) in enumerate(document.spans, start=1)
    )


def save_brat(folder, file) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for i, document in enumerate(file):
        (folder / f"doc.{i}.txt").write_bytes(b"\xef\xbb\xbf" + document.text.encode())
        (folder / f"doc.{i}.ann").write_bytes(annotations(document).encode())


@given(file=FILES)
@settings(max_examples=20, deadline=None)
def test_reading_brat_gives_back_what_was_written(folder, file):
    save_brat(folder / "brat", file)
    assert words(folder / "brat") == file
    for ending in ("txt", "ann"):
        assert words(folder / "brat" / f"doc.0.{ending}") == file[:1]


@pytest.fixture
def brat(tmp_path):
    """A folder with one document, whose annotations a test may replace."""
    save_brat(tmp_path / "brat", [PETER])
    return tmp_path / "brat"


def test_folder_of_brat_is_a_source_of_words_whose_records_are_documents(brat):
    assert holds_words(str(brat))
    dataset = read(str(brat), "words")
    assert [example.where for example in dataset.examples] == [f"{brat / 'doc.0.txt'}:1"]
    assert dataset.notes[0] == f"{brat}: read as brat"


def test_lines_of_brat_that_are_no_entities_are_said(brat):
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
    kinds = ["relations", "events", "attributes", "notes", "equivalences"]
    assert dataset.notes[1:6] == [
        f"{brat}: {kind}, which are not read: 1 ({brat / 'doc.0.ann'}:{line})"
        for line, kind in enumerate(kinds, start=2)
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
        ("T2\tPER 0 2;3 5\tPe er", "an entity of several parts (0 2;3 5), which no tags of words can say"),
        (
            "T2\tPER 0 5 Peter",
            "'T2\\tPER 0 5 Peter' is not an annotation of brat's: ID, tab, TYPE START END, tab, text",
        ),
        ("T2\tPER -1 5\tPeter", "'T2\\tPER -1 5\\tPeter' is not an annotation of brat's"),
        ("what is this", "'what is this' is not an annotation of brat's"),
        ("T2\tPER 6 10\tspoke", "span 6-10 (PER) reads 'spok', but should read 'spoke'; that stands at 6-11"),
        ("T2\tPER 6 40\tspoke", "span 6-40 (PER) lies outside the text, which has 11 characters"),
        ("T2\tORG 0 5\tPeter", "span 0-5 (PER) and span 0-5 (ORG) overlap"),
    ],
)
def test_bad_line_of_brat_is_refused_with_its_number(brat, bad, message):
    (brat / "doc.0.ann").write_text(annotations(PETER) + "#1\tx\n" + bad + "\n")
    with pytest.raises(DataError, match=refusal(f"{brat / 'doc.0.ann'}:3", message)):
        read(str(brat), "words")


@pytest.mark.parametrize(("left", "lost"), [("txt", "ann"), ("ann", "txt")])
def test_half_of_a_pair_of_brat_is_refused(brat, left, lost):
    save_brat(brat, [PETER, PETER])
    (brat / f"doc.0.{lost}").unlink()
    with pytest.raises(DataError, match=refusal(brat / f"doc.0.{left}", f"there is no doc.0.{lost} beside it; ")):
        read(str(brat), "words")


def test_empty_text_of_brat_is_refused(brat):
    (brat / "doc.0.txt").write_text("\n")
    with pytest.raises(DataError, match=refusal(brat / "doc.0.txt", "the file is empty")):
        read(str(brat), "words")


# spaCy


def doc_of(document, vocab):
    """A Doc whose tokens end where spans and white space begin and end."""
    spacy = pytest.importorskip("spacy", reason="the extra spacy is not installed")
    text = document.text
    spaces = {at for i, c in enumerate(text) if c.isspace() for at in (i, i + 1)}
    cuts = sorted({0, len(text), *spaces, *(at for entry in document.spans for at in entry[:2])})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    doc = spacy.tokens.Doc(vocab, words=pieces, spaces=[False] * len(pieces))
    doc.set_ents([doc.char_span(start, end, kind) for start, end, kind in document.spans])
    return doc


def save_docs(path, docs) -> None:
    from spacy.tokens import DocBin

    DocBin(docs=docs, store_user_data=True).to_disk(path)


@pytest.fixture(scope="module")
def vocab():
    return pytest.importorskip("spacy", reason="the extra spacy is not installed").vocab.Vocab()


@given(file=FILES)
@settings(max_examples=20, deadline=None)
def test_reading_docbin_gives_back_what_was_written(folder, vocab, file):
    save_docs(folder / "a.spacy", [doc_of(document, vocab) for document in file])
    assert words(folder / "a.spacy") == file


def test_docbin_keeps_the_tokens_and_knows_its_rows(tmp_path, vocab):
    from spacy.tokens import Doc

    doc = Doc(vocab, words=["do", "n't", "go"], spaces=[False, True, False], ents=["O", "O", "B-ACT"])
    save_docs(tmp_path / "a.spacy", [doc])
    assert holds_words(str(tmp_path / "a.spacy"))
    (example,) = read(str(tmp_path / "a.spacy"), "words").examples
    assert (example.text, example.words, example.tags) == ("don't go", ("do", "n't", "go"), ("O", "O", "B-ACT"))
    assert example.where == f"{tmp_path / 'a.spacy'}:1"


@pytest.mark.parametrize("cats", [{"x": 1.0, "y": 0.0}, {"x": 1, "y": 0}])
def test_categories_of_docbin_are_labels(tmp_path, vocab, cats):
    doc = doc_of(PETER, vocab)
    doc.cats = cats
    save_docs(tmp_path / "a.spacy", [doc])
    assert [example.label for example in read(str(tmp_path / "a.spacy")).examples] == ["x"]


def test_span_group_of_docbin_may_be_named(tmp_path, vocab):
    doc = doc_of(Document(PETER.text, ((6, 11, "ACT"),)), vocab)
    doc.spans["sc"] = [doc.char_span(0, 6, "PER")]
    save_docs(tmp_path / "a.spacy", [doc])
    assert words(tmp_path / "a.spacy", columns=Columns(label="sc")) == [PETER]


def test_docbin_without_entities_is_refused_for_words(tmp_path, vocab):
    from spacy.tokens import Doc

    save_docs(tmp_path / "a.spacy", [doc_of(PETER, vocab), Doc(vocab, words=["a"])])
    with pytest.raises(DataError, match=refusal(f"{tmp_path / 'a.spacy'}:2", "not annotated; ")):
        read(str(tmp_path / "a.spacy"), "words")


@pytest.mark.parametrize("content", ["text,label\na,b\n", b"\x78\x9c\x03\x00\x00\x00\x00\x01"])
def test_file_that_is_no_docbin_is_refused(save, vocab, content):
    path = save("a.spacy", content)
    with pytest.raises(DataError, match=refusal(path, "no DocBin of spaCy's: ")):
        read(str(path), "words")


def test_missing_spacy_is_refused_with_the_command_that_installs_it(save, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy.tokens", None)
    with pytest.raises(DataError, match=re.escape("pip install 'lorakit[spacy]'")):
        read(str(save("a.spacy", "x")), "words")
