"""The points of a sweep: grids and ranges, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sklearn.model_selection import ParameterGrid

from lorakit.app.sweep.plan import Axis, Options, grid, make_plan, parse_axes, word
from lorakit.errors import ConfigError


def test_grid_has_the_points_of_scikit_learns() -> None:
    axes = parse_axes(["lora.r=4,8", "train.lr=3e-4,1e-3,2", "train.schedule=linear,cosine"])
    values = {axis.key: axis.values for axis in axes}
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
    assert axis == Axis("lora.target_modules", values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.lr"], r"'train\.lr': a sweep takes section\.key=value,value"),
        (["train.lr=1e-3,"], "value 2 of 2 is empty"),
        (["train.lr=1e-3,0.001"], "1e-3 is given twice"),
        (["train.lr=1e-3", "train.lr=1e-4"], r"train\.lr is given twice"),
        (["train.lr=1e-2..1e-5"], "the range is empty"),
        (["train.seeds=0,1"], "--seeds 0,1,2"),
        (["lora.target_modules=query,value"], r"write \[query,value\] for one point"),
        (["data.label=a,b"], r"data\.label takes lists"),
    ],
)
def test_parse_axes_refuses(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_axes(words)


def test_grid_refuses_a_range() -> None:
    with pytest.raises(ConfigError, match="--optuna --trials N"):
        grid(parse_axes(["train.lr=1e-5..1e-2"]))


VALUES = st.recursive(
    st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(VALUES)
def test_word_says_any_value_so_that_a_recipe_reads_it(value: Any) -> None:
    import tomllib

    key, _, text = word("train.lr", value).partition("=")
    assert (key, tomllib.loads(f"value = {text}")["value"]) == ("train.lr", value)


def test_ranges_are_drawn_on_a_log_scale_unless_of_whole_numbers_or_from_zero() -> None:
    axes = parse_axes(["train.lr=1e-5..1e-2", "lora.r=2..5", "train.schedule=linear,cosine", "lora.dropout=0.0..0.5"])
    assert [axis.distribution for axis in axes] == [
        FloatDistribution(1e-5, 1e-2, log=True),
        IntDistribution(2, 5),
        CategoricalDistribution(['"linear"', '"cosine"']),
        FloatDistribution(0.0, 0.5),
    ]


RECIPE = '[model]\nbase = "minilm"\n[data]\ntrain = "x.csv"\n'


def test_plan_has_every_seed_of_a_point(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(RECIPE)
    plan = make_plan(Options(tmp_path / "small.toml", ("train.epochs=1,2",), seeds=(0, 1, 0)))
    assert plan.settings == [({"train.epochs": 1}, [0, 1]), ({"train.epochs": 2}, [0, 1])]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (("train.lr=1e-3,fast",), {}, r"train\.lr = 'fast': should be a number"),
        (("lora.rr=1,2",), {}, r"did you mean 'lora\.r'"),
        (("lora.rr=1..2",), {"optuna": True, "trials": 3}, r"did you mean 'lora\.r'"),
        (("lora.r=4",), {}, "nothing to sweep over"),
        (("output.dir=a,b",), {}, "a folder within the sweep"),
        (("train.seed=0..3",), {}, "seeds are not sampled"),
        (("lora.r=4,8", "train.seed=1"), {"seeds": (1,)}, "use either --seeds or train.seed"),
        (("lora.r=4,8",), {"optuna": True}, "--optuna and --trials N only work together"),
        (("lora.r=4,8",), {"optuna": True, "trials": 3, "halving": 3}, "--halving does not work with --optuna"),
    ],
)
def test_plan_refuses(tmp_path: Path, words: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    (tmp_path / "small.toml").write_text(RECIPE)
    with pytest.raises(ConfigError, match=message):
        make_plan(Options(tmp_path / "small.toml", words, **options))


def test_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a sweep runs in one process"):
        make_plan(Options(Path("small.toml"), ("lora.r=4,8",)))
