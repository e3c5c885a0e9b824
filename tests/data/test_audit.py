"""What is found in labelled examples before anything is trained, each finding planted in clean data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lorakit.data.audit import LONG, RARE, SHOWN, audit, label_counts, labels_of, numbers, spread, verdict
from lorakit.data.example import Example, of_words

LABELS = ("good", "bad")


def clean(n: int, word: str = "text") -> list[Example]:
    return [Example(f"{word} {i}", LABELS[i % 2], where=f"{word}.csv:{i + 2}") for i in range(n)]


def found(**parts: list[Example]) -> dict:
    return {finding.name: finding for finding in audit(parts)}


def test_clean_data_are_ready() -> None:
    findings = audit({"train": clean(2 * RARE), "validation": clean(4, "other")})
    assert findings == []
    assert verdict(findings) == "ready to train"


def test_duplicates_are_counted_and_shown_but_are_no_problem() -> None:
    copies = [Example("text 3", "bad", where=f"text.csv:{90 + i}") for i in range(2)]
    (finding,) = audit({"train": [*clean(20), *copies]})
    assert (finding.count, finding.is_problem, finding.places) == (2, False, ["text.csv:5 and 90"])


def test_texts_with_two_labels_are_a_problem() -> None:
    other = Example("text 3", "good", where="text.csv:99")
    finding = found(train=[*clean(20), other])["conflicts"]
    assert (finding.count, finding.is_problem, finding.places) == (1, True, ["text.csv:5 and 99: bad / good"])
    assert verdict([finding]) == "1 problem: texts with different labels: 1"


def test_sentences_tagged_in_two_ways_are_a_problem() -> None:
    tags = ([["O", "B-PER"], ["O", "O"], ["O", "B-PER"]] * RARE)[:-1]
    examples = [of_words(["hello", "Ada"], row, f"x:{i}") for i, row in enumerate(tags)]
    assert found(train=examples)["conflicts"].places == ["x:0 and 1: 'Ada' B-PER / O"]


def test_differing_numbers_are_only_said() -> None:
    examples = [Example("same", 1.0, where="x:1"), Example("same", 2.5, where="x:2")]
    finding = found(train=examples)["conflicts"]
    assert (finding.is_problem, finding.places) == (False, ["x:1 and 2: 1.0 / 2.5"])


def test_pairs_are_the_same_only_where_both_texts_are() -> None:
    pairs = [Example("a", "good", pair="b"), Example("a", "bad", pair="c"), Example("b", "bad", pair="a")]
    assert found(train=pairs * RARE).keys() == {"duplicates in train"}


@pytest.mark.parametrize("part", ["validation", "test"])
def test_texts_of_train_in_another_part_are_a_problem(part: str) -> None:
    there = [Example(text, LABELS[i % 2], where=f"o.csv:{i}") for i, text in enumerate(["text 1", " Text  2", "new"])]
    finding = found(train=clean(20), **{part: there})[f"overlap of train and {part}"]
    assert (finding.count, finding.is_problem) == (2, True)
    assert finding.places == ["o.csv:0 and text.csv:3", "o.csv:1 and text.csv:4"]
    assert "2 (66.7%), 1 of them except for case or white space" in finding.text


def test_labels_missing_or_rare_are_told_by_part() -> None:
    train = [*clean(20), Example("x", "fair")]
    findings = found(train=train, validation=[Example("v", "good"), Example("w", "worst")])
    assert findings["rare labels"].places == ["fair (1)"]
    assert (findings["labels missing in train"].places, findings["labels missing in train"].is_problem) == (
        ["worst"],
        True,
    )
    missing = findings["labels missing in validation"]
    assert (set(missing.places), missing.is_problem) == ({"bad", "fair"}, False)


@pytest.mark.parametrize(
    "labels",
    [("True", "true"), ("1", "1.0"), ("01", "1"), ("good", "go\u200bod"), ("very  good", "very good"), ("\uff21", "a")],
)
def test_labels_that_people_read_as_one_are_a_problem(labels: tuple[str, str]) -> None:
    finding = found(train=[*clean(20), *(Example(f"{label} {i}", label) for label in labels for i in range(9))])[
        "alike labels"
    ]
    assert (finding.count, finding.is_problem, finding.places) == (1, True, [" / ".join(map(repr, labels))])
    assert "differ only in case, number format or invisible characters: 1" in finding.text
    kinds = [of_words(["x", str(i)], ["B-PER", "B-Per"]) for i in range(9)]
    assert found(train=kinds)["alike labels"].places == ["'PER' / 'Per'"]


def test_groups_of_train_in_validation_are_a_problem() -> None:
    train, validation = (
        [replace(e, group=f"user {i // 5}") for i, e in enumerate(part)] for part in (clean(20), clean(7))
    )
    validation = [replace(e, text=f"new {e.text}") for e in validation]
    finding = found(train=train, validation=validation)["groups of train and validation"]
    assert (finding.count, finding.is_problem) == (2, True)
    assert finding.places[0].startswith("'user 0' (")


def test_empty_and_long_texts_are_found() -> None:
    odd = [Example(" ", "good", where="x:1"), Example("word " * (LONG + 1), "bad", where="x:2")]
    findings = found(train=[*clean(20), *odd])
    assert findings["empty texts"].places == ["x:1"]
    assert findings["long texts"].places == [f"x:2 ({LONG + 1} words)"]


def test_places_are_few_and_problems_come_first() -> None:
    twice = [example for example in clean(40) for _ in range(2)]
    findings = audit({"train": [*twice, Example("text 0", "bad")]})
    assert [finding.is_problem for finding in findings] == [True, False]
    assert (findings[1].count, len(findings[1].places)) == (41, SHOWN)


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_texts_equal_those_of_pandas(seed: int) -> None:
    chance = np.random.default_rng(seed)
    tables = {
        name: pd.DataFrame({"text": chance.choice([*"abcDdeE"], n), "label": chance.choice(LABELS, n)})
        for name, n in (("train", 12), ("test", 9))
    }
    parts = {
        name: [Example(*row, where="x:1") for row in table.itertuples(index=False)] for name, table in tables.items()
    }
    findings = found(**parts)
    both = pd.concat(tables.values())
    folded = [table.text.str.lower() for table in tables.values()]
    wanted = {
        **{f"duplicates in {name}": table.text.duplicated().sum() for name, table in tables.items()},
        "conflicts": (both.groupby("text").label.nunique() > 1).sum(),
        "overlap of train and test": folded[1].isin(folded[0]).sum(),
    }
    assert {name: findings[name].count if name in findings else 0 for name in wanted} == wanted


@pytest.mark.parametrize(
    ("example", "labels"),
    [
        (Example("t", "good"), ["good"]),
        (Example("t", {"good": 0.3, "bad": 0.7}), ["bad"]),
        (Example("t", ("a", "b")), ["a", "b"]),
        (Example("t", ()), []),
        (Example("t", 2.5), []),
        (of_words(["Ada", "L", "in", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"]), ["PER", "LOC"]),
    ],
)
def test_labels_of_every_kind_of_record(example: Example, labels: list[str]) -> None:
    assert labels_of(example) == labels


def test_counts_and_quantiles_equal_those_of_the_libraries() -> None:
    chance = np.random.default_rng(0)
    names = chance.choice(["a", "b", "c"], 100).tolist()
    assert label_counts(Example("t", name) for name in names) == dict(Counter(names).most_common())
    values = chance.normal(size=101)
    examples = [Example("t", value) for value in values.tolist()]
    assert numbers(examples) == values.tolist()
    assert spread(values.tolist()) == {
        "min": values.min(),
        "median": pytest.approx(np.median(values)),
        "p95": pytest.approx(np.percentile(values, 95)),
        "max": values.max(),
    }
