"""How well a text answers a query, both read together: a cross-encoder with one score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

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
from lorakit.tasks.embedding import ANCHOR, NEGATIVE, SCORES, correlations, form_of
from lorakit.tasks.metrics.bootstrap import Evaluation, Ranking, Statistic
from lorakit.tasks.metrics.labels import values
from lorakit.tasks.metrics.retrieval import retrieval_statistics
from lorakit.tasks.sequence import SequenceTask, texts_of

LAMBDA_MU = 10.0  # share of NDCG-Loss2 in the weights of LambdaLoss, beside LambdaRank's


class Lists(NamedTuple):
    """The texts of some queries, the own one of each query first. Shapes: (B,)."""

    labels: Tensor
    query: Tensor  # its number

    @property
    def together(self) -> Tensor:
        """Whether the texts i and j are of one query. Shapes: (B, B)."""
        return self.query[:, None] == self.query

    @property
    def better(self) -> Tensor:
        """Whether text i answers the query of both better than text j does. Shapes: (B, B)."""
        return self.together & (self.labels[:, None] > self.labels)

    @property
    def first(self) -> Tensor:
        """The place of the own text of each text's query. Shapes: (B,)."""
        return torch.searchsorted(self.query, self.query)

    @property
    def is_own(self) -> Tensor:
        """Whether a text is the own one of its query. Shapes: (B,)."""
        return self.first == torch.arange(len(self.query), device=self.query.device)

    def ranks(self, values: Tensor) -> Tensor:
        """The place of each text, from 1, when its query's are sorted by a value, the highest first. Shapes: (B,), to (B,)."""
        numbers = torch.arange(len(values), device=values.device)
        before = (values > values[:, None]) | ((values == values[:, None]) & (numbers < numbers[:, None]))
        return 1 + (self.together & before).sum(1)


def bce(scores: Tensor, lists: Lists) -> Tensor:
    """Binary cross-entropy of each text."""
    return F.binary_cross_entropy_with_logits(scores, lists.labels, reduction="none")


def pairwise(scores: Tensor, lists: Lists) -> Tensor:
    """RankNet (Burges et al. 2005, doi:10.1145/1102351.1102363): log(1 + exp(s_j - s_i)) over the texts i and j of a query of
    which i is better."""
    return (F.softplus(scores - scores[:, None]) * lists.better).sum(1)


def listnet(scores: Tensor, lists: Lists) -> Tensor:
    """ListNet (Cao et al. 2007, doi:10.1145/1273496.1273513): the cross-entropy between the softmax of labels and that of scores
    over the texts of a query."""
    others = ~lists.together
    shares = lists.labels.expand_as(others).masked_fill(others, -torch.inf).softmax(1)
    logs = scores.expand_as(others).masked_fill(others, -torch.inf).log_softmax(1).masked_fill(others, 0)
    return -(shares * logs).sum(1) * lists.is_own


def lambda_loss(scores: Tensor, lists: Lists) -> Tensor:
    """LambdaLoss (Wang et al. 2018, doi:10.1145/3269206.3271784) with the weights of NDCG-Loss2++: log2(1 + exp(s_j - s_i)) over
    the texts of which i is better, times a bound of what NDCG loses if they change places. Labels below 0 gain nothing."""
    gains = 2 ** lists.labels.clamp_min(0) - 1
    best = gains / (1 + lists.ranks(lists.labels)).log2()
    best = (best * lists.together).sum(1).clamp_min(1e-10)  # (B,): the DCG of its query's best order
    ranks = lists.ranks(scores)
    apart = (ranks[:, None] - ranks).abs().clamp_min(1)
    discounts = 1 / (1 + ranks).log2()
    weights = LAMBDA_MU * (1 / (1 + apart).log2() - 1 / (2 + apart).log2()) + (discounts[:, None] - discounts).abs()
    weights = weights * ((gains[:, None] - gains).abs() / best[:, None])
    return (weights * F.softplus(scores - scores[:, None]) * lists.better).sum(1) / math.log(2)


def margin_mse(scores: Tensor, lists: Lists) -> Tensor:
    """The squared difference between the margin of a query's own text over each other one and the margin of their labels, a
    teacher's scores (Hofstätter et al. 2020, arXiv:2010.02666)."""
    first = lists.first
    return (scores[first] - scores - lists.labels[first] + lists.labels).square()


class Loss(NamedTuple):
    """A loss, and how many terms it has in each row. Shapes: both (B,)."""

    of: Callable[[Tensor, Lists], Tensor]  # of scores
    targets: Callable[[Lists], Tensor]


LOSSES: Mapping[str, Loss] = {
    "bce": Loss(bce, lambda lists: torch.ones_like(lists.query)),
    "pairwise": Loss(pairwise, lambda lists: lists.better.sum(1)),
    "listnet": Loss(listnet, lambda lists: lists.is_own),
    "lambda": Loss(lambda_loss, lambda lists: lists.better.sum(1)),
    "margin_mse": Loss(margin_mse, lambda lists: ~lists.is_own),
}


def complete(section: TaskSection, layout: Layout, examples: Sequence[Example]) -> TaskSection:
    """The section with the loss and the metric that fit the training data, where it says nothing.

    Raises:
        ConfigError: its loss or its metric does not fit the data.
        DataError: there are no negatives, or a score is not a share.
    """
    form, first = form_of(examples[0]), examples[0]
    if form == "classes":
        raise DataError(
            f"{first.where}: a single text; task.name = 'reranker' needs pairs; set the second text, data.pair"
        )
    if form == "pairs" and not any(example.negatives for example in examples):
        raise DataError(
            f"{first.where.rpartition(':')[0]}: pairs without negatives, so there is nothing to compare; set their "
            "column, data.negative, or that of scores, data.label; `lorakit mine` finds negatives"
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
        scores = [example.label] if isinstance(example.label, float) else example.teacher
        if loss == "bce" and any(not 0 <= (wrong := score) <= 1 for score in scores):
            raise DataError(
                f"{example.where}: the score {wrong:g} is not from 0 to 1, as task.loss = 'bce' learns it; "
                + ("'margin_mse' takes any" if example.teacher else "divide all by the highest")
            )
        if loss == "margin_mse" and not example.teacher:
            raise DataError(
                f"{example.where}: no teacher's scores, which task.loss = 'margin_mse' needs: data.label, a list of the second "
                "text's and each negative's"
            )
    return section.model_copy(update={"loss": loss, "metric": metric})


@dataclass(frozen=True)
class Reranker(SequenceTask):
    """One score a pair of texts, from 0 to 1; an answer to an example has that of its second text and of each negative.

    A text's label is 1 if it belongs to the query and 0 if it is a negative, or a teacher's score.
    """

    info: ClassVar[TaskInfo] = TASKS["reranker"]
    loss: str = "bce"

    @classmethod
    def make(cls, section: TaskSection, tokenizer: Any, labels: tuple[str, ...], max_length: int) -> Reranker:
        return cls(tokenizer, labels, max_length, section.loss or "bce")

    def candidates(self, example: Example) -> list[Example]:
        """The pairs that are read: the query with its own text, and with each negative."""
        label = example.label if isinstance(example.label, float) else 1.0
        labels = example.teacher or (label, *(0.0 for _ in example.negatives))
        own = replace(example, negatives=(), teacher=())
        texts = zip((example.pair, *example.negatives), labels, strict=True)
        return [replace(own, label=label, pair=text) for text, label in texts]

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
        lists = Lists(labels, (role == ANCHOR).cumsum(0))
        return batch | {"role": role, "labels": labels, "n_targets": LOSSES[self.loss].targets(lists).long()}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """That of a query's list stands in its first row, that of two texts in the better one's."""
        scores: Tensor = model(**inputs_of(batch)).logits.float()[:, 0]  # (B,)
        return LOSSES[self.loss].of(scores, Lists(batch["labels"], (batch["role"] == ANCHOR).cumsum(0)))

    def predict(self, model: nn.Module, batch: Batch) -> list[float]:
        scores: list[float] = model(**inputs_of(batch)).logits.float()[:, 0].sigmoid().tolist()
        return scores

    def answer(self, example: Example, raws: Sequence[Any]) -> list[float]:
        return [super(Reranker, self).answer(example, [raw]) for raw in raws]

    def evaluate(self, examples: Sequence[Example], answers: Sequence[list[float]]) -> Evaluation:
        """Correlations with scores; or how early a query's own text comes among it and its negatives, the last of
        equal ones."""
        statistics: Mapping[str, Statistic | Ranking]
        if form_of(examples[0]) == "scores":
            statistics = correlations(examples, [answer[0] for answer in answers])
        else:
            ranks = [np.array([sum(score >= own for score in others) + 1.0]) for own, *others in answers]
            statistics = retrieval_statistics(ranks, range(len(examples)), len(examples))
        return Evaluation(values(statistics), statistics)

    def to_json(self, example: Example, answer: list[float]) -> dict[str, Any]:
        return {**texts_of(example), "score": answer[0]}

    def expected(self, example: Example) -> Any:
        return 1.0 if example.label is None else example.label
