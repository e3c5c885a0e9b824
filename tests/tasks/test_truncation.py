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
from lorakit.inference.answer import answer_all
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Task
from lorakit.tasks.metrics.bootstrap import Scores
from lorakit.tasks.registry import find_labels, make_task
from lorakit.tasks.text2text.formats import ListFormat

ANSWERING = [name for name, info in TASKS.items() if not info.contrasts]  # by themselves, right or wrong
GOLD = {"Peter": "B-PER", "EU": "B-ORG", "Brussels": "B-LOC"}
TEXTS = ["the film , the film in the EU", "Peter visits Brussels , EU , Peter", "the film", "film , film , in Brussels"]
SENTENCES = [of_words(text.split(), [GOLD.get(word, "O") for word in text.split()]) for text in TEXTS]
REVIEWS = ["the film in the film in fine", "fine , fine , the film", "the film , the film , the black film", "black"]
# by what a task wants of a record: the label of a review with `fine` in it, and of one without
LABELS: dict[str, tuple[Any, Any]] = {
    "label": ("1", "0"),
    "labels": (("fine",), ("dull",)),
    "number": (1.0, 0.0),
    "target": ("1", "0"),
}
# what a head says when it has read `fine`; it says the opposite when it has not
LOGITS = {
    "sequence_classification": (-20.0, 20.0),
    "multi_label_classification": (-20.0, 20.0),
    "ordinal_classification": (20.0,),
    "sequence_regression": (1.0,),  # the mean, and one standard deviation
}


class Reader(nn.Module):
    """Says one thing of a text in which it reads `fine`, and the opposite of every other."""

    def __init__(self, tokenizer: Any, logits: tuple[float, ...]) -> None:
        super().__init__()
        self.cues = torch.tensor(tokenizer("fine", add_special_tokens=False)["input_ids"])
        self.says = torch.tensor(logits)

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        is_fine = torch.isin(input_ids, self.cues).any(1)
        return SimpleNamespace(logits=(2.0 * is_fine[:, None] - 1) * self.says)


class Tagger(nn.Module):
    """Knows every name by its one sub-word."""

    def __init__(self, tokenizer: Any, labels: tuple[str, ...]) -> None:
        super().__init__()
        known = {tokenizer(word, add_special_tokens=False)["input_ids"][0]: tag for word, tag in GOLD.items()}
        self.table = torch.tensor([labels.index(known.get(i, "O")) for i in range(len(tokenizer))])
        self.n = len(labels)

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=20.0 * F.one_hot(self.table[input_ids], self.n))


class Steps:
    """A cache that knows how many tokens have been written, the same for every row."""

    def __init__(self, n: int) -> None:
        self.n = n

    def batch_select_indices(self, rows: Tensor) -> None:
        """Rows that have ended leave nothing to forget."""


class Writer(nn.Module):
    """Writes what it makes of the text that it reads, token by token until it is stopped."""

    def __init__(self, tokenizer: Any, write: Callable[[str], str]) -> None:
        super().__init__()
        self.tokenizer, self.write = tokenizer, write

    config = SimpleNamespace(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, model_type="writer")

    def get_output_embeddings(self) -> None:
        """It has none."""

    def get_encoder(self) -> Callable[..., SimpleNamespace]:
        return lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=input_ids)

    def forward(
        self, encoder_outputs: tuple[Tensor], past_key_values: Steps | None, use_cache: bool, **_: Tensor
    ) -> SimpleNamespace:
        step, tokens = past_key_values.n if past_key_values else 0, []
        for text in self.tokenizer.batch_decode(encoder_outputs[0], skip_special_tokens=True):
            target = self.tokenizer(self.write(text))["input_ids"]
            tokens.append((target + [self.config.eos_token_id] * (step + 1))[step])
        logits = F.one_hot(torch.tensor(tokens), len(self.tokenizer)).float()
        return SimpleNamespace(logits=logits[:, None], past_key_values=Steps(step + 1))


def names_in(text: str) -> str:
    """The answer in full, of the words as far as they can be read."""
    return ListFormat().write(text.split(), [GOLD.get(word, "O") for word in text.split()])


def score(task: Task, model: nn.Module, examples: list[Example]) -> Scores:
    items = task.encode(examples)
    found = task.evaluate(examples, answer_all(model, task, examples, items, torch.device("cpu"))).scores
    return {**found, "cut": task.cut(examples, items)}


@pytest.fixture
def make(word_pieces: Any, byte_tokenizer: Any) -> Callable[[str], tuple[Task, nn.Module, list[Example]]]:
    """A task with no limit in the way, its faultless model, and labelled examples."""

    def made(name: str) -> tuple[Task, nn.Module, list[Example]]:
        kind, examples = TASKS[name], SENTENCES
        if kind.wants != "words":
            fine, dull = LABELS[kind.wants]
            key = "target" if kind.wants == "target" else "label"
            examples = [Example(text, **{key: fine if "fine" in text else dull}) for text in REVIEWS]
        labels, tokenizer = (
            find_labels(name, examples),
            byte_tokenizer if kind.model_kind == "text2text" else word_pieces,
        )
        task = make_task(TaskSection(name=name), tokenizer, labels, 128).fit(examples).task
        if name == "token_classification":
            return task, Tagger(tokenizer, labels), examples
        if kind.model_kind == "text2text":
            write = names_in if kind.wants == "words" else lambda text: str(int("fine" in text))
            return task, Writer(tokenizer, write), examples
        return task, Reader(tokenizer, LOGITS[name]), examples

    return made


@pytest.mark.parametrize("name", ANSWERING)
def test_faultless_model_scores_one_where_nothing_is_cut(make, name):
    task, model, examples = make(name)
    found = score(task, model, examples)
    assert found[task.info.metrics[0]] == pytest.approx(1.0)
    assert not any(found["cut"])


CUTTING = [
    *((name, "max_length") for name in ANSWERING if name != "token_classification"),  # which reads in windows
    ("text2text_ner", "max_target_length"),
]


@pytest.mark.parametrize(("name", "key"), CUTTING)
def test_cutting_lowers_the_score_and_hides_nothing(make, name, key):
    task, model, examples = make(name)
    limits = range(4, 64, 11) if TASKS[name].model_kind == "text2text" else range(3, 12)
    found = [score(replace(task, **{key: limit}), model, examples) for limit in limits]
    measures = [scores["entity_recall" if name == "text2text_ner" else task.info.metrics[0]] for scores in found]
    assert all(shorter <= longer + 1e-9 for shorter, longer in pairwise(measures))
    assert found[0][task.info.metrics[0]] < 0.99
    assert found[-1][task.info.metrics[0]] == pytest.approx(1.0)
    assert {_supports(scores) for scores in found} == {_supports(score(task, model, examples))}
    assert all(any(scores["cut"]) for scores in found if scores[task.info.metrics[0]] < 0.99)


def _supports(scores: Scores) -> tuple[int, ...]:
    """How many gold labels or entities were scored, of each kind; numbers and texts have no kinds."""
    rows = next((scores[key] for key in ("per_type", "per_class", "per_label") if key in scores), {})
    found = tuple(row["support"] for row in rows.values())
    assert sum(found) or "pearson" in scores or "chrf" in scores
    return found


@pytest.mark.parametrize("limit", [3, 4, 5, 8])
def test_windows_lose_nothing(make, limit):
    task, model, examples = make("token_classification")
    assert score(replace(task, max_length=limit), model, examples) == score(task, model, examples)
