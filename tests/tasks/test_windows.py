"""Windows over a long text: each word in exactly one, and there with most context, by brute force."""

from __future__ import annotations

import math
import random

import pytest

from lorakit.tasks.token_classification import Window, windows

SIZES = [(1, 0), (4, 0), (4, 1), (5, 3), (8, 2), (8, 7)]


def random_words(seed: int) -> list[tuple[int, int]]:
    """Words of 0 to 9 sub-words, most of 1 or 2."""
    chance = random.Random(seed)
    words, at = [], 0
    for _ in range(chance.randint(1, 25)):
        words.append((at, at + chance.choice((0, 1, 1, 1, 2, 2, 3, 9))))
        at = words[-1][1]
    return words


def context(word: tuple[int, int], start: int, end: int, length: int) -> float:
    """Sub-words on the shorter side of a word in a window; there is no more to be had beyond the ends of the text."""
    left = math.inf if start == 0 else word[0] - start
    right = math.inf if end == length else end - word[1]
    return min(left, right)


@pytest.mark.parametrize(("size", "overlap"), SIZES)
def test_each_word_is_answered_once_where_it_has_most_context(size, overlap):
    for words in map(random_words, range(20)):
        length = words[-1][1]
        every = [(s, min(s + size, length)) for s in range(0, max(1, length - size), size - overlap)]
        every = sorted({*every, (max(0, length - size), length)})
        found = windows(words, length, size, overlap)
        own = {window[:2] for window in found}
        assert [(window.start, window.end) for window in found] == [pair for pair in every if pair in own]
        assert [i for window in found for i in range(window.first, window.last)] == list(range(len(words)))
        for window in found:
            for word in words[window.first : window.last]:
                if word[0] == word[1]:
                    continue
                assert window.start <= word[0] < window.end
                holding = [pair for pair in every if pair[0] <= word[0] < pair[1]]
                assert context(word, *window[:2], length) == max(context(word, *pair, length) for pair in holding)


def test_text_that_fits_is_one_window():
    for length in (0, 1, 7, 8):
        words = [(i, i + 1) for i in range(length)]
        assert windows(words, length, 8, 2) == [Window(0, length, 0, length)]


def test_windows_are_full_and_share_the_overlap_at_least():
    words = [(i, i + 1) for i in range(21)]
    found = windows(words, 21, 8, 2)
    assert [(window.start, window.end) for window in found] == [(0, 8), (6, 14), (12, 20), (13, 21)]


def test_word_longer_than_a_window_is_answered_where_it_begins():
    found = windows([(0, 2), (2, 60), (60, 62)], 62, 8, 2)
    assert [(window.start, window.first, window.last) for window in found] == [(0, 0, 2), (54, 2, 3)]
