"""Token classification: the first sub-word carries the label, and words that are cut off count as missed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import items_of
from torch import nn

from lorakit.data.example import of_text, of_words
from lorakit.data.tags import entities
from lorakit.tasks.base import IGNORE
from lorakit.tasks.token_classification import Tagged, TokenClassification, tag_names

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

    def __init__(self, tokenizer):
        super().__init__()
        first = {tokenizer(word, add_special_tokens=False)["input_ids"][0]: tag for word, tag in GOLD.items()}
        table = [LABELS.index(first.get(i, "O")) for i in range(len(tokenizer))]
        self.register_buffer("table", torch.tensor(table))

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=20.0 * F.one_hot(self.table[input_ids], len(LABELS)))


@pytest.fixture
def task(word_pieces) -> TokenClassification:
    return TokenClassification(word_pieces, LABELS, max_length=32)


@pytest.fixture
def model(make_tagger):
    return make_tagger(len(LABELS))


def answers(task, model, examples):
    raw = task.predict(model, task.collate(items_of(task, examples)))
    return [task.answer(example, [row]) for example, row in zip(examples, raw, strict=True)]


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
    assert task.n_targets(batch) == sum(len(example.words) for example in EXAMPLES)


def test_loss_is_that_of_transformers_times_the_targets(task, model):
    batch = task.collate(items_of(task, EXAMPLES))
    inputs = {key: value for key, value in batch.items() if key != "first"}
    torch.testing.assert_close(task.loss(model, batch), model(**inputs).loss * task.n_targets(batch))


def test_loss_of_a_batch_is_the_sum_of_its_rows(task, model):
    items = items_of(task, EXAMPLES)
    rows = [task.loss(model, task.collate([item])) for item in items]
    torch.testing.assert_close(task.loss(model, task.collate(items)), torch.stack(rows).sum())


@torch.no_grad()
def test_answers_are_the_best_tag_of_each_first_sub_word(task, model):
    found = answers(task, model, EXAMPLES)
    for example, answer in zip(EXAMPLES, found, strict=True):
        encoded = task.tokenizer(list(example.words), is_split_into_words=True, return_tensors="pt")
        best = model(**encoded).logits[0].softmax(-1).max(-1)
        first = [encoded.word_ids(0).index(word) for word in range(len(example.words))]
        assert answer.tags == tuple(LABELS[best.indices[position]] for position in first)
        assert answer.scores == pytest.approx([best.values[position].item() for position in first], rel=1e-4)


def test_perfect_tags_score_one(task, word_pieces):
    scores = task.score(EXAMPLES, answers(task, PerfectTagger(word_pieces), EXAMPLES))
    assert scores["entity_f1"] == scores["entity_f1_strict"] == 1.0


def test_cutting_lowers_the_score_of_a_perfect_tagger_and_never_raises_it(word_pieces):
    model = PerfectTagger(word_pieces)
    longest = max(len(item["input_ids"]) for item in items_of(TokenClassification(word_pieces, LABELS, 32), EXAMPLES))
    tasks = [TokenClassification(word_pieces, LABELS, limit) for limit in range(3, longest + 1)]
    scores = [task.score(EXAMPLES, answers(task, model, EXAMPLES)) for task in tasks]
    recall = [score["entity_recall"] for score in scores]
    assert recall == sorted(recall)
    f1 = [score["entity_f1"] for score in scores]
    assert f1[0] < max(f1) == f1[-1] == 1.0
    support = {kind: row["support"] for kind, row in scores[0]["per_type"].items()}
    assert sum(support.values()) == sum(len(entities(example.tags)) for example in EXAMPLES)  # nothing gold is lost


def test_words_cut_off_are_answered_outside_and_leave_no_label(word_pieces):
    limit = 4  # [CLS], two sub-words, [SEP]
    task = TokenClassification(word_pieces, LABELS, limit)
    example = of_words(["Peter", "EU", "Brussels", "EU"], ["B-PER", "B-ORG", "B-LOC", "B-ORG"])
    batch = task.collate(items_of(task, [example]))
    assert task.n_targets(batch) == limit - 2
    (answer,) = answers(task, PerfectTagger(word_pieces), [example])
    assert answer.tags == ("B-PER", "B-ORG", "O", "O")


def test_word_without_a_sub_word_is_answered_outside(task, word_pieces):
    example = of_words(["Peter", "\u200b", "EU"], ["B-PER", "O", "B-ORG"])
    (answer,) = answers(task, PerfectTagger(word_pieces), [example])
    assert answer.tags == example.tags


@pytest.mark.parametrize("text", ["  Peter   Blackburn\tvisits\n the EU. ", "EU,Brussels!", "(Peter Blackburn)"])
def test_entities_of_a_raw_text_point_into_it(task, word_pieces, text):
    example = of_text(text)
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
