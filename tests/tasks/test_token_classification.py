"""Token classification: the first sub-word carries the label, and long texts are answered to their end."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import items_of
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorakit.data.example import Example, of_text, of_words
from lorakit.data.tags import odd_tags
from lorakit.errors import ConfigError
from lorakit.inference.answer import answer_all
from lorakit.recipe import TaskSection, make_recipe
from lorakit.task_info import tag_names
from lorakit.tasks.base import IGNORE, Cut
from lorakit.tasks.token_classification import Tagged, TokenClassification, Window, windows

LABELS = tag_names(["LOC", "ORG", "PER"])
GOLD = {"Peter": "B-PER", "Blackburn": "I-PER", "EU": "B-ORG", "Brussels": "B-LOC"}
SENTENCES = [
    "Peter Blackburn visits the EU in Brussels .",
    "EU",
    "the film , in Brussels",
    "Peter , Peter Blackburn , Peter",
]
EXAMPLES = [of_words(text.split(), [GOLD.get(word, "O") for word in text.split()]) for text in SENTENCES]


class PerfectTagger(nn.Module):
    """Knows the tag of every word by its first sub-word."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        first = {tokenizer(word, add_special_tokens=False)["input_ids"][0]: tag for word, tag in GOLD.items()}
        table = [LABELS.index(first.get(i, "O")) for i in range(len(tokenizer))]
        self.register_buffer("table", torch.tensor(table))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=20.0 * F.one_hot(self.table[input_ids], len(LABELS)))


class WildTagger(nn.Module):
    """Says of each sub-word something of its own, with no thought of its neighbours."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        table = torch.randn(len(tokenizer), len(LABELS), generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def task(word_pieces: PreTrainedTokenizerFast) -> TokenClassification:
    return TokenClassification(word_pieces, LABELS, max_length=32)


@pytest.fixture
def model(make_tagger: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    return make_tagger(len(LABELS))


def answers(task: TokenClassification, model: nn.Module, examples: Sequence[Example]) -> list[Tagged]:
    return answer_all(model, task, examples, task.encode(examples), torch.device("cpu"))


def long_example(n: int, seed: int = 0) -> Example:
    """A sentence of n words, whose names are tagged at random."""
    chance = random.Random(seed)
    words = chance.choices([*GOLD, "visits", "the", "film", "\u200b", "Blackburns"], k=n)
    return of_words(words, [chance.choice(LABELS) if word in GOLD else "O" for word in words])


def test_first_sub_word_carries_the_label(task):
    (item,) = items_of(task, EXAMPLES[:1])
    pieces = task.tokenizer.convert_ids_to_tokens(item["input_ids"])
    labelled = [(piece, LABELS[i]) for piece, i in zip(pieces, item["labels"], strict=True) if i != IGNORE]
    wanted = ["peter", "black", "visits", "the", "eu", "in", "brussels", "."]
    assert labelled == list(zip(wanted, EXAMPLES[0].tags, strict=True))
    assert "##burn" in pieces


def test_labels_are_ignored_where_padded_and_at_other_sub_words(task):
    batch = task.collate(items_of(task, EXAMPLES))
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE).all()
    assert (batch["labels"] != IGNORE).sum(1).tolist() == [len(example.words) for example in EXAMPLES]
    assert batch["n_targets"].sum() == sum(len(example.words) for example in EXAMPLES)


def test_loss_is_that_of_transformers_times_the_targets(task, model):
    batch = task.collate(items_of(task, EXAMPLES))
    inputs = {key: value for key, value in batch.items() if key != "first"}
    torch.testing.assert_close(task.losses(model, batch).sum(), model(**inputs).loss * batch["n_targets"].sum())


@torch.no_grad()
def test_argmax_answers_are_the_best_tag_of_each_first_sub_word(task, model):
    found = answers(replace(task, decoding="argmax"), model, EXAMPLES)
    for example, answer in zip(EXAMPLES, found, strict=True):
        encoded = task.tokenizer(list(example.words), is_split_into_words=True, return_tensors="pt")
        best = model(**encoded).logits[0].softmax(-1).max(-1)
        first = [encoded.word_ids(0).index(word) for word in range(len(example.words))]
        assert answer.tags == tuple(LABELS[best.indices[position]] for position in first)
        assert answer.scores == pytest.approx([best.values[position].item() for position in first], rel=1e-4)


# Long texts


LIMITS = (4, 7, 8, 16, 31, 64)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("stride", [None, 0, 1])
def test_every_word_of_a_long_text_is_trained_once(word_pieces, limit, stride):
    task = TokenClassification(word_pieces, LABELS, limit, stride)
    example = long_example(60)
    items = items_of(task, [example])
    assert max(len(item["input_ids"]) for item in items) <= limit
    seen = [label for item in items for label in item["labels"] if label != IGNORE]
    present = [tag for word, tag in zip(example.words, example.tags, strict=True) if word != "\u200b"]
    assert [LABELS[label] for label in seen] == present
    assert sum(len(item["first"]) for item in items) == len(example.words)
    assert task.cut([example], [items]) == Cut()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("decoding", ["viterbi", "argmax"])
def test_perfect_tagger_is_perfect_however_short_its_windows_are(word_pieces, limit, decoding):
    task = TokenClassification(word_pieces, LABELS, limit, decoding=decoding)
    text = " , ".join(SENTENCES * 5).split()
    examples = [of_words(text, [GOLD.get(word, "O") for word in text]), *EXAMPLES]
    found = answers(task, PerfectTagger(word_pieces), examples)
    assert [answer.tags for answer in found] == [example.tags for example in examples]


def test_text_that_fits_is_one_item_as_the_tokenizer_gives_it(task):
    encoded = task.tokenizer([list(example.words) for example in EXAMPLES], is_split_into_words=True)
    for i, items in enumerate(task.encode(EXAMPLES)):
        assert [item["input_ids"] for item in items] == [encoded["input_ids"][i]]
        word_ids = encoded.word_ids(i)
        assert items[0]["first"] == [word_ids.index(word) for word in range(len(EXAMPLES[i].words))]


@pytest.mark.parametrize("decoding", ["viterbi", "argmax"])
def test_windows_of_a_text_are_one_sentence_to_the_decoding(word_pieces, decoding):
    """With a tagger that looks at no context, windows change nothing; read one by one they would."""
    task = TokenClassification(word_pieces, LABELS, 10, decoding=decoding)
    examples, model = [long_example(40, seed) for seed in range(20)], WildTagger(word_pieces)
    found = answers(task, model, examples)
    assert found == answers(replace(task, max_length=1000), model, examples)
    raws = [task.predict(model, task.collate(items)) for items in task.encode(examples)]
    apart = [tuple(LABELS[i] for raw in rows for i in raw.tags.tolist()) for rows in raws]
    assert (apart == [answer.tags for answer in found]) == (decoding == "argmax")


def test_answers_do_not_depend_on_the_batch(word_pieces, model):
    task = TokenClassification(word_pieces, LABELS, 10)
    examples = [long_example(n, seed=n) for n in (3, 40, 1, 17)]
    together, alone = answers(task, model, examples), [answers(task, model, [example])[0] for example in examples]
    turned = answers(task, model, examples[::-1])[::-1]
    assert [a.tags for a in together] == [a.tags for a in alone] == [a.tags for a in turned]
    for one, other in zip(together, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


@pytest.mark.parametrize("limit", [8, 64])
def test_answers_are_valid_iob2_and_argmax_where_that_is_valid(word_pieces, limit):
    model = WildTagger(word_pieces)
    task = TokenClassification(word_pieces, LABELS, limit)
    examples = [long_example(n, seed=n) for n in range(1, 40)]
    best = answers(replace(task, decoding="argmax"), model, examples)
    found = answers(task, model, examples)
    assert not any(odd_tags(answer.tags, "IOB2") for answer in found)
    valid = [not odd_tags(answer.tags, "IOB2") for answer in best]
    assert set(valid) == {True, False}
    assert all(a == b for a, b, same in zip(found, best, valid, strict=True) if same)


def test_stride_that_leaves_no_step_is_refused(word_pieces):
    section = TaskSection(name="token_classification", stride=6)
    with pytest.raises(ConfigError, match=r"task\.stride = 6: a window of 8 tokens holds 6 .* share at most 5"):
        TokenClassification.make(section, word_pieces, LABELS, 8)
    assert TokenClassification.make(section, word_pieces, LABELS, 9).stride == 6


def test_stride_is_the_number_of_shared_tokens(word_pieces):
    task = TokenClassification(word_pieces, LABELS, 10, stride=3)
    first, second, *_ = items_of(task, [long_example(40)])
    assert first["input_ids"][1:-1][-3:] == second["input_ids"][1:-1][:3]


@pytest.mark.parametrize("key", ["stride=4", "subwords=all", "decoding=argmax"])
def test_keys_of_token_classification_are_refused_elsewhere(key):
    raw = {"model": {"base": "minilm"}, "data": {"train": "a.csv"}}
    with pytest.raises(ConfigError, match=f"task.{key.partition('=')[0]} = .* belongs to token_classification"):
        make_recipe(raw, [f"task.{key}"])
    make_recipe(raw, ["task.name=token_classification", f"task.{key}"])


# Labels on all sub-words


def test_all_sub_words_carry_the_tag_and_its_inside(word_pieces):
    task = TokenClassification(word_pieces, LABELS, 32, subwords="all")
    example = of_words(["Peter", "Blackburns", "Blackburn", "films"], ["B-PER", "I-PER", "B-ORG", "O"])
    (item,) = items_of(task, [example])
    pieces = word_pieces.convert_ids_to_tokens(item["input_ids"])
    labels = [LABELS[i] if i != IGNORE else None for i in item["labels"]]
    assert list(zip(pieces, labels, strict=True)) == [
        ("[CLS]", None),
        ("peter", "B-PER"),
        ("black", "I-PER"),
        ("##burn", "I-PER"),
        ("##s", "I-PER"),
        ("black", "B-ORG"),
        ("##burn", "I-ORG"),
        ("film", "O"),
        ("##s", "O"),
        ("[SEP]", None),
    ]


@pytest.mark.parametrize("limit", LIMITS)
def test_all_sub_words_are_trained_in_one_window_alone(word_pieces, limit):
    """A word that a window cuts keeps the pieces that are there; none of them counts twice."""
    task = TokenClassification(word_pieces, LABELS, limit, subwords="all")
    example = long_example(60)
    whole = items_of(TokenClassification(word_pieces, LABELS, 10_000, subwords="all"), [example])[0]
    wanted = [i for i in whole["labels"] if i != IGNORE]
    seen = [i for item in items_of(task, [example]) for i in item["labels"] if i != IGNORE]
    assert len(seen) <= len(wanted)
    if limit >= 8:  # windows that share two pieces at least have each name of three whole in one of them
        assert seen == wanted


def test_answers_are_those_of_the_first_sub_word_whichever_are_trained(task, model):
    assert answers(replace(task, subwords="all"), model, EXAMPLES) == answers(task, model, EXAMPLES)


# Raw texts


class EverythingIsAName(nn.Module):
    """Says B-PER wherever it is asked, at special tokens too."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=F.one_hot(torch.full_like(input_ids, LABELS.index("B-PER")), len(LABELS)))


@pytest.mark.parametrize("decoding", ["viterbi", "argmax"])
def test_word_without_a_sub_word_is_answered_outside(task, decoding):
    example = of_words(["\u200b", "Peter", "\u200b", "EU"])
    (answer,) = answers(replace(task, decoding=decoding), EverythingIsAName(), [example])
    assert answer.tags == ("O", "B-PER", "O", "B-PER")


@pytest.mark.parametrize("limit", [5, 32])
@pytest.mark.parametrize("text", ["  Peter   Blackburn\tvisits\n the EU. ", "EU,Brussels!", "(Peter Blackburn)"])
def test_entities_of_a_raw_text_point_into_it(word_pieces, text, limit):
    example = of_text(text)
    task = TokenClassification(word_pieces, LABELS, limit)
    (answer,) = answers(task, PerfectTagger(word_pieces), [example])
    line = task.to_json(example, answer)
    assert list(line) == ["text", "entities"]
    assert line["text"] == text
    assert [set(entity) for entity in line["entities"]] == [
        {"entity_group", "word", "start", "end", "score"} for _ in line["entities"]
    ]
    for entity in line["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["word"]
    named = {(entity["entity_group"], " ".join(entity["word"].split())) for entity in line["entities"]}
    wanted = {("PER", "Peter Blackburn"), ("ORG", "EU"), ("LOC", "Brussels")}
    assert named == {(kind, name) for kind, name in wanted if name in " ".join(text.split())}
    assert json.loads(json.dumps(line)) == line


def test_score_of_an_entity_is_the_mean_of_its_words(task):
    scores = (0.5, 0.25, *(1.0 for _ in EXAMPLES[0].words[2:]))
    first, *_ = task.to_json(EXAMPLES[0], Tagged(EXAMPLES[0].tags, scores))["entities"]
    assert first["word"] == "Peter Blackburn"
    assert first["score"] == (0.5 + 0.25) / 2


def test_expected_has_the_gold_entities_in_the_form_of_answers(task):
    perfect = Tagged(EXAMPLES[0].tags, tuple(1.0 for _ in EXAMPLES[0].words))
    found = task.to_json(EXAMPLES[0], perfect)["entities"]
    assert task.expected(EXAMPLES[0]) == [{k: v for k, v in entity.items() if k != "score"} for entity in found]


# Windows over a long text: each word in exactly one, and there with most context, by brute force


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
