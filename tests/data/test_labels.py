"""Labels of every kind, read from tables; those that are none are refused with file and line."""

from __future__ import annotations

import json
import math
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


@given(st.lists(NAMES, unique=True))
def test_joined_labels_are_read_back(names):
    assert label_of("|".join(names), "labels", "|") == tuple(names)


@pytest.mark.parametrize("cell", ["a,,b", "a,", ",", None, 3, True, ["a", None], ["a", ""], [["a"]], [1.5]])
def test_what_is_no_list_of_labels_is_refused(cell):
    with refused(f"column 'label' holds {cell!r}, not labels"):
        label_of(cell, "labels")


def test_label_that_stands_twice_is_refused():
    for cell in ("a,b,a", ["a", "b", "a"], "a, a"):
        with refused("label 'a' appears twice in column 'label'"):
            label_of(cell, "labels")


def test_columns_of_zeros_and_ones_are_labels_and_others_refused():
    read_both = label_reader("labels", ("x", "y"))
    for cells, labels in ((("1", "0"), ("x",)), ((True, 1), ("x", "y")), ((0.0, False), ()), (("1.0", "0"), ("x",))):
        assert read_both(Row(dict(zip(("x", "y"), cells, strict=True)), "a.csv:7")) == labels
    for cell in ("", "2", "yes", None, 0.5, math.nan):
        with refused(f"column 'y' holds {cell!r}, not 0 or 1"):
            read_both(Row({"x": "1", "y": cell}, "a.csv:7"))
    with pytest.raises(ConfigError, match=r"^data\.label names 2 columns \(x, y\); this task needs one number"):
        label_reader("number", ("x", "y"))


# Numbers


def test_number_is_read():
    assert {label_of(cell, "number") for cell in ("3.5", 3.5, " 3.5 ", "35e-1")} == {3.5}


def test_decimal_comma_is_read_and_noted_and_refused_beside_a_point(save):
    for cell, number in (("3,5", 3.5), ("-12,25", -12.25), ("0,125", 0.125), ("1,2345", 1.2345)):
        path = save("a.csv", f"text;score\na;{cell}\n")
        dataset = read(str(path), "number")
        assert dataset.examples[0].label == number
        assert f"{path}: numbers with a decimal comma in column 'score'" in dataset.notes
    for other in ("1.000", "2.5"):
        path = save("a.csv", f"text;score\na;-0,5\nb;{other}\n")
        with pytest.raises(
            DataError, match=f"mixes decimal commas and '{re.escape(other)}'; write all numbers the same way"
        ):
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


def test_shares_are_read_and_made_to_sum_to_1():
    for cell in ({"a": 0.25, "b": 0.75}, {"a": 0, "b": 1}, {"a": "0.5", "b": "0.5"}):
        assert label_of(cell, "label") == {name: float(share) for name, share in cell.items()}
    assert label_of({"a": 0.333, "b": 0.333, "c": 0.333}, "label") == pytest.approx(dict.fromkeys("abc", 1 / 3))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        *((cell, "the shares of the labels") for cell in ({"a": 0.5, "b": 0.498}, {"a": 1, "b": 1}, {"a": 0}, {})),
        (
            {"x": 1, "y": 1.0, "z": 0},
            "the shares of the labels x, y, z sum to 2, not to 1; for several labels, set task",
        ),
        (
            "['x', 'y']",
            "column 'label' holds 2 labels, ['x', 'y'], but this task needs one; for several, set task.name",
        ),
        *(
            ({"a": 1, "b": share}, f"label 'b' has {share!r}, not a share from 0 to 1")
            for share in (-0.1, "x", None, math.nan, True)
        ),
    ],
)
def test_what_is_not_one_label_or_shares_of_1_is_refused(cell, message):
    with refused(message):
        label_of(cell, "label")


# Through the reader


@pytest.mark.parametrize(
    ("wants", "columns", "labels"),
    [
        ("labels", Columns(label="topics", label_separator=";"), [("plot", "cast"), ()]),
        ("labels", Columns(label=("x", "y")), [("x",), ("x", "y")]),
        ("number", Columns(label="x"), [1.0, 1.0]),
        ("label", Columns(label=("good", "bad")), [{"good": 0.25, "bad": 0.75}, {"good": 0.0, "bad": 1.0}]),
    ],
)
def test_labels_are_read_from_columns_of_a_table(save, wants, columns, labels):
    path = save("a.csv", 'text,topics,x,y,z,good,bad\na film,"plot;cast",1,0,0,0.25,0.75\na scene,,1,1,0,0,1\n')
    assert [e.label for e in read(str(path), wants, columns=columns).examples] == labels


def test_columns_of_labels_without_a_mark_or_a_place_are_noted_and_refused(save):
    path = save("a.csv", "text,plot,cast\na film,1,0\n")
    assert (
        f"{path}: no record has the label cast"
        in read(str(path), "labels", columns=Columns(label=("plot", "cast"))).notes
    )
    with pytest.raises(DataError, match=r"a\.csv: data\.label = 'cats' is not a column; did you mean 'cast'\?"):
        read(str(path), "labels", columns=Columns(label=("plot", "cats")))


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
        ("a,b", ("a", "b")),
        ("a", ("a",)),
        ("", ()),
        ("  ", ()),
        (" a , b c ", ("a", "b c")),
        (["b", 3], ("b", "3")),
        ([], ()),
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


def test_one_label_is_read_however_it_is_written():
    cells = {"['x']": "x", "[x]": "[x]", True: "True", False: "False", 5.0: "5", -3: "-3"}
    assert [label_of(cell, "label") for cell in cells] == [*cells.values()]


def test_long_list_with_an_item_without_quotes_takes_no_time():
    names = [f"x{i}" for i in range(200)]
    cell = "[" + "\n ".join(map(repr, names)) + "\n None]"  # as numpy wraps it
    start = time.thread_time()
    label_of(cell, "labels")
    assert time.thread_time() - start < 1


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
        match=r"a\.jsonl: column 'labels' has a 0 or 1 for each label, but not their names; .*set data\.label=NAME,NAME",
    ):
        read(str(path), "labels")


def test_dummies_of_pandas_are_labels(tmp_path: Path):
    table = pd.DataFrame({"text": ["one", "two", "three"], "t": ["x", "y", "x"]})
    pd.get_dummies(table, columns=["t"]).to_csv(tmp_path / "a.csv", index=False)
    found = read(str(tmp_path / "a.csv"), "labels", columns=Columns(label=("t_x", "t_y")))
    assert [example.label for example in found.examples] == [("t_x",), ("t_y",), ("t_x",)]


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
            "has decimal numbers, and each becomes a label; to predict the number, set task.name=",
        ),
        (["1.0", "0.0"], "label", None),
        (["v1.5", "2.5"], "label", None),
        (["1.5", "2.0"], "number", None),
        (["x|y", "y"], "labels", "holds '|'; if it separates labels, set data.label_separator=|"),
        (["x;y", "y"], "labels", "holds ';'; if it separates labels, set data.label_separator=;"),
        (["x|y,z", "y"], "labels", None),
    ],
)
def test_what_cells_of_labels_may_mean_instead_is_said(
    tmp_path: Path, cells: list[str], wants: Wants, note: str | None
):
    path = tmp_path / "a.csv"
    pd.DataFrame({"text": ["a", "b"], "label": cells}).to_csv(path, index=False)
    told = [found for found in read(str(path), wants).notes if "column 'label' h" in found]
    assert [found.startswith(f"{path}: column 'label' {note}") for found in told] == [True] * (note is not None)
