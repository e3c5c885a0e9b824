"""Scores of a search: how early, among all documents of a corpus by similarity, a query finds those that belong to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lorakit.tasks.metrics.bootstrap import Floats, Statistic

K = 10  # documents that are looked at, but for the mean average precision
AT_ONCE = 2**24  # similarities in memory


def ranks_of(
    queries: Floats, documents: Floats, relevant: Sequence[Sequence[int]], own: Sequence[int] | None = None
) -> list[Floats]:
    """For each query the ranks of its relevant documents (the first is 1), in order; of equal ones the first given is first.

    `own` is the document that is the query itself, which is not looked for. Vectors have length 1. Shapes: (Q, d), (N, d).
    """
    ranks: list[Floats] = []
    rows = max(1, AT_ONCE // len(documents))
    for start in range(0, len(queries), rows):
        similarities = queries[start : start + rows] @ documents.T
        for i, row in enumerate(similarities, start):
            if own is not None:
                row[own[i]] = -np.inf
            place = np.empty(len(row))
            place[np.argsort(-row, kind="stable")] = np.arange(1, len(row) + 1)
            ranks.append(np.sort(place[list(relevant[i])]))
    return ranks


def most_similar(queries: Floats, documents: Floats, most: int) -> Iterator[tuple[Sequence[int], Floats]]:
    """For each query the first `most` documents by cosine, the best first, and the cosines of all. Shapes: (Q, d), (N, d)."""
    queries, documents = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, documents))
    step = max(1, AT_ONCE // len(documents))
    for start in range(0, len(queries), step):
        for row in queries[start : start + step] @ documents.T:
            yield np.argsort(-row, kind="stable")[:most].tolist(), row


def retrieval_statistics(ranks: Sequence[Floats], examples: Sequence[int], n: int) -> dict[str, Statistic]:
    """Means over queries: NDCG and recall at 10, reciprocal rank at 10 and average precision; a query that nothing belongs to
    is left out.

    `examples` has the example, of n, that each query is of: a resample of examples is one of queries.
    """
    ideal = 1 / np.log2(np.arange(2, K + 2))

    def ndcg(own: Floats) -> float:
        return float((1 / np.log2(own[own <= K] + 1)).sum() / ideal[: len(own)].sum())

    scores = {
        "ndcg_at_10": ndcg,
        "mrr_at_10": lambda own: float(1 / own[0]) if own[0] <= K else 0.0,
        "recall_at_10": lambda own: float((own <= K).mean()),
        "map": lambda own: float((np.arange(1, len(own) + 1) / own).mean()),
    }
    statistics = {}
    for name, score in scores.items():
        counts = np.zeros((n, 2))
        for own, example in zip(ranks, examples, strict=True):
            if len(own):
                counts[example] += score(own), 1
        statistics[name] = Statistic(counts, _mean)
    return statistics


def _mean(sums: Floats) -> Floats:
    total, n = np.moveaxis(sums, -1, 0)
    mean: Floats = np.where(n > 0, total / np.where(n > 0, n, 1), np.nan)
    return mean
