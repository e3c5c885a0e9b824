"""The forms of entities as text: written, read back tolerantly, and found again among the words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit
from lorakit.data.read import read
from lorakit.data.tags import Entity, entities, to_tags
from lorakit.tasks.text2text import formats
from lorakit.tasks.text2text.entity_format import EntityFormat, Mention, Reading
from lorakit.tasks.text2text.formats import FORMATS
from lorakit.tasks.text2text.ner import LOST, Spelling, decode

TYPES = ("LOC", "MISC", "ORG", "PER")
DEMO = Path(lorakit.__file__).parent / "demo"
WORDS = ("Peter", "Blackburn", "visits", "EU", "and", "EU", ".")
TAGS = ("B-PER", "I-PER", "O", "B-ORG", "O", "B-ORG", "O")
NO_TAGS = ("O",) * len(WORDS)
LIST, TANL = FORMATS["list"], FORMATS["tanl"]  # TANL alone says which of several equal words it means
each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def is_clear(words: Sequence[str], tags: Sequence[str]) -> bool:
    """Whether the words of each entity stand nowhere else, as those of "Who is Who , said Mr Who" do."""
    spelt = [tuple(words[entity.start : entity.end]) for entity in entities(tags)]
    lengths = {len(entity) for entity in spelt}
    windows = [tuple(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1)]
    return all(windows.count(entity) == spelt.count(entity) for entity in spelt)


def whole(reading: Reading) -> bool:
    return not (reading.malformed or reading.unknown_type or reading.invented or reading.misordered)


@each_format
def test_bundled_entities_are_found_again_from_their_text(form):
    examples = read(str(DEMO / "entities-validation.conll"), "words").examples
    readings = [form.read(form.write(x.words, x.tags), x.words, TYPES) for x in examples]
    assert all(map(whole, readings))
    assert [len(r.mentions) for r in readings] == [len(entities(x.tags)) for x in examples]
    clear = [form is TANL or is_clear(x.words, x.tags) for x in examples]
    assert clear.count(True) > clear.count(False)
    assert list(compress([r.tags for r in readings], clear)) == list(compress([x.tags for x in examples], clear))


@cache
def words_for(form: EntityFormat) -> st.SearchStrategy[str]:
    """Any words without white space and without what the form replaces by drop-ins."""
    letters = st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="".join(form.drop_ins))
    return st.text(letters, min_size=1, max_size=4) | st.sampled_from(["a", ":", "a:", "None", "PER", "x: PER"[:2]])


def sentences(form: EntityFormat) -> st.SearchStrategy[list[tuple[list[str], str | None]]]:
    chunks = st.tuples(st.lists(words_for(form), min_size=1, max_size=3), st.sampled_from([None, *TYPES]))
    return st.lists(chunks, min_size=1, max_size=6)


def words_and_tags(chunks: Sequence[tuple[list[str], str | None]]) -> tuple[list[str], tuple[str, ...]]:
    words, found = [], []
    for chunk, kind in chunks:
        if kind:
            found.append(Entity(kind, len(words), len(words) + len(chunk)))
        words += chunk
    return words, tuple(to_tags(found, len(words)))


@each_format
@given(data=st.data())
def test_what_is_written_of_any_words_is_read_back(form, data):
    words, tags = words_and_tags(data.draw(sentences(form)))
    reading = form.read(form.write(words, tags), words, TYPES)
    assert (reading.malformed, reading.unknown_type) == (0, 0)
    assert list(reading.mentions) == [Mention(" ".join(words[e.start : e.end]), e.type) for e in entities(tags)]
    if form is TANL:
        assert whole(reading)
        assert reading.tags == tags


@given(data=st.data())
def test_list_finds_entities_of_distinct_words_where_they_stand(data):
    words, tags = words_and_tags(data.draw(sentences(LIST)))
    words = [f"{i}{word}" for i, word in enumerate(words)]
    reading = LIST.read(LIST.write(words, tags), words, TYPES)
    assert whole(reading)
    assert reading.tags == tags


@each_format
@given(output=st.text(st.sampled_from("[]|: aBPERx") | st.characters(), max_size=30), ended=st.booleans())
def test_any_output_is_read(form, output, ended):
    reading = form.read(output, WORDS, TYPES, ended=ended)
    assert len(reading.tags) == len(WORDS)
    assert {entity.type for entity in entities(reading.tags)} <= set(TYPES)


@pytest.mark.parametrize(
    ("form", "tags", "text"),
    [
        (LIST, NO_TAGS, "None"),
        (LIST, TAGS, "Peter Blackburn: PER | EU: ORG | EU: ORG"),
        (TANL, NO_TAGS, "Peter Blackburn visits EU and EU ."),
        (TANL, TAGS, "[ Peter Blackburn | PER ] visits [ EU | ORG ] and [ EU | ORG ] ."),
    ],
)
def test_entities_are_written_in_the_forms_of_their_papers(form, tags, text):
    assert form.write(WORDS, tags) == text


FAULTS = ("malformed", "unknown_type", "invented", "misordered")


def faults(reading: Reading) -> dict[str, int]:
    return {name: count for name in FAULTS if (count := getattr(reading, name))}


@pytest.mark.parametrize(
    ("output", "mentions", "found"),
    [
        ("None", [], {}),
        (" None ", [], {}),
        ("", [], {"malformed": 1}),
        ("None: PER", [("None", "PER")], {"invented": 1}),
        ("EU: ORG|Peter:PER", [("EU", "ORG"), ("Peter", "PER")], {"misordered": 1}),
        ("at 12:30: MISC", [("at 12:30", "MISC")], {"invented": 1}),
        ("EU: ORG | EU: ORG", [("EU", "ORG"), ("EU", "ORG")], {}),
        ("EU: ORG | EU: ORG | EU: ORG", [("EU", "ORG")] * 3, {"invented": 1}),
        ("EU", [], {"malformed": 1}),
        (": ORG", [], {"malformed": 1}),
        ("EU:", [], {"malformed": 1}),
        ("EU: ORG | ", [("EU", "ORG")], {"malformed": 1}),
        ("EU: ORG | None", [("EU", "ORG")], {"malformed": 1}),
        ("EU: COMPANY | Peter: PER", [("Peter", "PER")], {"unknown_type": 1}),
        ("EU: org | | x", [], {"malformed": 2, "unknown_type": 1}),
    ],
)
def test_list_is_read_tolerantly_and_its_faults_counted(output, mentions, found):
    reading = LIST.read(output, WORDS, TYPES)
    assert list(reading.mentions) == [Mention(*mention) for mention in mentions]
    assert faults(reading) == found


@pytest.mark.parametrize(
    ("output", "tags", "found"),
    [
        ("[Peter Blackburn|PER] visits [EU|ORG] and [EU|ORG].", (*TAGS[:-1], "O"), {}),
        ("Peter Blackburn visits EU and [ EU | ORG ] .", (*NO_TAGS[:5], "B-ORG", "O"), {}),
        ("[ Peter Blackbern | PER ] visits", ("B-PER", *NO_TAGS[1:]), {}),  # one word is right
        ("visits [ eu | ORG ] and EU .", (*NO_TAGS[:3], "B-ORG", *NO_TAGS[4:]), {}),
        ("[ Paul | PER ] visits EU and EU .", NO_TAGS, {"invented": 1}),
        ("visits EU and EU . [ Peter Blackburn | PER ]", NO_TAGS, {"misordered": 1}),
        ("[ Peter Blackburn | MAN ] visits EU and EU .", NO_TAGS, {"unknown_type": 1}),
        ("", NO_TAGS, {"malformed": 1}),
        ("[ Peter Blackburn ] visits EU and EU .", NO_TAGS, {"malformed": 1}),
        ("[ | PER ] Peter", NO_TAGS, {"malformed": 1}),
        ("[ Peter | ] visits", NO_TAGS, {"malformed": 1}),
        ("Peter ] visits | EU", NO_TAGS, {"malformed": 2}),
        ("[ Peter [ Blackburn | PER ] visits", ("O", "B-PER", *NO_TAGS[2:]), {"malformed": 1}),
        ("[ Peter Blackburn | PER", NO_TAGS, {"malformed": 1}),
    ],
)
def test_markup_is_read_tolerantly_and_its_faults_counted(output, tags, found):
    reading = TANL.read(output, WORDS, TYPES)
    assert (reading.tags, faults(reading)) == (tags, found)


@each_format
@pytest.mark.parametrize("tags", [TAGS, NO_TAGS])
def test_right_output_cut_anywhere_has_no_fault(form, tags):
    output = form.write(WORDS, tags)
    for end in range(len(output) + 1):
        reading = form.read(output[:end], WORDS, TYPES, ended=False)
        assert faults(reading) == {}, output[:end]
        assert set(entities(reading.tags)) <= set(entities(tags))
    assert form.read(output, WORDS, TYPES, ended=False).tags == tags


@pytest.mark.parametrize(
    ("words", "surfaces", "spans", "invented"),
    [
        ("EU and EU .", ["EU", "EU"], [(0, 1), (2, 3)], 0),
        ("EU and EU .", ["EU", "EU", "EU"], [(0, 1), (2, 3)], 1),
        ("Al met Bo", ["Bo", "Al"], [(0, 1), (2, 3)], 0),
        ("Al met Bo and Al", ["Bo", "Al"], [(2, 3), (4, 5)], 0),
        ("Al met Bo", ["Bob"], [], 1),
        ("Al met Bob", ["Bo"], [], 1),
        ("Al met Bo", ["met Al"], [], 1),
        ("Peter spoke", ["peter"], [(0, 1)], 0),
        ("US helped us", ["us"], [(2, 3)], 0),
        ("us or US", ["US", "US"], [(0, 1), (2, 3)], 0),
        ("1996 - 08 - 30 .", ["1996-08-30"], [(0, 5)], 0),
        ("the U.S. won", ["U. S ."], [(1, 2)], 0),
        ("10\u00a0000 Maniacs sang", ["10 000 Maniacs"], [(0, 2)], 0),
        ("New York New York City", ["New York City"], [(2, 5)], 0),
        ("New York City", ["New York", "York City"], [(0, 2)], 1),
        ("STRASSE", ["straße"], [(0, 1)], 0),
        ("a b", [], [], 0),
    ],
)
def test_mentions_are_found_left_to_right_each_word_used_once(words, surfaces, spans, invented):
    mentions = [Mention(surface, "LOC") for surface in surfaces]
    found, _ = formats.find_mentions(mentions, words.split(" "))
    assert found == [Entity("LOC", start, end) for start, end in spans]
    assert len(mentions) - len(found) == invented


@pytest.mark.parametrize(
    ("words", "surfaces", "misordered"),
    [("Al met Bo", ["Bo", "Al"], 1), ("Al met Al", ["Al", "Al"], 0), ("Al met Bo", ["met", "Al", "Bo"], 1)],
)
def test_mentions_that_go_back_are_counted(words, surfaces, misordered):
    assert formats.find_mentions([Mention(s, "LOC") for s in surfaces], words.split(" "))[1] == misordered


def cheapest(said: tuple[str, ...], words: tuple[str, ...]) -> float:
    """The cost of the shortest edit script, by trying every one."""

    @cache
    def cost(i: int, j: int) -> float:
        if i == len(said) or j == len(words):
            return float(len(said) - i + len(words) - j)
        same = 0 if said[i] == words[j] else 0.5 if said[i].casefold() == words[j].casefold() else 1
        return min(cost(i + 1, j + 1) + same, cost(i + 1, j) + 1, cost(i, j + 1) + 1)

    return cost(0, 0)


@given(st.lists(st.sampled_from("abcA"), max_size=7), st.lists(st.sampled_from("abcA"), max_size=7))
def test_alignment_of_words_is_a_shortest_edit_script(said, words):
    places = formats.align_words(said, words)
    matched = [(word, words[place]) for word, place in zip(said, places, strict=True) if place is not None]
    kept = [place for place in places if place is not None]
    assert kept == sorted(set(kept))
    assert all(word.casefold() == other.casefold() for word, other in matched)
    # between two matches the rest is replaced word by word, then inserted or left out
    bounds = [(-1, -1), *((i, p) for i, p in enumerate(places) if p is not None), (len(said), len(words))]
    gaps = [(b[0] - a[0] - 1, b[1] - a[1] - 1) for a, b in pairwise(bounds)]
    cost = sum(0.5 for word, other in matched if word != other) + sum(max(gap) for gap in gaps)
    assert cost == cheapest(tuple(said), tuple(words))


# Spelling: words that the tokenizer gives back and no format mistakes for its own signs


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
