"""Examples keep offsets into the original text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.example import of_text, of_words


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=100)
def test_words_of_a_text_are_all_of_it_but_white_space(text):
    example = of_text(text)
    assert example.text == text
    assert example.words == tuple(text[start:end] for start, end in example.offsets)
    assert "".join(example.words) == "".join(text.split())
    assert list(example.offsets) == sorted(example.offsets)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  EU   rejects\tGerman\ncall. ", ["EU", "rejects", "German", "call", "."]),
        ("the U.S. won't pay $1,000!", ["the", "U.S", ".", "won", "'t", "pay", "$", "1,000", "!"]),
        ("mid-May (Peter's)", ["mid-May", "(", "Peter", "'s", ")"]),
        ("Paris,London and 1,000,000", ["Paris", ",", "London", "and", "1,000,000"]),
        ("São\u00a0Paulo 東京", ["São", "Paulo", "東京"]),
        ("cafe\u0301 Sa\u0303o", ["cafe\u0301", "Sa\u0303o"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("نمی\u200cکنم", ["نمی\u200cکنم"]),
        ("mid-E\u0301te\u0301 (o\u0308)", ["mid-E\u0301te\u0301", "(", "o\u0308", ")"]),
        ("I ❤\ufe0f 👍🏽", ["I", "❤\ufe0f", "👍", "🏽"]),
        (" \u0301a", ["\u0301", "a"]),
    ],
)
def test_raw_text_is_cut_as_conll_files_cut_it(text, words):
    assert list(of_text(text).words) == words


@given(text=st.text(st.sampled_from("aéoñ.,'- 1"), max_size=20))
def test_accents_are_cut_alike_composed_and_decomposed(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert [unicodedata.normalize("NFC", word) for word in of_text(decomposed).words] == list(of_text(composed).words)


@given(words=st.lists(st.text(min_size=1, max_size=5), max_size=6))
def test_offsets_of_words_point_into_their_text(words):
    example = of_words(words)
    assert [example.text[start:end] for start, end in example.offsets] == words
