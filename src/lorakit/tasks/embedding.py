"""A text to a vector, near those of the texts that belong to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.data.example import Example
from lorakit.errors import ConfigError, DataError, NumericsError
from lorakit.pooling import DOCUMENTS, QUERIES, Layout
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, Cut, Item, Task, count_longer, inputs_of, pad_inputs
from lorakit.tasks.metrics.bootstrap import Evaluation, Floats, Ranking, Statistic
from lorakit.tasks.metrics.labels import values
from lorakit.tasks.metrics.numbers import number_statistics
from lorakit.tasks.metrics.retrieval import ranks_of, retrieval_statistics
from lorakit.tasks.sequence import texts_of
from lorakit.tasks.similarity_losses import LOSSES, Related, has_another, matryoshka, supervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["pairs", "scores", "classes"]  # of the data
ANCHOR, POSITIVE, NEGATIVE = range(3)  # the role of a text in its example
DISTILLS = ("margin_mse", "kl")  # losses that learn a teacher's scores
FORMS: Mapping[str, Sequence[Form]] = {  # that a loss takes; others: scores
    "contrastive": ("pairs", "classes"),
    **dict.fromkeys(("triplet", *DISTILLS), ("pairs",)),
}
SCORES: Mapping[Form, Sequence[str]] = {
    "pairs": ("ndcg_at_10", "mrr_at_10", "recall_at_10", "map"),
    "classes": ("ndcg_at_10", "mrr_at_10", "recall_at_10", "map"),
    "scores": ("spearman", "pearson"),
}


def form_of(example: Example) -> Form:
    """Whether it is two texts that belong together, two with a score for how alike they are, or a text with its class."""
    if example.pair is None:
        return "classes"
    return "pairs" if example.label is None else "scores"


def correlations(examples: Sequence[Example], answers: Sequence[float]) -> dict[str, Statistic | Ranking]:
    """How well numbers put pairs with scores in the order of these."""
    gold = [example.label for example in examples if isinstance(example.label, float)]
    every = number_statistics(gold, answers)
    return {name: every[name] for name in SCORES["scores"]}


def complete(section: TaskSection, layout: Layout, examples: Sequence[Example]) -> TaskSection:
    """The section with what the base's layout and the training data say where it says nothing.

    Raises:
        ConfigError: its loss, its metric or its prompts do not fit the data.
        DataError: an example lacks what its loss takes.
    """
    form = form_of(examples[0])
    with_pairs = "margin_mse" if examples[0].teacher else "contrastive"
    loss = section.loss or ("cosent" if form == "scores" else with_pairs)
    metric = section.metric or SCORES[form][0]
    what = {"pairs": "pairs of texts", "scores": "pairs of texts with scores", "classes": "texts with their classes"}[
        form
    ]
    if form not in FORMS.get(loss, ("scores",)):
        raise ConfigError(f"task.loss = {loss!r} does not work with {what}, which is what the training data has")
    if metric not in SCORES[form]:
        raise ConfigError(f"task.metric = {metric!r} is not a score of {what}; choose from {', '.join(SCORES[form])}")
    for example in examples:
        if loss in ("triplet", *DISTILLS) and not example.negatives:
            raise DataError(f"{example.where}: no negative, which task.loss = {loss!r} needs; 'contrastive' needs none")
        if loss in DISTILLS and not example.teacher:
            raise DataError(
                f"{example.where}: no teacher's scores, which task.loss = {loss!r} needs: data.label, a list of the second "
                "text's and each negative's"
            )
        if loss == "cosine_mse" and isinstance(example.label, float) and abs(example.label) > 1:
            raise DataError(
                f"{example.where}: the score {example.label:g} is not a cosine, from -1 to 1, which task.loss = "
                "'cosine_mse' needs; 'cosent' takes any"
            )
        if isinstance(example.label, Mapping):
            raise DataError(f"{example.where}: a soft label; {section.name} needs one class for each text")

    def prompt(own: str | None, names: Sequence[str]) -> str:
        return next((layout.prompts[name] for name in names if name in layout.prompts), "") if own is None else own

    query, document = prompt(section.query_prompt, QUERIES), prompt(section.document_prompt, DOCUMENTS)
    if form != "pairs":
        if section.document_prompt not in (None, query):
            raise ConfigError(
                f"task.document_prompt = {document!r}: {what} have no queries and documents; use task.query_prompt, "
                f"{query!r}"
            )
        document = query
    normalize = layout.normalize if section.normalize is None else section.normalize
    given = {"loss": loss, "metric": metric, "normalize": normalize, "query_prompt": query, "document_prompt": document}
    return section.model_copy(update=given)


@dataclass(frozen=True)
class Embedding(Task):
    """Vectors of texts; an answer to an example has one for each of its texts. They are compared by cosine.

    Training looks at all texts of a batch together: an anchor's own positive against the positives and negatives of all, or
    texts with classes against each other. A batch of texts with classes is drawn in pairs of one class.
    """

    info = TASKS["embedding"]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    section: TaskSection

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        return cls(tokenizer, max_length, section)

    def inputs(self, example: Example) -> list[str]:
        """Its texts as the model reads them: the first one of a pair is a query."""
        query, document = self.section.query_prompt or "", self.section.document_prompt or ""
        if example.pair is None:
            return [(query if example.is_query else document) + example.text]
        return [query + example.text, *(document + text for text in (example.pair, *example.negatives))]

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        texts = [self.inputs(example) for example in examples]
        encoded = self._tokenized([text for own in texts for text in own], truncation=True, max_length=self.max_length)
        keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
        rows = iter([{key: encoded[key][i] for key in keys} for i in range(len(encoded["input_ids"]))])
        items: list[list[Item]] = []
        for example, own in zip(examples, texts, strict=True):
            items.append([])
            for place, text in enumerate((example.text, example.pair, *example.negatives)[: len(own)]):
                assert text is not None
                label = example.label if isinstance(example.label, float) else number_of(str(example.label))
                if example.teacher:  # the anchor has its positive's
                    label = example.teacher[max(place, POSITIVE) - POSITIVE]
                role = min(place, NEGATIVE)
                items[-1].append(next(rows) | {"role": [role], "text": [number_of(text)], "labels": [label]})
        return items

    def _tokenized(self, texts: Sequence[str], **options: Any) -> Any:
        return self.tokenizer(texts, return_attention_mask=False, **options)

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        texts = [text for example in examples for text in self.inputs(example)]

        def tokenize(positions: list[int]) -> list[list[int]]:
            ids: list[list[int]] = self._tokenized([texts[i] for i in positions], verbose=False)["input_ids"]
            return ids

        return Cut(texts=count_longer([item["input_ids"] for own in items for item in own], self.max_length, tokenize))

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = pad_inputs(items, self.tokenizer)
        role, labels = (torch.tensor([item[key][0] for item in items]) for key in ("role", "labels"))
        is_alone = not (role == POSITIVE).any()
        n_targets = (has_another(labels) if is_alone else role == ANCHOR).long()
        text = torch.tensor([item["text"][0] for item in items])
        return {**batch, "role": role, "text": text, "labels": labels, "n_targets": n_targets}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of an anchor stands in its row. Shapes: (B,) texts."""
        vectors: Tensor = model(**inputs_of(batch)).logits.float()  # (B, d)
        section, role, d = self.section, batch["role"], vectors.shape[1]
        if not (role == POSITIVE).any():
            classes = batch["labels"], section.temperature, batch["text"]
            return matryoshka(lambda n: supervised(vectors[:, :n], *classes), section.dims, d)
        rows = [(role == each).nonzero()[:, 0] for each in (ANCHOR, POSITIVE, NEGATIVE)]
        anchors, positives, negatives = (vectors[own] for own in rows)
        of = (role == ANCHOR).cumsum(0)[rows[NEGATIVE]] - 1
        keys = batch["text"][rows[0]], batch["text"][rows[1]], batch["text"][rows[2]]
        scores = batch["labels"][rows[POSITIVE]].float(), batch["labels"][rows[NEGATIVE]].float()
        related = Related(anchors, positives, negatives, of, scores, keys)
        loss = LOSSES[section.loss or "contrastive"]
        by_anchor = matryoshka(
            lambda n: loss(related.shortened(n), section.temperature, section.symmetric), section.dims, d
        )
        return vectors.new_zeros(len(role)).index_put((rows[ANCHOR],), by_anchor)

    def predict(self, model: nn.Module, batch: Batch) -> list[Any]:
        vectors = model(**inputs_of(batch)).logits.float()
        return list((F.normalize(vectors, dim=1) if self.section.normalize else vectors).cpu().numpy())

    def answer(self, example: Example, raws: Sequence[Any]) -> Any:
        """Shapes: (texts, d)."""
        vectors = np.stack(raws)
        if not np.isfinite(vectors).all():
            raise NumericsError(f"the model's output is not finite: {vectors[0]} for {example.text[:40]!r}")
        return vectors

    def evaluate(self, examples: Sequence[Example], answers: Sequence[Any]) -> Evaluation:
        """Correlations of cosines with scores; or a search, by each first text among all second texts and
        negatives, or by each text of a class among all others."""
        form = form_of(examples[0])
        statistics: Mapping[str, Statistic | Ranking] = (
            correlations(examples, [cosine(answer[0], answer[1]) for answer in answers])
            if form == "scores"
            else self._searched(form, examples, answers)
        )
        return Evaluation(values(statistics), statistics)

    def _searched(self, form: Form, examples: Sequence[Example], answers: Sequence[Any]) -> dict[str, Statistic]:
        """A query is all examples with an equal first text, and counts as the first of them."""
        places: dict[str, int] = {}  # of documents
        documents: list[Any] = []
        queries: dict[str, int] = {}  # the first example of each
        relevant: dict[str, list[int]] = {}
        for i, (example, vectors) in enumerate(zip(examples, answers, strict=True)):
            texts = [example.text] if form == "classes" else [str(example.pair), *example.negatives]
            for text, vector in zip(texts, vectors[-len(texts) :], strict=True):
                if places.setdefault(text, len(documents)) == len(documents):
                    documents.append(vector)
            queries.setdefault(example.text, i)
            key = str(example.label) if form == "classes" else example.text
            if places[texts[0]] not in (own := relevant.setdefault(key, [])):
                own.append(places[texts[0]])
        firsts, own = list(queries.values()), list[int]()
        if form == "classes":
            own = [places[text] for text in queries]
            of_class = [relevant[str(examples[i].label)] for i in firsts]
            targets = [[other for other in of if other != itself] for of, itself in zip(of_class, own, strict=True)]
        else:
            targets = [relevant[text] for text in queries]
        vectors = unit(np.stack([answers[i][0] for i in firsts])), unit(np.stack(documents))
        return retrieval_statistics(ranks_of(*vectors, targets, own or None), firsts, len(examples))

    def to_json(self, example: Example, answer: Any) -> dict[str, Any]:
        """The vector of a text, or the cosine of the two texts of a pair."""
        if example.pair is None:
            return {"text": example.text, "embedding": [float(str(number)) for number in answer[0]]}  # no more digits
        return {**texts_of(example), "score": cosine(answer[0], answer[1])}

    def expected(self, example: Example) -> Any:
        return 1.0 if example.label is None else example.label


def number_of(text: str) -> int:
    """A number of 31 bits for a text, which two texts share once in billions."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest()) >> 1


def unit(vectors: Floats) -> Floats:
    """Vectors of length 1; a zero one stays."""
    wide = vectors.astype(np.float64)
    ones: Floats = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
    return ones


def cut_vectors(vectors: Floats, dims: int | None, *, is_unit: bool) -> Floats:
    """The first dimensions of some vectors, of length 1 again where they were. Shapes: (n, d), to (n, dims).

    Raises:
        DataError: there are not so many.
    """
    if dims is None:
        return vectors
    if not 1 <= dims <= vectors.shape[1]:
        raise DataError(f"dims = {dims}: the vectors have {vectors.shape[1]} dimensions")
    short = vectors[:, :dims]
    return unit(short).astype(vectors.dtype) if is_unit else short


def cosine(a: Floats, b: Floats) -> float:
    """The cosine of two vectors."""
    return float(unit(a) @ unit(b))
