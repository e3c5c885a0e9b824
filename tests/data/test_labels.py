"""Labels of every kind, read from tables; those that are none are refused with file and line."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.columns import label_reader
from lorakit.data.delimited import Row
from lorakit.data.example import Columns, Label, Wants
from lorakit.data.read import read
from lorakit.errors import ConfigError, DataError

NAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="|"), min_size=1)


def label_of(value: Any, wants: Wants, separator: str = ",") -> Label:
    return label_reader(wants, "label", separator)(Row({"label": value}, "a.csv:7"))


def refused(message: str) -> Any:
    return pytest.raises(DataError, match="^" + re.escape(f"a.csv:7: {message}"))


# Several labels


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("a,b", ("a", "b")),
        ("a", ("a",)),
        ("", ()),
        ("  ", ()),
        (" a , b c ", ("a", "b c")),
        (["b", 3], ("b", "3")),
        ([], ()),
    ],
)
def test_labels_come_from_a_cell_or_a_list(cell, labels):
    assert label_of(cell, "labels") == labels


@given(st.lists(NAMES, unique=True))
def test_joined_labels_are_read_back(names):
    assert label_of("|".join(names), "labels", "|") == tuple(names)


@pytest.mark.parametrize("cell", ["a,,b", "a,", ",", None, 3, True, ["a", None], ["a", ""], [["a"]], [1.5]])
def test_what_is_no_list_of_labels_is_refused(cell):
    with refused(f"column 'label' holds {cell!r}, not labels"):
        label_of(cell, "labels")


@pytest.mark.parametrize("cell", ["a,b,a", ["a", "b", "a"], "a, a"])
def test_label_that_stands_twice_is_refused(cell):
    with refused("label 'a' stands twice in column 'label'"):
        label_of(cell, "labels")


@pytest.mark.parametrize(
    ("cells", "labels"), [(("1", "0"), ("x",)), ((True, 1), ("x", "y")), ((0.0, False), ()), (("1.0", "0"), ("x",))]
)
def test_columns_of_zeros_and_ones_are_labels(cells, labels):
    row = Row(dict(zip(("x", "y"), cells, strict=True)), "a.csv:7")
    assert label_reader("labels", ("x", "y"))(row) == labels


@pytest.mark.parametrize("cell", ["", "2", "yes", None, 0.5, float("nan")])
def test_column_of_something_else_is_refused(cell):
    with refused(f"column 'y' holds {cell!r}, not 0 or 1"):
        label_reader("labels", ("x", "y"))(Row({"x": "1", "y": cell}, "a.csv:7"))


def test_several_columns_hold_no_number():
    with pytest.raises(ConfigError, match=r"^data\.label names 2 columns \(x, y\); this task wants one number"):
        label_reader("number", ("x", "y"))


# Numbers


@pytest.mark.parametrize("cell", ["3.5", 3.5, " 3.5 ", "35e-1"])
def test_number_is_read(cell):
    assert label_of(cell, "number") == 3.5


@pytest.mark.parametrize(("cell", "number"), [("3,5", 3.5), ("-12,25", -12.25), ("0,125", 0.125), ("1,2345", 1.2345)])
def test_decimal_comma_is_read_and_said(save, cell, number):
    path = save("a.csv", f"text;score\na;{cell}\n")
    dataset = read(str(path), "number")
    assert dataset.examples[0].label == number
    assert f"{path}: numbers with a decimal comma in column 'score'" in dataset.notes


@pytest.mark.parametrize("other", ["1.000", "2.5"])
def test_point_beside_decimal_commas_is_refused(tmp_path: Path, other: str):
    path = tmp_path / "a.csv"
    path.write_text(f"text;label\na;-0,5\nb;{other}\n")
    with pytest.raises(DataError, match=re.escape(f"holds decimal commas and '{other}'; write all numbers in one way")):
        read(str(path), "number")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_written_number_is_read_back(x):
    assert label_of(repr(x), "number") == x


@pytest.mark.parametrize(
    "cell",
    ["nan", "inf", "-Infinity", float("nan"), "1e999", 10**400, "", "x", "1_0", "3,512", "1,2,3", None, True, [1]],
)
def test_what_is_no_finite_number_is_refused(cell):
    shown = repr(cell) if len(repr(cell)) < 80 else repr(cell)[:77] + "..."
    with refused(f"column 'label' holds {shown}, not a finite number"):
        label_of(cell, "number")


# Shares


@pytest.mark.parametrize("cell", [{"a": 0.25, "b": 0.75}, {"a": 0, "b": 1}, {"a": "0.5", "b": "0.5"}])
def test_shares_are_read(cell):
    assert label_of(cell, "label") == {name: float(share) for name, share in cell.items()}


def test_shares_within_a_thousandth_of_1_are_made_to_sum_to_1():
    assert label_of({"a": 0.333, "b": 0.333, "c": 0.333}, "label") == pytest.approx(dict.fromkeys("abc", 1 / 3))


@pytest.mark.parametrize("cell", [{"a": 0.5, "b": 0.498}, {"a": 1, "b": 1}, {"a": 0}, {}])
def test_shares_that_do_not_sum_to_1_are_refused(cell):
    with refused("the shares of the labels"):
        label_of(cell, "label")


@pytest.mark.parametrize("share", [-0.1, "x", None, float("nan"), True])
def test_what_is_no_share_is_refused(share):
    with refused(f"label 'b' has {share!r}, not a share from 0 to 1"):
        label_of({"a": 1, "b": share}, "label")


# Through the reader


def test_labels_are_read_from_a_table(tmp_path: Path):
    path = tmp_path / "topics.csv"
    path.write_text('text,topics,x,y\na film,"plot;cast",1,0\na scene,,1,1\n')
    columns = Columns(label="topics", label_separator=";")
    assert [e.label for e in read(str(path), "labels", columns=columns).examples] == [("plot", "cast"), ()]
    columns = Columns(label=("x", "y"))
    assert [e.label for e in read(str(path), "labels", columns=columns).examples] == [("x",), ("x", "y")]
    assert [e.label for e in read(str(path), "number", columns=Columns(label="x")).examples] == [1.0, 1.0]


def test_column_that_no_record_marks_is_said(tmp_path: Path):
    path = tmp_path / "topics.csv"
    path.write_text("text,plot,cast\na film,1,0\n")
    notes = read(str(path), "labels", columns=Columns(label=("plot", "cast"))).notes
    assert f"{path}: no record has the label cast" in notes


def test_shares_are_read_from_columns(tmp_path: Path):
    path = tmp_path / "topics.csv"
    path.write_text("text,good,bad\na film,0.25,0.75\n")
    (example,) = read(str(path), "label", columns=Columns(label=("good", "bad"))).examples
    assert example.label == {"good": 0.25, "bad": 0.75}


def test_missing_column_of_several_is_refused(tmp_path: Path):
    path = tmp_path / "topics.csv"
    path.write_text("text,plot,cast\na film,1,0\n")
    with pytest.raises(DataError, match=r"topics\.csv: data\.label = 'cats' is not a column; did you mean 'cast'\?"):
        read(str(path), "labels", columns=Columns(label=("plot", "cats")))


def test_lists_of_labels_are_read_from_json_lines(tmp_path: Path):
    path = tmp_path / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "labels": labels}) + "\n" for labels in ([], ["b", "a"], [3])))
    assert [e.label for e in read(str(path), "labels").examples] == [(), ("b", "a"), ("3",)]


def test_bad_line_is_named(tmp_path: Path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"text": "x", "label": 1.5}\n{"text": "x", "label": NaN}\n')
    with pytest.raises(DataError, match=r"scores\.jsonl:2: column 'label' holds nan, not a finite number"):
        read(str(path), "number")


# Lists as pandas and numpy write them, vectors, dicts


@given(
    st.lists(
        st.lists(
            st.text(st.characters(categories=["L", "N"], include_characters="' -\"\\\\"), min_size=1)
            .filter(str.strip)
            .map(str.strip),
            unique=True,
        ),
        min_size=1,
    )
)
def test_lists_in_a_table_of_pandas_are_read_back(tmp_path_factory: pytest.TempPathFactory, lists: list[list[str]]):
    path = tmp_path_factory.getbasetemp() / "lists.csv"
    pd.DataFrame({"text": ["a text"] * len(lists), "labels": lists}).to_csv(path, index=False)
    assert [example.label for example in read(str(path), "labels").examples] == [tuple(names) for names in lists]


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("['x' 'y']", ("x", "y")),
        ("[]", ()),
        ("[ ]", ()),
        ("[1, 22]", ("1", "22")),
        ("[x, y]", ("x", "y")),
        ('["x", "it\'s"]', ("x", "it's")),
        ({"x": 1.0, "y": 0, "z": True}, ("x", "z")),
        ({}, ()),
        ([3.0, 4], ("3", "4")),
    ],
)
def test_several_labels_are_read_however_they_are_listed(cell: Any, labels: tuple[str, ...]):
    assert label_of(cell, "labels") == labels


@pytest.mark.parametrize(
    ("cell", "label"), [("['x']", "x"), ("[x]", "[x]"), (True, "True"), (False, "False"), (5.0, "5"), (-3, "-3")]
)
def test_one_label_is_read_however_it_is_written(cell: Any, label: str):
    assert label_of(cell, "label") == label


def test_long_list_with_an_item_without_quotes_takes_no_time():
    names = [f"x{i}" for i in range(200)]
    cell = "[" + "\n ".join(map(repr, names)) + "\n None]"  # as numpy wraps it
    start = time.perf_counter()
    label_of(cell, "labels")
    assert time.perf_counter() - start < 1


def test_list_of_several_is_not_one_label():
    with refused("column 'label' holds 2 labels, ['x', 'y'], where one is wanted; for several say task.name"):
        label_of("['x', 'y']", "label")


@pytest.mark.parametrize(
    "cells",
    [
        ([1, 0, 0], [0, 1, 1]),
        ("[1, 0]", "[0, 1]"),
        ("1,0,0", "0,0,0"),
        ("[1. 0.]", "[0. 1.]"),
        ([True, False], [False, False]),
    ],
)
def test_vectors_without_names_are_refused_with_the_remedy(tmp_path: Path, cells: Any):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "labels": cell}) + "\n" for cell in cells))
    with pytest.raises(
        DataError,
        match=r"a\.jsonl: column 'labels' holds a 0 or 1 for each label, but not their names; .*say data\.label=NAME,NAME",
    ):
        read(str(path), "labels")


def test_dummies_of_pandas_are_labels(tmp_path: Path):
    table = pd.DataFrame({"text": ["one", "two", "three"], "t": ["x", "y", "x"]})
    pd.get_dummies(table, columns=["t"]).to_csv(tmp_path / "a.csv", index=False)
    found = read(str(tmp_path / "a.csv"), "labels", columns=Columns(label=("t_x", "t_y")))
    assert [example.label for example in found.examples] == [("t_x",), ("t_y",), ("t_x",)]


def test_several_marks_are_no_shares():
    with refused("the shares of the labels x, y, z sum to 2, not to 1; for several labels say task.name=multi_label"):
        label_of({"x": 1, "y": 1.0, "z": 0}, "label")


def test_cats_are_found_by_their_name(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "cats": {"x": x, "y": 1 - x}}) + "\n" for x in (0.0, 1.0)))
    assert [e.label for e in read(str(path), "labels").examples] == [("y",), ("x",)]
    assert [e.label for e in read(str(path)).examples] == [{"x": 0.0, "y": 1.0}, {"x": 1.0, "y": 0.0}]


@pytest.mark.parametrize(
    ("cells", "wants", "note"),
    [
        (
            ["1.5", "2.0"],
            "label",
            "holds decimal numbers, each a label of its own; to predict the number say task.name=",
        ),
        (["1.0", "0.0"], "label", None),
        (["v1.5", "2.5"], "label", None),
        (["1.5", "2.0"], "number", None),
        (["x|y", "y"], "labels", "holds '|'; if it stands between labels, say data.label_separator=|"),
        (["x;y", "y"], "labels", "holds ';'; if it stands between labels, say data.label_separator=;"),
        (["x|y,z", "y"], "labels", None),
    ],
)
def test_what_cells_of_labels_may_mean_instead_is_said(
    tmp_path: Path, cells: list[str], wants: Wants, note: str | None
):
    path = tmp_path / "a.csv"
    pd.DataFrame({"text": ["a", "b"], "label": cells}).to_csv(path, index=False)
    told = [found for found in read(str(path), wants).notes if "'label' holds" in found]
    assert [found.startswith(f"{path}: column 'label' {note}") for found in told] == [True] * (note is not None)
