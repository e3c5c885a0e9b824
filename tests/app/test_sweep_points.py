"""The points of a sweep: grids, ranges and files, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from sklearn.model_selection import ParameterGrid

from lorakit.app.sweep.points import (
    Choice,
    Range,
    draw_points,
    grid,
    joined_points,
    parse_axes,
    read_points,
    word,
)
from lorakit.errors import ConfigError, DataError, LorakitError
from lorakit.recipe import make_recipe


def test_grid_has_the_points_of_scikit_learns() -> None:
    axes = parse_axes(["lora.r=4,8", "train.lr=3e-4,1e-3,2", "train.schedule=linear,cosine"])
    values = {axis.key: axis.values for axis in axes if isinstance(axis, Choice)}
    points = grid(axes)
    assert len(points) == 12
    assert all(point in points for point in ParameterGrid(values))
    assert points[1] == {"lora.r": 4, "train.lr": 3e-4, "train.schedule": "cosine"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[query,value],[query]", [["query", "value"], ["query"]]),
        ('["query", "value"]', [["query", "value"]]),
        (r"'.*\.(query|value)',[key]", [r".*\.(query|value)", ["key"]]),
        ("all-linear", ["all-linear"]),
    ],
)
def test_brackets_make_lists_and_commas_points(text: str, values: list[Any]) -> None:
    (axis,) = parse_axes([f"lora.target_modules={text}"])
    assert axis == Choice("lora.target_modules", values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.lr"], r"'train\.lr': a sweep takes section\.key=value,value"),
        (["train.lr=1e-3,"], "value 2 of 2 is empty"),
        (["train.lr=1e-3,0.001"], "1e-3 is there twice"),
        (["train.lr=1e-3", "train.lr=1e-4"], r"train\.lr is there twice"),
        (["train.lr=1e-2..1e-5"], "the range is empty"),
        (["train.seeds=0,1"], "--seeds 0,1,2"),
        (["lora.target_modules=query,value"], r"say \[query,value\] for one point"),
        (["data.label=a,b"], r"data\.label takes lists"),
    ],
)
def test_parse_axes_refuses(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_axes(words)


def test_grid_refuses_a_range() -> None:
    with pytest.raises(ConfigError, match="--random N"):
        grid(parse_axes(["train.lr=1e-5..1e-2"]))


VALUES = st.recursive(
    st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_word_says_any_value_so_that_a_recipe_reads_it(value: Any) -> None:
    import tomllib

    key, _, text = word("train.lr", value).partition("=")
    assert (key, tomllib.loads(f"value = {text}")["value"]) == ("train.lr", value)


def test_draws_are_log_uniform_reproducible_and_of_each_key_alone() -> None:
    axes = parse_axes(["train.lr=1e-5..1e-2", "lora.r=2..5", "train.schedule=linear,cosine", "lora.dropout=0.0..0.5"])
    points = draw_points(axes, 300, seed=0)
    exponents = [(math.log10(point["train.lr"]) + 5) / 3 for point in points]
    assert kstest(exponents, "uniform").pvalue > 0.01
    assert kstest([2 * point["lora.dropout"] for point in points], "uniform").pvalue > 0.01
    assert {point["lora.r"] for point in points} == {2, 3, 4, 5}
    assert points == draw_points(axes, 300, seed=0)
    assert points[:9] == draw_points(axes, 9, seed=0)
    assert [p["train.lr"] for p in points] == [p["train.lr"] for p in draw_points(axes[:1], 300, seed=0)]
    assert points[0] != draw_points(axes, 1, seed=1)[0]


def test_draws_end_where_a_small_space_is_used_up() -> None:
    axes = parse_axes(["lora.r=4,8", "train.epochs=1..2"])
    assert sorted(p["lora.r"] * 10 + p["train.epochs"] for p in draw_points(axes, 4, seed=0)) == [41, 42, 81, 82]
    with pytest.raises(ConfigError, match="there are only 4 different points"):
        draw_points(axes, 5, seed=0)


def test_range_of_whole_numbers_and_from_zero_are_no_log_scale() -> None:
    assert Range("lora.r", 1, 9).is_whole and not Range("lora.r", 1, 9).is_log
    assert Range("train.lr", 1e-4, 1e-2).is_log and not Range("lora.dropout", 0.0, 0.5).is_log


@pytest.mark.parametrize("name", ["points.jsonl", "points.toml"])
def test_read_points_takes_dotted_and_nested_keys(tmp_path: Path, name: str) -> None:
    text = {
        "points.jsonl": '{"train.lr": 1e-3, "lora.r": 8}\n\n{"lora": {"rank_pattern": {"query": 4}}}\n',
        "points.toml": '[[point]]\n"train.lr" = 1e-3\nlora.r = 8\n[[point]]\nlora.rank_pattern = {query = 4}\n',
    }
    (tmp_path / name).write_text(text[name])
    points = read_points(tmp_path / name)
    assert points == [{"train.lr": 1e-3, "lora.r": 8}, {"lora.rank_pattern": {"query": 4}}]
    raw = {"model": {"base": "minilm"}, "data": {"train": "x.csv"}}
    recipe = make_recipe(raw, [word(key, value) for point in points for key, value in point.items()])
    assert (recipe.train.lr, recipe.lora.r, recipe.lora.rank_pattern) == (1e-3, 8, {"query": 4})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train.lr": 1e-3}\n{"train.lr": }', r"points\.jsonl:2: not JSON"),
        ("[1, 2]", r"points\.jsonl:1: \[1, 2\] is not a point"),
        ('{"lr": 1e-3}', "'lr' is not a key of a recipe"),
        ("", "no points in it"),
    ],
)
def test_read_points_refuses(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "points.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_points(tmp_path / "points.jsonl")


def test_joined_points_are_every_pair() -> None:
    ours: list[dict[str, Any]] = [{"lora.r": 4}, {"lora.r": 8}]
    assert joined_points(ours, grid(parse_axes(["train.epochs=1,2"])))[2] == {"lora.r": 8, "train.epochs": 1}
    assert joined_points(ours, [{}]) == ours
    with pytest.raises(LorakitError, match=r"lora\.r is both"):
        joined_points(ours, [{"lora.r": 2}])
    assert json.dumps(ours)
