"""The text form of entities: written, read back tolerantly, and found again among the words."""

from __future__ import annotations

from itertools import compress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
from lorakit.data.read import read
from lorakit.data.tags import Entity, entities
from lorakit.tasks.entity_list import Aligned, Mention, Parsed, align, parse, write

TYPES = ("LOC", "MISC", "ORG", "PER")
DEMO = Path(lorakit.__file__).parent / "demo"
WORDS = ("Peter", "Blackburn", "visits", "EU", "and", "EU", ".")


def is_clear(example, found) -> bool:
    """Whether the words of each entity stand nowhere else, as those of "Who is Who , said Mr Who" do."""
    spelt = [example.words[entity.start : entity.end] for entity in found]
    lengths = {len(words) for words in spelt}
    windows = [example.words[i : i + n] for n in lengths for i in range(len(example.words) - n + 1)]
    return all(windows.count(words) == spelt.count(words) for words in spelt)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_bundled_entities_are_found_again_from_their_text(name):
    examples = read(str(DEMO / f"entities-{name}.conll"), "words").examples
    gold = [entities(example.tags) for example in examples]
    texts = [write(example.words, found) for example, found in zip(examples, gold, strict=True)]
    kinds = sorted({entity.type for found in gold for entity in found})
    parsed = [parse(text, kinds) for text in texts]
    assert [(p.malformed, p.unknown_type) for p in parsed] == [(0, 0)] * len(examples)
    aligned = [align(p.mentions, example.words) for p, example in zip(parsed, examples, strict=True)]
    clear = [is_clear(example, found) for example, found in zip(examples, gold, strict=True)]
    wanted = [Aligned(tuple(found), 0) for found in gold]
    assert list(compress(aligned, clear)) == list(compress(wanted, clear))
    assert clear.count(True) > clear.count(False)
    assert [(len(a.entities), a.invented) for a in aligned] == [(len(found), 0) for found in gold]


WORD = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="|"), min_size=1, max_size=4)


@given(
    chunks=st.lists(
        st.tuples(st.lists(WORD, min_size=1, max_size=3), st.sampled_from([None, *TYPES])), min_size=1, max_size=6
    )
)
@settings(max_examples=100, deadline=None)
def test_written_mentions_are_all_read_back_and_found_somewhere(chunks):
    words, found = [], []
    for chunk, kind in chunks:
        if kind:
            found.append(Entity(kind, len(words), len(words) + len(chunk)))
        words += chunk
    parsed = parse(write(words, found), TYPES)
    assert parsed.malformed == parsed.unknown_type == 0
    assert list(parsed.mentions) == [Mention(" ".join(words[e.start : e.end]), e.type) for e in found]
    aligned = align(parsed.mentions, words)
    taken = [i for entity in aligned.entities for i in range(entity.start, entity.end)]
    assert taken == sorted(set(taken))
    assert len(aligned.entities) + aligned.invented == len(found)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([], "None"),
        ([Entity("PER", 0, 2), Entity("ORG", 3, 4)], "Peter Blackburn: PER | EU: ORG"),
        ([Entity("ORG", 3, 4), Entity("ORG", 5, 6)], "EU: ORG | EU: ORG"),
    ],
)
def test_entities_are_written_in_the_form_of_the_reference_system(found, text):
    assert write(WORDS, found) == text


@pytest.mark.parametrize(
    ("output", "mentions", "malformed", "unknown"),
    [
        ("None", [], 0, 0),
        (" None ", [], 0, 0),
        ("None: PER", [("None", "PER")], 0, 0),
        ("", [], 1, 0),
        ("EU: ORG|Peter:PER", [("EU", "ORG"), ("Peter", "PER")], 0, 0),
        ("at 12:30: MISC", [("at 12:30", "MISC")], 0, 0),
        ("a: b: c: LOC", [("a: b: c", "LOC")], 0, 0),
        ("EU: ORG | EU: ORG", [("EU", "ORG"), ("EU", "ORG")], 0, 0),
        ("EU", [], 1, 0),
        (": ORG", [], 1, 0),
        ("EU:", [], 1, 0),
        ("EU: ORG | ", [("EU", "ORG")], 1, 0),
        ("EU: ORG | None", [("EU", "ORG")], 1, 0),
        ("EU: COMPANY | Peter: PER", [("Peter", "PER")], 0, 1),
        ("EU: org | | x", [], 2, 1),
    ],
)
def test_output_is_read_tolerantly_and_its_faults_counted(output, mentions, malformed, unknown):
    assert parse(output, TYPES) == Parsed(tuple(Mention(*mention) for mention in mentions), malformed, unknown)


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
    found = tuple(Entity("LOC", start, end) for start, end in spans)
    assert align(mentions, words.split(" ")) == Aligned(found, invented)
