"""Patterns in bounded time: Python's matcher is the oracle where it can be waited for."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.lora.safe_regex import MAX_PATTERN, Pattern

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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", USUAL)
def test_usual_pattern_matches_as_in_python(pattern: str, path: str) -> None:
    assert Pattern(pattern).fullmatch(path) == bool(re.fullmatch(pattern, path))


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


@settings(max_examples=400)
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
    start = time.perf_counter()
    try:
        assert not Pattern(pattern).fullmatch(PATHS[0])
    except re.error as err:
        assert "takes too many steps" in str(err)
    assert time.perf_counter() - start < 1  # some of these take Python's matcher longer than the universe has


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
