"""Batches are a pure function of lengths, seed and epoch, with hardly any padding."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorakit.data.audit import label_counts
from lorakit.data.batches import POOL, bucketed_batches, sorted_batches, split
from lorakit.data.example import Example, of_words
from lorakit.errors import ConfigError

BATCH = 32
LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=200)


def realistic_lengths(n: int = 4 * POOL * BATCH) -> list[int]:
    """Tokens of texts: log-normal, as sentences are (mean about 24, some over 100)."""
    rng = random.Random(n)
    return [max(3, min(128, round(rng.lognormvariate(3, 0.6)))) for _ in range(n)]


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    """Processed tokens over real tokens."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_bucketed_batches_have_every_example_once(lengths, size, seed, epoch):
    batches = bucketed_batches(lengths, size, seed, epoch)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # one may be smaller
    assert 1 <= min(map(len, batches)) <= size
    assert batches == bucketed_batches(lengths, size, seed, epoch)


@given(lengths=LENGTHS, size=st.integers(1, 40), most=st.none() | st.integers(1, 200))
def test_sorted_batches_begin_with_the_longest_and_have_every_example_once(lengths, size, most):
    batches = sorted_batches(lengths, size, most)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert [lengths[i] for i in flat(batches)] == sorted(lengths, reverse=True)
    for batch in batches[:-1]:  # as many as the limits let in, and one at least; the last has what is left
        longest = max(1, lengths[batch[0]])
        assert len(batch) == size or (most is not None and len(batch) == max(1, most // longest))
    assert all(len(batch) <= size for batch in batches)


@given(
    pairs=st.lists(st.tuples(st.integers(1, 512), st.integers(1, 64)), min_size=1, max_size=200), size=st.integers(1, 9)
)
def test_batches_by_targets_too_have_every_example_once(pairs, size):
    lengths, targets = zip(*pairs, strict=True)
    batches = bucketed_batches(lengths, size, 0, 0, targets)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)


def test_targets_are_padded_little_where_texts_do_not_tell_their_length():
    lengths = realistic_lengths()
    rng = random.Random(0)
    targets = [rng.choice((2, 2, 2, 12, 25)) for _ in lengths]
    by_text, by_both = (bucketed_batches(lengths, BATCH, 0, 0, known) for known in ((), targets))
    assert padding(by_both, targets) < padding(by_text, targets) / 2
    assert padding(by_both, lengths) < padding(by_text, lengths) + 0.1


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (1, 1)])
def test_other_seed_or_epoch_gives_another_order(seed, epoch):
    lengths = realistic_lengths()
    assert bucketed_batches(lengths, BATCH, 0, 0) != bucketed_batches(lengths, BATCH, seed, epoch)


def test_other_epoch_mixes_other_examples_even_where_all_are_equally_long():
    lengths = [1] * (2 * BATCH)
    first, second = (set(map(frozenset, bucketed_batches(lengths, BATCH, 0, epoch))) for epoch in (0, 1))
    assert first != second


def test_bucketed_batches_come_in_no_order_of_length():
    lengths = realistic_lengths()
    longest = [max(lengths[i] for i in batch) for batch in bucketed_batches(lengths, BATCH, 0, 0)[:POOL]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_bucketed_and_sorted_batches_are_hardly_padded_where_plain_ones_are():
    lengths = realistic_lengths()
    plain = [list(range(start, start + BATCH)) for start in range(0, len(lengths), BATCH)]
    assert padding(plain, lengths) > 1.5
    assert padding(bucketed_batches(lengths, BATCH, 0, 0), lengths) < 1.1
    assert padding(sorted_batches(lengths, BATCH), lengths) < 1.1


@pytest.mark.parametrize("n", [2, 3, 9, 10, 100, 101])
def test_split_is_disjoint_complete_in_file_order_and_never_empty(n):
    examples = [Example(str(i)) for i in range(n)]
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        train, validation = split(examples, share, seed=0)
        assert sorted([*train, *validation], key=examples.index) == examples
        assert train == sorted(train, key=examples.index)
        assert validation == sorted(validation, key=examples.index)
        assert len(validation) == min(n - 1, max(1, round(n * share)))


def test_split_depends_on_the_seed_alone():
    examples = [Example(str(i)) for i in range(100)]
    assert split(examples, 0.1, seed=0) == split(list(examples), 0.1, seed=0) != split(examples, 0.1, seed=1)


@given(
    labels=st.lists(st.sampled_from("aaaaaaabbc"), min_size=10, max_size=200),
    share=st.sampled_from((0.1, 0.2, 0.5)),
    seed=st.integers(0, 9),
)
@example(labels=[*"aaaaaaaaaaaaabc"], share=0.5, seed=0)
def test_split_gives_each_label_its_share(labels, share, seed):
    examples = [Example(str(i), label) for i, label in enumerate(labels)]
    _, validation = split(examples, share, seed)
    assert len(validation) == max(1, round(len(examples) * share))
    for label, n in Counter(labels).items():
        assert abs(sum(e.label == label for e in validation) - n * share) <= 1


def test_split_gives_each_of_several_labels_and_each_entity_type_its_share():
    rng = random.Random(0)
    several = [Example(str(i), tuple(x for x in "abcd" if rng.random() < 0.3)) for i in range(500)]
    words = [of_words([str(i), "x"], rng.choice((["B-A", "O"], ["B-B", "I-B"], ["O", "O"]))) for i in range(500)]
    for examples in (several, words):
        _, validation = split(examples, 0.2, 0)
        counts, held_out = (label_counts(part) for part in (examples, validation))
        assert len(validation) == 100
        assert all(held_out[label] == pytest.approx(0.2 * n, abs=2) for label, n in counts.items())


@pytest.mark.parametrize("by_group", [False, True])
def test_split_has_no_text_and_no_group_on_both_sides(by_group):
    rng = random.Random(0)
    texts = [f"text {rng.randrange(120)}" for _ in range(300)]
    users = [f"user {rng.randrange(40)}" if int(text[5:]) > 30 else None for text in texts]
    groups = [user or f"alone {i}" for i, user in enumerate(users)]
    examples = [Example(t, rng.choice("ab"), group=g) for t, g in zip(texts, groups, strict=True)]
    if by_group:  # else texts that users share make one group of all
        examples = [replace(e, text=f"{e.group}: {e.text}") for e in examples]
    train, validation = split(examples, 0.2, 0, by_group=by_group)
    assert sorted([*train, *validation], key=id) == sorted(examples, key=id)
    assert 30 <= len(validation) <= 60
    sides = [{e.group if by_group else e.text for e in part} for part in (train, validation)]
    assert not sides[0] & sides[1]


def test_split_of_few_large_groups_holds_the_smallest_out():
    examples = [Example(str(i), "a", group=group) for i, group in enumerate("aaaabbbbccc")]
    _, validation = split(examples, 0.1, 0, by_group=True)
    assert {e.group for e in validation} == {"c"}
    with pytest.raises(ConfigError, match=r"data\.group: all examples are in one group, .*set data\.validation"):
        split(examples[:4], 0.1, 0, by_group=True)
