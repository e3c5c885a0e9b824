"""Which layers an adapter touches: by name, pattern, range; and the message when nothing is there."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.errors import ConfigError
from lorakit.lora import ALL_LINEAR, LoraConfig, add_adapter, linear_layers, load_adapter, save_adapter, select_targets
from lorakit.lora.safe_regex import MAX_PATTERN, Pattern
from lorakit.lora.targets import passed_by
from tests.lora.oracle import assert_unchanged, fill, snapshot
from tests.tiny import tiny_bert, tiny_distilbert, tiny_roberta, tiny_t5, tiny_token_bert

Build = Callable[[], PreTrainedModel]


def chosen(model: nn.Module, **settings: Any) -> list[str]:
    return [target.path for target in select_targets(model, LoraConfig(r=2, **settings))]


class Named(nn.Module):
    """Two layers whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.my_query = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"query": nn.Linear(4, 4), "queryx": nn.Linear(4, 4)})


def test_name_matches_whole_dotted_parts_only() -> None:
    assert chosen(Named(), target_modules=("query",)) == ["query", "inner.query"]


def test_dotted_name_matches_the_last_parts() -> None:
    assert chosen(Named(), target_modules=("inner.query",)) == ["inner.query"]


def test_pattern_matches_whole_paths_only() -> None:
    assert chosen(Named(), target_modules=r".*query") == ["query", "my_query", "inner.query"]
    assert chosen(Named(), target_modules=r"query") == ["query"]


def test_targets_are_in_the_model_s_order_and_say_what_chose_them() -> None:
    targets = select_targets(tiny_bert(), LoraConfig(r=2, target_modules=("value", "query"), layers_to_transform=(1,)))
    path = "bert.encoder.layer.1.attention.self"
    assert [(t.path, t.matched_by) for t in targets] == [(f"{path}.query", "query"), (f"{path}.value", "value")]


def test_excluded_modules_win() -> None:
    assert chosen(Named(), target_modules=("query",), exclude_modules=("inner.query",)) == ["query"]
    assert chosen(Named(), target_modules=("query",), exclude_modules=r"inner\..*") == ["query"]


@pytest.mark.parametrize("layers", [(0,), (0, 2), (2, 0), (0, 1, 2)])
def test_layers_to_transform_keeps_those_blocks(layers: tuple[int, ...]) -> None:
    paths = chosen(tiny_bert(), target_modules=("query",), layers_to_transform=layers)
    assert paths == [f"bert.encoder.layer.{index}.attention.self.query" for index in sorted(layers)]


def test_layers_to_transform_of_t5_counts_blocks_not_sublayers() -> None:
    paths = chosen(tiny_t5(), target_modules=("q",), layers_to_transform=(1,))
    assert paths == ["encoder.block.1.layer.0.SelfAttention.q"]  # not decoder.block.0.layer.1


@pytest.mark.parametrize("build", [tiny_bert, tiny_token_bert, tiny_roberta, tiny_t5])
def test_all_linear_is_every_linear_layer_but_the_head(build: Build) -> None:
    model = build()
    head = ("classifier", "lm_head")
    want = [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and not path.startswith(head)
    ]
    assert chosen(model) == want


def test_all_linear_never_touches_a_saved_module() -> None:
    saved = ("pre_classifier", "classifier")
    assert not [path for path in chosen(tiny_distilbert(), modules_to_save=saved) if path in saved]


def test_all_linear_spares_the_output_embeddings_whatever_their_name() -> None:
    model = Named()
    model.get_output_embeddings = lambda: model.my_query
    assert "my_query" not in chosen(model)


def test_linear_layers_are_the_same_before_and_after_injection() -> None:
    model = tiny_bert()
    before = linear_layers(model)
    add_adapter(model, LoraConfig(r=2))
    assert linear_layers(model) == before


def test_patterns_give_a_layer_its_own_rank_and_alpha() -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=("query", "value"),
        rank_pattern={r"layer\.0\..*query": 3, "query": 4},
        alpha_pattern={"value": 32},
    )
    found = {(t.path.split(".")[3], t.path.split(".")[-1]): (t.r, t.alpha) for t in select_targets(tiny_bert(), config)}
    later = {(i, "query"): (4, 8) for i in "12"}  # the first entry that matches wins
    assert found == {("0", "query"): (3, 8), **later, **{(i, "value"): (2, 32) for i in "012"}}


def test_pattern_key_matches_whole_dotted_parts_only() -> None:
    config = LoraConfig(r=2, target_modules=r".*query", rank_pattern={"query": 3})
    assert {t.path: t.r for t in select_targets(Named(), config)} == {"query": 3, "my_query": 2, "inner.query": 3}


REFUSED = {
    "misspelt name": (
        {"target_modules": ("qurey",)},
        r"target_modules: nothing matches 'qurey'; did you mean 'query'\? "
        r"\(20 linear layers: classifier, dense, key, query, value; also position_embeddings, .*\)",
    ),
    "one unmatched among matching": ({"target_modules": ("query", "valeu")}, "nothing matches 'valeu'; did you mean"),
    "nothing near": ({"target_modules": ("zzz",)}, r"'zzz'; there are 20 linear layers: classifier, dense, key"),
    "pattern without a match": (
        {"target_modules": "query"},
        r"the pattern 'query' matches no whole path such as 'bert",
    ),
    "bad pattern": ({"target_modules": "(query"}, r"target_modules: '\(query' is not a regular expression"),
    "bad rank pattern": ({"target_modules": ("query",), "rank_pattern": {"(": 2}}, r"rank_pattern: .* not a regular"),
    "unmatched exclusion": ({"exclude_modules": ("qurey",)}, "exclude_modules: nothing matches 'qurey'; did you mean"),
    "all excluded": ({"target_modules": ("query",), "exclude_modules": ("query",)}, "no layer is left"),
    "unmatched saved": (
        {"modules_to_save": ("clasifier",)},
        "modules_to_save: .* 'clasifier'; did you mean 'classifier'",
    ),
    "target inside saved": ({"target_modules": ("classifier",), "modules_to_save": ("classifier",)}, "nothing matches"),
    "block out of range": (
        {"target_modules": ("query",), "layers_to_transform": (0, 3)},
        "layers_to_transform: no targeted layer lies in block 3; blocks: 0 to 2",
    ),
    "no blocks": ({"target_modules": r"bert\.pooler\.dense", "layers_to_transform": (0,)}, "in block 0; blocks: none"),
    "rank too large": (
        {"target_modules": ("query",), "r": 33},
        r"r = 33 is more than bert\.encoder\.layer\.0\.attention\.self\.query can use: its smaller side is 32",
    ),
    "pattern's rank too large": ({"rank_pattern": {"query": 33}}, "r = 33 is more than"),
    "unmatched rank pattern": ({"rank_pattern": {"qurey": 2}}, "rank_pattern: nothing matches 'qurey'; did you mean"),
    "unmatched alpha pattern": (
        {"target_modules": ("query",), "alpha_pattern": {"value": 2}},
        "alpha_pattern: nothing matches 'value'; there are 3 linear layers: query",
    ),
}


def test_a_model_that_is_one_layer_has_none_to_adapt() -> None:
    with pytest.raises(ConfigError, match=r"target_modules: nothing matches 'query'; there are no linear layers$"):
        select_targets(nn.Linear(3, 4), LoraConfig(target_modules=("query",)))


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_injection_says_why_and_changes_nothing(settings: dict[str, Any], message: str) -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        add_adapter(model, LoraConfig(**{"r": 2, **settings}))
    assert_unchanged(model, before)


BAD_SETTINGS = {
    "rank 0": ({"r": 0}, r"^r = 0: a rank is a whole number from 1"),
    "rank true": ({"r": True}, r"^r = True"),
    "rank 2.0": ({"r": 2.0}, r"^r = 2\.0"),
    "pattern rank": ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] = 0"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha = 0: must be a finite number above 0"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    "pattern alpha": ({"alpha_pattern": {"query": -1}}, r"alpha_pattern\['query'\] = -1"),
    "dropout 1": ({"lora_dropout": 1.0}, r"lora_dropout = 1\.0: must be at least 0 and below 1"),
    "dropout negative": ({"lora_dropout": -0.1}, r"lora_dropout = -0\.1"),
    "init": ({"init_lora_weights": "pisa"}, "init_lora_weights = 'pisa' is not known; did you mean 'pissa'"),
    "number as text": ({"lora_alpha": "16"}, "^lora_alpha = '16': must be a number"),
    "one module as text": (
        {"modules_to_save": "classifier"},
        r"^modules_to_save = 'classifier': must be a tuple of nam",
    ),
    "peft's true": ({"init_lora_weights": True}, "^init_lora_weights = True: must be a string"),
    "one layer": ({"layers_to_transform": 3}, "^layers_to_transform = 3: must be a tuple of whole numbers"),
    "no targets": ({"target_modules": ()}, "target_modules is empty: name at least one module, or use 'all-linear'"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_setting_is_refused_when_the_config_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


def test_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer is left"):
        select_targets(nn.Sequential(nn.LayerNorm(4)), LoraConfig(target_modules=ALL_LINEAR))


def test_bare_linear_model_is_refused_rather_than_lost() -> None:
    """A root module cannot be replaced in its parent."""
    with pytest.raises(ConfigError, match="no layer is left"):
        add_adapter(nn.Linear(4, 4), LoraConfig(r=2))


class Bottleneck(nn.Module):
    """Two layers of some width, and one of a single output, as ESM has it over its attention maps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.contacts = nn.Linear(6, 20), nn.Linear(20, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def test_all_linear_passes_by_what_is_too_small_for_the_rank(tmp_path: Path) -> None:
    for settings, chosen, small in (
        ({"r": 4}, ["up", "down"], ["contacts"]),
        ({"r": 1}, ["up", "down", "contacts"], []),
        ({"r": 4, "rank_pattern": {"contacts": 1}}, ["up", "down", "contacts"], []),
        ({"r": 4, "init_lora_weights": "pissa"}, ["up", "down"], ["contacts"]),  # whose file has twice the rank
        ({"r": 4, "target_modules": ("up",)}, ["up"], []),
    ):
        model, config = Bottleneck(), LoraConfig(**settings)  # type: ignore[arg-type]
        again = copy.deepcopy(model)
        assert passed_by(model, config) == small
        assert [target.path for target in add_adapter(model, config)] == chosen
        fill(model)
        save_adapter(model, tmp_path, config)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
        load_adapter(again, tmp_path)
        torch.testing.assert_close(again(x), model(x))
    for settings in ({"r": 7}, {"r": 4, "target_modules": ("contacts", "up")}, {"rank_pattern": {"contacts": 2}}):
        with pytest.raises(ConfigError, match="can use: its smaller side"):
            add_adapter(Bottleneck(), LoraConfig(**{"r": 4, **settings}))  # type: ignore[arg-type]


# Patterns in bounded time: Python's matcher is the oracle where it can be waited for.


PATHS = ["bert.encoder.layer.0.attention.self.query", "model.layers.11.mlp.up_proj", "lm_head", "a", "", "a\n", "aXb_1"]
USUAL = [
    r".*\.(query|value)",
    r"bert\.encoder\.layer\.[01]\.attention\.self\.(query|key)",
    r"(?:.*\.)?(?:query)",
    r"model\.layers\.(\d|1\d)\.(self_attn|mlp)\.\w+_proj",
    r"^(?!.*(?:lm_head|emb)).*proj$",
    r"(?=.*query)[^X]+",
    r".*?(?:layer|layers).*?(?:self|mlp|attn).*?(?:query|up_proj).*?",
    r"\bmodel\.layers\.[\d]{1,}\.\S{3,9}\b",
    r"a\Z|a$|\Aa\s|\D\W",
    r"[^\d_]+\b.*",
    r"(a{2}|[a-zX]{1,3}?_?)*1?",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_pattern_matches_as_in_python(pattern: str) -> None:
    assert list(map(Pattern(pattern).fullmatch, PATHS)) == [bool(re.fullmatch(pattern, path)) for path in PATHS]


def grown(smaller: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = smaller.map(lambda inner: f"({inner})")
    repeat = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?", "{2,}"])
    return st.one_of(
        st.tuples(smaller, smaller).map("".join),
        st.tuples(smaller, smaller).map("|".join).map(lambda inner: f"(?:{inner})"),
        st.tuples(group, repeat).map("".join),
        smaller.map(lambda inner: f"(?={inner})"),
        smaller.map(lambda inner: f"(?!{inner})"),
    )


ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", r"\d", r"[a-b.]", "^", "$", r"\b", ""])


@hypothesis.settings(max_examples=400)
@given(pattern=st.recursive(ATOMS, grown, max_leaves=8), text=st.text("ab.1\n", max_size=6))
def test_any_pattern_matches_as_in_python(pattern: str, text: str) -> None:
    assert Pattern(pattern).fullmatch(text) == bool(re.fullmatch(pattern, text))


ENDLESS = {
    "nested": "(([a-z.0-9]+))+X",
    "nested with a choice": "(a|[a-z.])*X",
    "many": ".*" * 40 + "X",
    "optional": "(.?){40}X",
    "counted": "(((.{0,99}){0,99}){0,99}){0,99}X",
    "counted high": "(" * 9 + ".?" + "){1000000}" * 9 + "X",
    "deep": "(" * 80 + ".*" + ")*" * 80 + "X",
    "looking ahead": "(?=.*" * 60 + "X" + ")" * 60,
}


@pytest.mark.parametrize("pattern", ENDLESS.values(), ids=ENDLESS)
def test_endless_pattern_ends(pattern: str) -> None:
    start = time.thread_time()
    try:
        assert not Pattern(pattern).fullmatch(PATHS[0])
    except re.error as err:
        assert "takes too many steps" in str(err)
    assert time.thread_time() - start < 1  # some of these take Python's matcher longer than the universe has


BAD = {
    "no pattern": "(q",
    "too long": "x" * (MAX_PATTERN + 1),
    "back reference": r"(a)\1",
    "look-behind": "(?<=a)b",
    "flag": "(?i)a",
    "flag inside": "(?i:a)",
    "possessive": "a++",
    "atomic": "(?>a)",
    "repeat too large": "a{99999999999}",
}


@pytest.mark.parametrize("pattern", BAD.values(), ids=BAD)
def test_pattern_that_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(re.error):
        Pattern(pattern).fullmatch("a")
