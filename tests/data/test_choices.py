"""Questions with choices, in the forms in which people publish them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.choices import usual_choices
from lorakit.data.delimited import Row
from lorakit.data.example import Columns
from lorakit.data.read import find_choices, read
from lorakit.errors import DataError

WATER = ("It boils.", "It burns.", "It sings.", "It rusts.")


def lettered(*texts: str) -> dict[str, list[str]]:
    return {"label": list("ABCDE"[: len(texts)]), "text": list(texts)}


# By the data set that has it: records, and the text, choices and right letter of each
FORMS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, tuple[str, ...], str]]]] = {
    "swag": (
        [
            {"sent1": "He sits.", "sent2": "He", **{f"ending{i}": f"{x}." for i, x in enumerate("abcd")}, "label": 3},
            {"sent1": "She runs.", "sent2": "She", **{f"ending{i}": f"{x}." for i, x in enumerate("efgh")}, "label": 0},
        ],
        [
            ("He sits.", ("He a.", "He b.", "He c.", "He d."), "D"),
            ("She runs.", ("She e.", "She f.", "She g.", "She h."), "A"),
        ],
    ),
    "hellaswag": (
        [{"ctx": "A pot", "endings": list(WATER), "label": "3"}, {"ctx": "A pan", "endings": ["x", "y"], "label": "0"}],
        [("A pot", WATER, "D"), ("A pan", ("x", "y"), "A")],
    ),
    "commonsense_qa": (
        [{"question": "What does water do?", "choices": lettered(*WATER), "answerKey": "B"}],
        [("What does water do?", WATER, "B")],
    ),
    "arc": (  # some of whose choices have numbers
        [
            {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
            {"question": "What?", "choices": lettered("x", "y", "z"), "answerKey": "C"},
        ],
        [("Which?", ("x", "y"), "A"), ("What?", ("x", "y", "z"), "C")],
    ),
    "mmlu": (
        [{"question": "2 + 2?", "choices": ["1", "2", "4", "5"], "answer": i} for i in (0, 3, 2)],
        [("2 + 2?", ("1", "2", "4", "5"), letter) for letter in "ADC"],
    ),
    "race": (
        [{"article": "Long ago.", "question": "When?", "options": ["Now.", "Then."], "answer": "B"}],
        [("Long ago.", ("When? Now.", "When? Then."), "B")],
    ),
    "winogrande": (
        [{"sentence": "_ ran.", "option1": "Al", "option2": "Bo", "answer": answer} for answer in "12"],
        [("_ ran.", ("Al", "Bo"), letter) for letter in "AB"],
    ),
    "piqa": (
        [{"goal": "Cut bread.", "sol1": "A saw.", "sol2": "A knife.", "label": label} for label in (1, 0)],
        [("Cut bread.", ("A saw.", "A knife."), letter) for letter in "BA"],
    ),
    "social_iqa": (
        [
            {"context": "Al fell.", "question": "Why?", "answerA": "Ice.", "answerB": "Joy.", "answerC": "Fun.", "label": x}
            for x in "13"
        ],
        [("Al fell.", ("Why? Ice.", "Why? Joy.", "Why? Fun."), letter) for letter in "AC"],
    ),
    "medqa": (
        [{"question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"}],
        [("Which?", ("x", "y"), "B")],
    ),
    "medmcqa": (
        [{"question": "Which?", "opa": "x", "opb": "y", "opc": "z", "cop": i} for i in (0, 2)],
        [("Which?", ("x", "y", "z"), letter) for letter in "AC"],
    ),
    "letters": (
        [{"question": "Which?", "A": "x", "B": "y", "C": "z", "answer": " (b) "}],
        [("Which?", ("x", "y", "z"), "B")],
    ),
    "texts": (
        [{"question": "2 + 2?", "choices": ["4", "2", "3"], "answer": "4"}, {"question": "?", "choices": [10, 12], "answer": 12}],
        [("2 + 2?", ("4", "2", "3"), "A"), ("?", ("10", "12"), "B")],
    ),
}  # fmt: skip


def write(folder: Path, records: list[dict[str, Any]], ending: str = "jsonl") -> str:
    path = folder / f"data.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        import pandas as pd

        pd.DataFrame(records).to_csv(path, index=False)
    return str(path)


def read_choices(source: str, **columns: Any) -> list[tuple[str, tuple[str, ...], Any]]:
    chosen = Columns(choices=columns.pop("choices", None) or find_choices(source), **columns)
    return [(e.text, e.choices, e.label) for e in read(source, "choices", columns=chosen).examples]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_published_form_is_read_without_being_told(form: str, ending: str, tmp_path: Path) -> None:
    records, expected = FORMS[form]
    assert read_choices(write(tmp_path, records, ending)) == expected


def test_unlabelled_questions_are_read_for_prediction(tmp_path: Path) -> None:
    source = write(tmp_path, [{"question": "Which?", "choice1": "x", "choice2": "y"}])
    (example,) = read(source, "text", columns=Columns(choices=("choice1", "choice2"))).examples
    assert (example.choices, example.label) == (("x", "y"), None)


def test_table_read_piece_by_piece_means_the_same_throughout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.streaming.PIECE", 2)
    rows = [{"question": "?", "option1": "x", "option2": "y", "option3": "z", "answer": a} for a in (1, 3, 1, 2)]
    source = write(tmp_path, rows)
    columns = Columns(choices=("option1", "option2", "option3"))
    assert [e.label for e in read(source, "choices", columns=columns, again=True).examples] == ["A", "C", "A", "B"]


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"question": "?", "text": "x"}, {}, "which columns are the choices? Set data.choices=NAME"),
        ({"question": "?", "choices": ["x"], "answer": 0}, {}, "1: column 'choices': 1 choices, not 2 to 26"),
        ({"question": "?", "choices": ["x"] * 27, "answer": 0}, {}, "not 2 to 26; for more name pairs, with task.name="),
        ({"question": "?", "choices": ["x", None], "answer": 0}, {}, "choice 2 is None, not a text"),
        ({"question": "?", "choices": ["x", {}], "answer": 0}, {}, "choice 2 is {}, not a text"),
        ({"question": "?", "choices": "x", "answer": 0}, {"choices": "choices"}, "holds 'x', not a list of choices"),
        ({"question": "?", "choices": ["x", "y", "z"], "answer": "D"}, {}, "column 'answer' does not name choices"),
        ({"question": "?", "choices": ["x", "y", "z"], "answer": 1}, {}, "number of a choice, from 0 or the number of a "),
        ({"question": "?", "choices": ["x", "y"], "answer": 2}, {"answers": "from_0"}, "holds 2, not the number of a choice"),
        ({"question": "?", "choices": ["x", "x"], "answer": "x"}, {}, "column 'answer' does not name choices"),
        ({"question": "?", "choices": ["x", "y"]}, {}, "which column is the answer? Set data.label=NAME"),
        ({"question": "?", "choices": ["x", "y"], "answer": 0}, {"choices": "chioces"}, "data.choices = 'chioces' is not a"),
        ({"query": "?", "choices": ["x", "y"], "answer": 0}, {}, "which column is the question? Set data.text=NAME"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_words(
    record: dict[str, Any], columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_choices(write(tmp_path, [record]), **columns)


def test_bad_question_is_skipped_where_the_recipe_says_so(tmp_path: Path) -> None:
    rows = [{"question": "?", "choices": choices, "answer": "B"} for choices in (["x", "y"], ["x"], ["z", "w"])]
    columns = Columns(choices="choices", on_bad="skip")
    dataset = read(write(tmp_path, rows), "choices", columns=columns)
    assert len(dataset.examples) == 2 and dataset.left_out == 1


def test_usual_columns_come_in_the_order_of_their_numbers() -> None:
    for names in (("ending10", "ending1", "ending0", "ending2"), ("C", "A", "B"), ("option_b", "option_a")):
        row = Row({"question": "?", **dict.fromkeys(names, "x")}, "a:1")
        found = usual_choices([row])
        assert isinstance(found, tuple) and list(found) == sorted(names, key=lambda name: (len(name), name))
    assert usual_choices([Row({"question": "?", "answer": "x", "b": "y", "c": "z"}, "a:1")]) is None
