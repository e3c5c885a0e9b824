"""Words are spelled so that the tokenizer gives them back and no format mistakes them for its own signs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.tags import to_tags
from lorakit.tasks.text2text.formats import FORMATS
from lorakit.tasks.text2text.ner import LOST, Spelling, decode

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(
    ["|", "[x]", "</s>", "<extra_id_0>", "</</s>>", "{", "\u200b", "½", "a:"]
)
DROP_INS = {"[": "(", "|": "/", "]": ")"}


@pytest.fixture(scope="module", params=["byte_tokenizer", pytest.param("t5_tokenizer", marks=pytest.mark.shared)])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@given(words=st.lists(ANY, min_size=1))
def test_spelled_words_come_back_from_the_tokenizer_whatever_they_are(tokenizer, words):
    spelling = Spelling(tokenizer, DROP_INS)
    spelled = spelling.words(words)
    assert len(spelled) == len(words)
    assert decode(tokenizer, tokenizer(" ".join(spelled))["input_ids"]).split() == spelled
    assert not any(sign in word for word in spelled for sign in (*DROP_INS, *tokenizer.all_special_tokens))
    assert spelling.words(spelled) == spelled


@pytest.mark.parametrize("name", FORMATS)
@given(words=st.lists(ANY.filter(str.isprintable), min_size=2, max_size=6))
def test_any_words_are_read_back_through_the_tokenizer(tokenizer, name, words):
    form = FORMATS[name]
    spelled = Spelling(tokenizer, form.drop_ins).words(words)
    spelled = [f"{i}{word}" for i, word in enumerate(spelled)]  # equal words are a list's own trouble
    tags = tuple(to_tags([("PER", 0, 2)], len(words)))
    text = decode(tokenizer, tokenizer(form.write(spelled, tags))["input_ids"])
    reading = form.read(text, spelled, ["PER"])
    assert (reading.tags, reading.malformed, reading.invented, reading.misordered) == (tags, 0, 0, 0)


BYTES = {"AC|DC": "AC/DC", "[1]": "(1)", "</s>": "(/s>", "a\u00a0b": "ab", "": LOST, "\x00": LOST}
KEPT = dict.fromkeys(["Peter", "U.S.", "café", "日本", "a:b", "don't", "{", "~"])


def test_signs_of_the_format_and_of_the_tokenizer_are_replaced_and_all_else_stays(byte_tokenizer):
    assert Spelling(byte_tokenizer, DROP_INS).words([*BYTES, *KEPT]) == [*BYTES.values(), *KEPT]


@pytest.mark.shared
def test_what_t5_lacks_is_replaced_by_what_it_has(t5_tokenizer):
    words = {"…": "...", "\uff5c": "/", "{x}": "*x*", "João": "Joao", "日本": "**", "Dubbz\ufeff": "Dubbz", "x😂": "x*"}
    assert Spelling(t5_tokenizer, DROP_INS).words([*words]) == [*words.values()]
