"""Losses of related texts. The oracle: sentence-transformers' losses and gradients on random vectors, or a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as oracles
from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor
from torch.nn import functional as F

from lorakit.lora.inits import named_generator
from lorakit.tasks.similarity_losses import (
    LOSSES,
    TRIPLET_MARGIN,
    Related,
    contrastive,
    has_another,
    matryoshka,
    supervised,
    triplet,
)

B, D, TEMPERATURE = 6, 8, 0.05
SCALE = 1 / TEMPERATURE


class Body(torch.nn.Module):
    """Stands where the oracles expect a model; they are asked for losses of given vectors."""

    def get_embedding_dimension(self) -> int:
        return D


def random_vectors(n: int, d: int = D) -> list[Tensor]:
    generator = named_generator(0, f"vectors {n} {d}")
    return [torch.randn(B, d, generator=generator, requires_grad=True) for _ in range(n)]


def related(vectors: list[Tensor], scores: Tensor | None = None) -> Related:
    """Different texts all of them: anchors, positives and, in further columns, negatives; a column of scores for each."""
    anchors, positives, *others = vectors
    negatives = torch.cat(others) if others else anchors.new_empty(0, anchors.shape[1])
    numbers = torch.arange(2 * B + len(negatives))
    keys = (numbers[:B], numbers[B : 2 * B], numbers[2 * B :])
    of = torch.arange(B).repeat(len(others))
    if scores is None:
        scores = torch.rand(B)
    of_positive, *of_negatives = scores.T if scores.dim() == 2 else (scores, *others)
    of_negative = torch.cat([*of_negatives, scores.new_empty(0)])
    return Related(anchors, positives, negatives, of, (of_positive, of_negative), keys)


ORACLES: dict[str, tuple[Callable[[Any], Any], int, bool]] = {  # its maker, columns, and whether it is symmetric
    "contrastive": (lambda m: oracles.MultipleNegativesRankingLoss(m, scale=SCALE), 2, False),
    "contrastive with negatives": (lambda m: oracles.MultipleNegativesRankingLoss(m, scale=SCALE), 4, False),
    "contrastive symmetric": (lambda m: oracles.MultipleNegativesSymmetricRankingLoss(m, scale=SCALE), 3, True),
    "cosent": (lambda m: oracles.CoSENTLoss(m, scale=SCALE), 2, False),
    "angle": (lambda m: oracles.AnglELoss(m, scale=SCALE), 2, False),
    "cosine_mse": (lambda m: oracles.CosineSimilarityLoss(m), 2, False),
    "triplet": (lambda m: oracles.TripletLoss(m, TripletDistanceMetric.COSINE, TRIPLET_MARGIN), 3, False),
}


def divided_cosine(a: Tensor, b: Tensor) -> Tensor:
    """What the oracles of distillation compare with the teacher's scores."""
    return pairwise_cos_sim(a, b) * SCALE


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("name", ["margin_mse", "kl"])
def test_distillation_and_its_gradient_are_those_of_sentence_transformers(name: str, negatives: int) -> None:
    vectors = random_vectors(2 + negatives)
    teacher = 5 * torch.randn(B, 1 + negatives, generator=named_generator(0, "teacher"))
    oracle = {"margin_mse": oracles.MarginMSELoss, "kl": oracles.DistillKLDivLoss}[name]
    expected = oracle(Body(), similarity_fct=divided_cosine).compute_loss_from_embeddings(vectors, teacher)
    loss = LOSSES[name](related(vectors, teacher), TEMPERATURE, False).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    mine, theirs = (torch.autograd.grad(value, vectors) for value in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_distillation_of_an_anchor_does_not_depend_on_what_else_is_in_the_batch() -> None:
    """Anchors with 1, 2 and 0 negatives, together and each alone."""
    anchors, positives, negatives = (v[:3].detach() for v in random_vectors(3))
    of, keys = torch.tensor([0, 1, 1]), (torch.arange(3),) * 3
    scores = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([-1.0, 3.0, 0.0])
    for name in ("margin_mse", "kl"):
        together = LOSSES[name](Related(anchors, positives, negatives, of, scores, keys), TEMPERATURE, False)
        for i in range(3):
            own, one = of == i, slice(i, i + 1)
            alone = Related(
                anchors[one], positives[one], negatives[own], of[own] - i, (scores[0][one], scores[1][own]), keys
            )
            torch.testing.assert_close(LOSSES[name](alone, TEMPERATURE, False), together[one])
        assert together[2] == 0


@pytest.mark.parametrize("d", [D, D - 1])
@pytest.mark.parametrize("name", ORACLES)
def test_loss_and_gradient_are_those_of_sentence_transformers(name: str, d: int) -> None:
    make, columns, symmetric = ORACLES[name]
    vectors = random_vectors(columns, d)
    scores = torch.tensor([0.2, 0.9, 0.5, 0.5, 0.0, 1.0])
    expected = make(Body()).compute_loss_from_embeddings(vectors, scores)
    theirs = torch.autograd.grad(expected, vectors)
    loss = LOSSES[name.partition(" ")[0]](related(vectors, scores), TEMPERATURE, symmetric).mean()
    mine = torch.autograd.grad(loss, vectors)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_supervised_loss_equals_the_formula_and_its_gradient_is_finite() -> None:
    vectors = torch.randn(7, 5, generator=named_generator(0, "states"), requires_grad=True)
    labels = [0, 0, 0, 1, 1, 2, 0]
    unit = [vector / vector.norm() for vector in vectors.detach().double()]
    each = []
    for i, a in enumerate(unit):
        cosines = {j: math.exp(float(a @ b) / 0.1) for j, b in enumerate(unit) if j != i}
        of_label = [value for j, value in cosines.items() if labels[j] == labels[i]]
        logs = [math.log(value / sum(cosines.values())) for value in of_label]
        each.append(-sum(logs) / len(logs) if logs else 0.0)
    losses = supervised(vectors, torch.tensor(labels), 0.1)
    assert losses.tolist() == pytest.approx(each, rel=1e-5)
    assert has_another(torch.tensor(labels)).tolist() == [True] * 5 + [False, True]
    losses.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
    assert not supervised(vectors, torch.arange(7), 0.1).any()


# Texts of anchors, positives and negatives. Rows 0 and 1 have the same anchor, 1 and 2 the same positive; row 3's positive is row
# 4's anchor; row 0's negative is its anchor's other positive, row 4's is row 5's positive, and row 5's is row 2's anchor.
TEXTS = ("aabcde", "xyyduw", "ypqrwb")


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_loss_has_a_negative_that_belongs_to_its_anchor(symmetric: bool) -> None:
    """Against the formula over those candidates alone that neither are the anchor's text nor stand beside it in any pair."""
    vectors = [each.detach() for each in random_vectors(3)]
    keys = torch.tensor([[ord(text) for text in of] for of in TEXTS])
    none = torch.zeros(B), torch.zeros(B)
    losses = contrastive(Related(*vectors, torch.arange(B), none, tuple(keys)), TEMPERATURE, symmetric)
    anchors, positives, negatives = TEXTS
    belongs = {(a, p) for a, p in zip(anchors, positives, strict=True)} | {(text, text) for text in anchors}
    cosines = F.cosine_similarity(vectors[0][:, None], torch.cat(vectors[1:]), dim=2) / TEMPERATURE
    n_left_out = 0
    for i, loss in enumerate(losses.tolist()):
        row = [j for j, text in enumerate(positives + negatives) if j == i or (anchors[i], text) not in belongs]
        column = [j for j, text in enumerate(anchors) if j == i or (text, positives[i]) not in belongs]
        n_left_out += 2 * B - len(row)
        there = float(cosines[i, row].logsumexp(0) - cosines[i, i])
        back = float(cosines[column, i].logsumexp(0) - cosines[i, i])
        assert loss == pytest.approx((there + back) / 2 if symmetric else there, rel=1e-4, abs=1e-5)
    assert n_left_out == 3 + 3 + 3 + 0 + 1 + 1


def test_a_text_of_two_classes_is_no_negative_of_itself() -> None:
    """Row 3 is row 0's text in another class: the loss of both is that without the other."""
    vectors = torch.randn(5, D, generator=named_generator(0, "classes"))
    labels, texts = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([7, 8, 9, 7, 6])
    losses = supervised(vectors, labels, TEMPERATURE, texts)
    for own, other in ((0, 3), (3, 0)):
        rest = [i for i in range(5) if i != other]
        alone = supervised(vectors[rest], labels[rest], TEMPERATURE)[rest.index(own)]
        torch.testing.assert_close(losses[own], alone)
    torch.testing.assert_close(losses[2], supervised(vectors, labels, TEMPERATURE)[2])


def test_triplet_takes_the_mean_over_an_anchors_negatives_and_zero_without() -> None:
    vectors = random_vectors(3)
    whole = related(vectors)
    one = triplet(whole, TEMPERATURE, False)
    twice = whole._replace(negatives=torch.cat([whole.negatives[1:]] * 2), of=torch.cat([whole.of[1:]] * 2))
    torch.testing.assert_close(triplet(twice, TEMPERATURE, False), torch.cat([torch.zeros(1), one[1:]]))


def test_matryoshka_is_the_sum_over_the_first_dimensions() -> None:
    vectors = random_vectors(2)
    whole = related(vectors)
    found = matryoshka(lambda d: contrastive(whole.shortened(d), TEMPERATURE, False), (4, 2), D)
    loss = ORACLES["contrastive"][0](Body())
    expected = sum(loss.compute_loss_from_embeddings([v[:, :d] for v in vectors], torch.rand(B)) for d in (8, 4, 2))
    torch.testing.assert_close(found.mean(), expected, rtol=1e-5, atol=1e-6)
