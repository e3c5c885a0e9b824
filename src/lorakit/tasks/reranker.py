"""How well a text answers a query, both read together: a cross-encoder with one score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.errors import ConfigError, DataError
from lorakit.pooling import Layout
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS, TaskInfo
from lorakit.tasks.base import Batch, Cut, Item, inputs_of
from lorakit.tasks.embedding import ANCHOR, NEGATIVE, SCORES, form_of
from lorakit.tasks.metrics.bootstrap import Evaluation, Ranking, Statistic
from lorakit.tasks.metrics.labels import values
from lorakit.tasks.metrics.numbers import number_statistics
from lorakit.tasks.metrics.retrieval import retrieval_statistics
from lorakit.tasks.sequence import SequenceTask, texts_of


def complete(section: TaskSection, layout: Layout, examples: Sequence[Example]) -> TaskSection:
    """The section with the loss and the metric that fit the training data, where it says nothing.

    Raises:
        ConfigError: its loss or its metric does not fit the data.
        DataError: there are no negatives, or a score is not a share.
    """
    form, first = form_of(examples[0]), examples[0]
    if form == "classes":
        raise DataError(
            f"{first.where}: a text alone; task.name = 'reranker' takes pairs: name the second text, data.pair"
        )
    if form == "pairs" and not any(example.negatives for example in examples):
        raise DataError(
            f"{first.where.rpartition(':')[0]}: pairs without negatives, so with nothing to tell apart: name their column, "
            "data.negative, or of scores, data.label; `lorakit mine` finds negatives"
        )
    loss, metric = section.loss or "bce", section.metric or SCORES[form][0]
    if form == "scores" and loss != "bce":
        raise ConfigError(
            f"task.loss = {loss!r} compares the texts of a query, but each example is one pair with a score"
        )
    if metric not in SCORES[form]:
        raise ConfigError(
            f"task.metric = {metric!r} is not a score of these data; these are: {', '.join(SCORES[form])}"
        )
    for example in examples:
        if isinstance(example.label, float) and not 0 <= example.label <= 1:
            raise DataError(
                f"{example.where}: the score {example.label:g} is not from 0 to 1, as task.name = 'reranker' learns it; "
                "divide all by the highest"
            )
    return section.model_copy(update={"loss": loss, "metric": metric})


@dataclass(frozen=True)
class Reranker(SequenceTask):
    """One score a pair of texts, from 0 to 1; an answer to an example has that of its second text and of each negative.

    Losses: `bce`, binary cross-entropy of each pair; `pairwise`, the mean of log(1 + exp(s_j - s_i)) over the texts i and j of
    a query of which i is better (RankNet, Burges et al. 2005); `listnet`, the cross-entropy between the softmax of labels and
    that of scores over the texts of a query (Cao et al. 2007).
    """

    info: ClassVar[TaskInfo] = TASKS["reranker"]
    loss: str = "bce"

    @classmethod
    def make(cls, section: TaskSection, tokenizer: Any, labels: tuple[str, ...], max_length: int) -> Reranker:
        return cls(tokenizer, labels, max_length, section.loss or "bce")

    def candidates(self, example: Example) -> list[Example]:
        """The pairs that are read: the query with its own text, and with each negative."""
        label = example.label if isinstance(example.label, float) else 1.0
        own = replace(example, label=label, negatives=())
        return [own, *(replace(own, label=0.0, pair=text) for text in example.negatives)]

    def target(self, example: Example) -> list[float]:
        assert isinstance(example.label, float)
        return [example.label]

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        pairs = [self.candidates(example) for example in examples]
        items = iter(super().encode([pair for own in pairs for pair in own]))
        return [[{**next(items)[0], "role": [min(2 * i, NEGATIVE)]} for i in range(len(own))] for own in pairs]

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        pairs = [pair for example in examples for pair in self.candidates(example)]
        return super().cut(pairs, [[item] for own in items for item in own])

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = super().collate(items)
        role, labels = torch.tensor([item["role"][0] for item in items]), batch["labels"][:, 0].float()
        batch |= {"role": role, "labels": labels}
        is_better = better(batch)
        batch["n_targets"] = {"listnet": role == ANCHOR, "pairwise": is_better.sum(1)}.get(
            self.loss, torch.ones_like(role)
        ).long()
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """That of a query's list stands in its first row, that of two texts in the better one's."""
        scores: Tensor = model(**inputs_of(batch)).logits.float()[:, 0]  # (B,)
        labels = batch["labels"]
        if self.loss == "bce":
            return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        if self.loss == "pairwise":
            return (F.softplus(scores - scores[:, None]) * better(batch)).sum(1)
        others = ~same_query(batch)
        shares = labels.expand_as(others).masked_fill(others, -torch.inf).softmax(1)
        logs = scores.expand_as(others).masked_fill(others, -torch.inf).log_softmax(1).masked_fill(others, 0)
        return -(shares * logs).sum(1) * (batch["role"] == ANCHOR)

    def predict(self, model: nn.Module, batch: Batch) -> list[float]:
        scores: list[float] = model(**inputs_of(batch)).logits.float()[:, 0].sigmoid().tolist()
        return scores

    def answer(self, example: Example, raws: Sequence[Any]) -> list[float]:
        return [super(Reranker, self).answer(example, [raw]) for raw in raws]

    def evaluate(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Evaluation:
        """Correlations with scores; or how early a query's own text comes among it and its negatives, the last of equal ones."""
        form = form_of(examples[0])
        statistics: dict[str, Statistic | Ranking] = {}
        if form == "scores":
            gold = [example.label for example in examples if isinstance(example.label, float)]
            every = number_statistics(gold, [answer[0] for answer in answers])
            statistics = {name: every[name] for name in SCORES[form]}
        else:
            ranks = [np.array([sum(score >= own for score in others) + 1.0]) for own, *others in answers]
            statistics |= retrieval_statistics(ranks, range(len(examples)), len(examples))
        return Evaluation(values(statistics), statistics)

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        return {**texts_of(example), "score": answer[0]}

    def expected(self, example: Example) -> Any:
        return 1.0 if example.label is None else example.label


def same_query(batch: Batch) -> Tensor:
    """Which rows are of one example. Shapes: (B, B)."""
    query = (batch["role"] == ANCHOR).cumsum(0)
    return query[:, None] == query


def better(batch: Batch) -> Tensor:
    """Whether the text of row i answers its query better than that of row j does. Shapes: (B, B)."""
    return same_query(batch) & (batch["labels"][:, None] > batch["labels"])
