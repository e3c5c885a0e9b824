"""Losses of related texts. The oracle: sentence-transformers' losses and gradients on random vectors, or a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as oracles
from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric
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
    """Different texts all of them: anchors, positives and, in further columns, negatives."""
    anchors, positives, *others = vectors
    negatives = torch.cat(others) if others else anchors.new_empty(0, anchors.shape[1])
    numbers = torch.arange(2 * B + len(negatives))
    keys = (numbers[:B], numbers[B : 2 * B], numbers[2 * B :])
    of = torch.arange(B).repeat(len(others))
    return Related(anchors, positives, negatives, of, torch.rand(B) if scores is None else scores, keys)


ORACLES: dict[str, tuple[Callable[[Any], Any], int, bool]] = {  # its maker, columns, and whether it is symmetric
    "contrastive": (lambda m: oracles.MultipleNegativesRankingLoss(m, scale=SCALE), 2, False),
    "contrastive with negatives": (lambda m: oracles.MultipleNegativesRankingLoss(m, scale=SCALE), 4, False),
    "contrastive symmetric": (lambda m: oracles.MultipleNegativesSymmetricRankingLoss(m, scale=SCALE), 3, True),
    "cosent": (lambda m: oracles.CoSENTLoss(m, scale=SCALE), 2, False),
    "angle": (lambda m: oracles.AnglELoss(m, scale=SCALE), 2, False),
    "cosine_mse": (lambda m: oracles.CosineSimilarityLoss(m), 2, False),
    "triplet": (lambda m: oracles.TripletLoss(m, TripletDistanceMetric.COSINE, TRIPLET_MARGIN), 3, False),
}


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


def test_texts_that_are_equal_are_no_negatives_of_each_other() -> None:
    """Rows 0 and 1 have the same anchor; the positive of row 2 is row 3's anchor; row 4's negative is row 5's positive."""
    anchors, positives, negatives = random_vectors(3)
    keys = (
        torch.tensor([0, 0, 2, 3, 4, 5]),
        torch.tensor([10, 11, 3, 13, 14, 15]),
        torch.tensor([20, 21, 22, 23, 15, 25]),
    )
    of = torch.arange(B)
    losses = contrastive(Related(anchors, positives, negatives, of, torch.rand(B), keys), TEMPERATURE, False)
    left_out = {0: {1}, 1: {0}, 2: set(), 3: {2}, 4: set(), 5: {B + 4}}
    candidates = [*positives.detach(), *negatives.detach()]
    for i, loss in enumerate(losses.tolist()):
        cosines = {
            j: float(F.cosine_similarity(anchors[i].detach(), candidate, dim=0)) / TEMPERATURE
            for j, candidate in enumerate(candidates)
            if j not in left_out[i]
        }
        assert loss == pytest.approx(math.log(sum(map(math.exp, cosines.values()))) - cosines[i], rel=1e-4, abs=1e-5)


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
