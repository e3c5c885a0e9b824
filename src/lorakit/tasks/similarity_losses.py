"""Losses that draw related texts together, each a function of their vectors; all compare by cosine.

The loss of a batch is the mean of what a function gives, over its anchors (or over the rows that have another of their class).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TRIPLET_MARGIN = 0.5  # of cosines


class Related(NamedTuple):
    """The vectors of a batch: row i of `anchors` belongs to row i of `positives`, and row j of `negatives` to anchor `of[j]`.

    Shapes: anchors and positives (B, d), negatives (N, d), of (N,), scores (B,) and (N,), keys (B,), (B,) and (N,).
    """

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    of: Tensor
    scores: tuple[Tensor, Tensor]  # how alike an anchor is to its positive and its negatives, where the data say so
    keys: tuple[Tensor, Tensor, Tensor]  # equal where texts are equal: of anchors, positives and negatives

    def shortened(self, d: int) -> Related:
        """The same with the first d dimensions."""
        return self._replace(
            anchors=self.anchors[:, :d], positives=self.positives[:, :d], negatives=self.negatives[:, :d]
        )


Loss = Callable[[Related, float, bool], Tensor]  # of related texts, a temperature, and whether it is symmetric, to (B,)


def contrastive(related: Related, temperature: float, symmetric: bool) -> Tensor:
    """InfoNCE with in-batch negatives (van den Oord et al. 2018, arXiv:1807.03748): -log of the softmax, at an anchor's own
    positive, over the cosines with all positives and negatives of the batch, divided by the temperature.

    A candidate that is the same text as the anchor, as its positive, or as a positive of an equal anchor, is no negative: it is
    left out. `symmetric` takes the mean with the same from each positive to all anchors.
    """
    anchors, candidates = related.anchors, torch.cat([related.positives, related.negatives])
    of_anchor, of_positive, of_negative = related.keys
    keys, itself = (
        torch.cat([of_positive, of_negative]),
        torch.eye(len(anchors), dtype=torch.bool, device=anchors.device),
    )
    equal = of_anchor[:, None] == of_anchor
    known = (equal.float() @ (of_positive[:, None] == keys).float()) > 0  # a positive of an equal anchor
    false = known | (of_anchor[:, None] == keys)
    own = F.pad(itself, (0, len(keys) - len(anchors)))
    logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    logits = logits.masked_fill(false & ~own, float("-inf"))  # (B, B + N)
    losses = -logits.log_softmax(1).diagonal()
    if not symmetric:
        return losses
    backwards = logits[:, : len(anchors)].T.log_softmax(1).diagonal()
    return (losses - backwards) / 2


def supervised(vectors: Tensor, labels: Tensor, temperature: float, texts: Tensor | None = None) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, eq. 2) over cosines divided by the temperature.

    For each row the mean, over the others of its label, of -log of the softmax over all other rows; 0 for a row that is the
    only one of its label. With `texts`, equal where texts are, one that stands under another label too is left out.
    Shapes: vectors (B, d), labels and texts (B,), to (B,).
    """
    vectors = F.normalize(vectors, dim=1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    alike = (labels[:, None] == labels) & ~itself
    false = itself if texts is None else (texts[:, None] == texts) & ~alike
    logits = (vectors @ vectors.T / temperature).masked_fill(false, float("-inf"))
    return -logits.log_softmax(1).masked_fill(~alike, 0).sum(1) / alike.sum(1).clamp_min(1)


def has_another(labels: Tensor) -> Tensor:
    """Whether another row has the same label. Shapes: (B,), to (B,) of true and false."""
    return (labels[:, None] == labels).sum(1) > 1


def cosent(related: Related, temperature: float, symmetric: bool) -> Tensor:
    """CoSENT (Huang et al. 2024, doi:10.1109/TASLP.2024.3402087): log(1 + sum of exp((s_k - s_i) / temperature)) over the pairs
    of pairs of which i has the higher score; s are cosines. One number a batch, in each of its rows."""
    return _in_order(F.cosine_similarity(related.anchors, related.positives), related.scores[0], temperature)


def angle(related: Related, temperature: float, symmetric: bool) -> Tensor:
    """AnglE (Li and Li 2024, arXiv:2309.12871, eq. 9) in the form of sentence-transformers: CoSENT over |cos + sin| of the angle
    between the vectors, read as complex numbers whose imaginary parts are their second halves."""
    pad = (0, related.anchors.shape[1] % 2)
    x, y = (F.normalize(F.pad(vectors, pad), dim=1) for vectors in (related.anchors, related.positives))
    (real_x, imaginary_x), (real_y, imaginary_y) = x.chunk(2, dim=1), y.chunk(2, dim=1)
    sines = (imaginary_x * real_y - real_x * imaginary_y).sum(1)
    return _in_order(((x * y).sum(1) + sines).abs(), related.scores[0], temperature)


def _in_order(similarities: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Shapes: (B,), (B,), to (B,)."""
    logits = (similarities[:, None] - similarities) / temperature  # (B, B): k less i
    logits = logits[scores[:, None] < scores]
    return torch.cat([logits.new_zeros(1), logits]).logsumexp(0).expand(len(scores))


def cosine_mse(related: Related, temperature: float, symmetric: bool) -> Tensor:
    """The squared difference between cosine and score."""
    return (F.cosine_similarity(related.anchors, related.positives) - related.scores[0]).square()


def triplet(related: Related, temperature: float, symmetric: bool) -> Tensor:
    """max(0, margin - cos(anchor, positive) + cos(anchor, negative)) (Schroff et al. 2015, arXiv:1503.03832, eq. 1), by cosines;
    the mean over an anchor's negatives."""
    return _by_anchor(F.relu(TRIPLET_MARGIN - _margins(related)), related)


def margin_mse(related: Related, temperature: float, symmetric: bool) -> Tensor:
    """The squared difference between the margin by which an anchor is nearer to its positive than to a negative, in cosines
    divided by the temperature, and a teacher's margin (Hofstätter et al. 2020, arXiv:2010.02666); the mean over its negatives."""
    of_positive, of_negative = related.scores
    teacher = of_positive[related.of] - of_negative
    return _by_anchor((_margins(related) / temperature - teacher).square(), related)


def kl(related: Related, temperature: float, symmetric: bool) -> Tensor:
    """KL divergence (Hinton et al. 2015, arXiv:1503.02531) between the softmax of a teacher's scores of an anchor's own positive
    and negatives and that of their cosines, divided by the temperature. Not multiplied by its square: the teacher's is 1."""
    anchors, candidates = related.anchors, torch.cat([related.positives, related.negatives])
    numbers = torch.arange(len(anchors), device=anchors.device)
    others = numbers[:, None] != torch.cat([numbers, related.of])  # (B, B + N)
    logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    student = logits.masked_fill(others, float("-inf")).log_softmax(1).masked_fill(others, 0)
    teacher = torch.cat(related.scores).expand_as(others).masked_fill(others, float("-inf")).softmax(1)
    return (torch.xlogy(teacher, teacher) - teacher * student).sum(1)


def _margins(related: Related) -> Tensor:
    """By how much the cosine of a negative's anchor with its positive is above that with the negative. Shapes: (N,)."""
    of = related.of
    towards = F.cosine_similarity(related.anchors, related.positives)[of]
    return towards - F.cosine_similarity(related.anchors[of], related.negatives)


def _by_anchor(losses: Tensor, related: Related) -> Tensor:
    """The mean over the negatives of each anchor; 0 without. Shapes: (N,), to (B,)."""
    sums = losses.new_zeros(len(related.anchors)).index_add(0, related.of, losses)
    return sums / related.of.bincount(minlength=len(sums)).clamp_min(1)


LOSSES: Mapping[str, Loss] = {
    "contrastive": contrastive,
    "cosent": cosent,
    "angle": angle,
    "cosine_mse": cosine_mse,
    "triplet": triplet,
    "margin_mse": margin_mse,
    "kl": kl,
}


def matryoshka(loss: Callable[[int], Tensor], dims: Sequence[int], d: int) -> Tensor:
    """The sum of a loss over vectors cut to their first dimensions: d of them, and each of `dims` (Kusupati et al. 2022,
    arXiv:2205.13147)."""
    return torch.stack([loss(each) for each in dict.fromkeys((d, *dims))]).sum(0)
