"""Batches are a pure function of lengths, seed and epoch, with hardly any padding."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.batches import POOL, bucketed_batches, sorted_batches, split
from lorakit.data.example import Example

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
@settings(max_examples=50, deadline=None)
def test_bucketed_batches_have_every_example_once(lengths, size, seed, epoch):
    batches = bucketed_batches(lengths, size, seed, epoch)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # one may be smaller
    assert 1 <= min(map(len, batches)) <= size
    assert batches == bucketed_batches(lengths, size, seed, epoch)


@given(lengths=LENGTHS, size=st.integers(1, 40), most=st.none() | st.integers(1, 200))
@settings(max_examples=50, deadline=None)
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
@settings(max_examples=50, deadline=None)
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
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_split_is_disjoint_complete_in_file_order_and_never_empty(n, share):
    examples = [Example(str(i)) for i in range(n)]
    train, validation = split(examples, share, seed=0)
    assert sorted([*train, *validation], key=examples.index) == examples
    assert train == sorted(train, key=examples.index)
    assert validation == sorted(validation, key=examples.index)
    assert len(validation) == min(n - 1, max(1, round(n * share)))


def test_split_depends_on_the_seed_alone():
    examples = [Example(str(i)) for i in range(100)]
    assert split(examples, 0.1, seed=0) == split(list(examples), 0.1, seed=0) != split(examples, 0.1, seed=1)
