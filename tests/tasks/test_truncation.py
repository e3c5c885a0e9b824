"""A length limit lowers the score of a task that cuts, says so, and changes nothing for one that does not.

Each task is answered by a model that makes no mistake on what it is given to read, so that all that is lost is lost to
the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example, of_words
from lorakit.engine.evaluate import answer_all
from lorakit.tasks.base import Scores, Task
from lorakit.tasks.entity_list import ListFormat
from lorakit.tasks.sequence_classification import SequenceClassification
from lorakit.tasks.text2text_ner import Text2TextNer
from lorakit.tasks.token_classification import TokenClassification, tag_names

GOLD = {"Peter": "B-PER", "EU": "B-ORG", "Brussels": "B-LOC"}
TEXTS = ["the film , the film in the EU", "Peter visits Brussels , EU , Peter", "the film", "film , film , in Brussels"]
SENTENCES = [of_words(text.split(), [GOLD.get(word, "O") for word in text.split()]) for text in TEXTS]
REVIEWS = [
    Example("the film is the film is fine", "good"),
    Example("fine , fine , the film", "good"),
    Example("the film , the film , the black film", "bad"),
    Example("black", "bad"),
]


class Classifier(nn.Module):
    """Reads `fine`, and says the worst of a text in which it has not read it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.cues = tokenizer("fine", add_special_tokens=False)["input_ids"]

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        good = torch.isin(input_ids, torch.tensor(self.cues)).any(1)
        return SimpleNamespace(logits=20.0 * F.one_hot(good.long(), 2))


class Tagger(nn.Module):
    """Knows every name by its one sub-word."""

    def __init__(self, tokenizer: Any, labels: tuple[str, ...]) -> None:
        super().__init__()
        known = {tokenizer(word, add_special_tokens=False)["input_ids"][0]: tag for word, tag in GOLD.items()}
        self.table = torch.tensor([labels.index(known.get(i, "O")) for i in range(len(tokenizer))])
        self.n = len(labels)

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=20.0 * F.one_hot(self.table[input_ids], self.n))


class Writer(nn.Module):
    """Writes down every name that it reads in full, token by token until it is stopped."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    config = SimpleNamespace(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, model_type="writer")

    def get_encoder(self) -> Callable[..., SimpleNamespace]:
        return lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=input_ids)

    def forward(
        self, encoder_outputs: tuple[Tensor], past_key_values: int | None, use_cache: bool, **_: Tensor
    ) -> SimpleNamespace:
        step, tokens = past_key_values or 0, []
        for text in self.tokenizer.batch_decode(encoder_outputs[0], skip_special_tokens=True):
            words = text.split()
            target = self.tokenizer(ListFormat().write(words, [GOLD.get(word, "O") for word in words]))["input_ids"]
            tokens.append((target + [self.config.eos_token_id] * (step + 1))[step])
        logits = F.one_hot(torch.tensor(tokens), len(self.tokenizer)).float()
        return SimpleNamespace(logits=logits[:, None], past_key_values=step + 1)


def score(task: Task, model: nn.Module, examples: list[Example]) -> Scores:
    items = task.encode(examples)
    found = task.score(examples, answer_all(model, task, examples, items, torch.device("cpu")))
    return {**found, "cut": task.cut(examples, items)}


@pytest.fixture
def make(word_pieces: Any, byte_tokenizer: Any) -> Callable[[str], tuple[Task, nn.Module, list[Example]]]:
    """Each task with no limit in the way, its faultless model, and labelled examples."""
    tags = tag_names(["LOC", "ORG", "PER"])
    made: dict[str, tuple[Task, nn.Module, list[Example]]] = {
        "sequence_classification": (
            SequenceClassification(word_pieces, ("bad", "good"), 64),
            Classifier(word_pieces),
            REVIEWS,
        ),
        "token_classification": (TokenClassification(word_pieces, tags, 64), Tagger(word_pieces, tags), SENTENCES),
        "text2text_ner": (Text2TextNer(byte_tokenizer, ("LOC", "ORG", "PER"), 128), Writer(byte_tokenizer), SENTENCES),
    }
    return made.__getitem__


@pytest.mark.parametrize("name", ["sequence_classification", "token_classification", "text2text_ner"])
def test_faultless_model_scores_one_where_nothing_is_cut(make, name):
    task, model, examples = make(name)
    found = score(task, model, examples)
    assert found[task.metric] == 1.0
    assert not any(found["cut"])


@pytest.mark.parametrize(
    ("name", "key", "limits", "measure"),
    [
        ("sequence_classification", "max_length", range(3, 12), "accuracy"),
        ("text2text_ner", "max_length", range(5, 60, 5), "entity_recall"),
        ("text2text_ner", "max_target_length", range(2, 52, 4), "entity_recall"),
    ],
)
def test_cutting_lowers_the_score_and_hides_nothing(make, name, key, limits, measure):
    task, model, examples = make(name)
    found = [score(replace(task, **{key: limit}), model, examples) for limit in limits]
    assert all(shorter[measure] <= longer[measure] for shorter, longer in pairwise(found))
    assert found[0][task.metric] < found[-1][task.metric] == 1.0
    assert {_supports(scores) for scores in found} == {_supports(score(task, model, examples))}
    assert all(any(scores["cut"]) for scores in found if scores[task.metric] < 1)


def _supports(scores: Scores) -> tuple[int, ...]:
    """How many gold labels or entities were scored, of each kind."""
    rows = scores.get("per_type", scores.get("per_class", {}))
    found = tuple(row["support"] for row in rows.values())
    assert sum(found)
    return found


@pytest.mark.parametrize("limit", [3, 4, 5, 8])
def test_windows_lose_nothing(make, limit):
    task, model, examples = make("token_classification")
    assert score(replace(task, max_length=limit), model, examples) == score(task, model, examples)
