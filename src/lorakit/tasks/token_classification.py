"""Named entities by a tag for each word: the first sub-word carries the label, words are scored, not sub-words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.data.tags import OUTSIDE, Entity, entities
from lorakit.errors import ModelError
from lorakit.recipe import TaskSection
from lorakit.tasks.base import IGNORE, Batch, Cut, Item, Scores, Statistic, Untuned, inputs_of, pad, pad_inputs
from lorakit.tasks.entity_scores import entity_scores, entity_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tagged:
    """A tag and its probability for each word of the example."""

    tags: tuple[str, ...]
    scores: tuple[float, ...]


def tag_names(types: Sequence[str]) -> tuple[str, ...]:
    """The tags of a set of entity types: O, then B- and I- of each."""
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


@dataclass(frozen=True)
class TokenClassification(Untuned):
    """Word-level tagging. Words that the length limit cuts off are answered O, and so count as missed."""

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]  # tags, O first
    max_length: int
    name: str = "token_classification"
    kind: str = "token_classification"
    metric: str = "entity_f1"

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        if not tokenizer.is_fast:
            raise ModelError(
                f"task.name = 'token_classification': {type(tokenizer).__name__} cannot tell which sub-word belongs to "
                "which word; use a base model with a fast tokenizer, or text2text_ner with a T5"
            )
        return cls(tokenizer, labels, max_length)

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        encoded = self.tokenizer(
            [list(example.words) for example in examples],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
        )
        return [
            [self._item(example, encoded["input_ids"][i], encoded.word_ids(i))] for i, example in enumerate(examples)
        ]

    def _item(self, example: Example, ids: list[int], word_ids: Sequence[int | None]) -> Item:
        """`first` has the position of each word's first sub-word, -1 for words without one (cut off, or no glyph)."""
        first = [-1] * len(example.words)
        for position, word in enumerate(word_ids):
            if word is not None and first[word] < 0:
                first[word] = position
        item = {"input_ids": ids, "first": first}
        if example.tags:
            numbers = {tag: i for i, tag in enumerate(self.labels)}
            labels = [IGNORE] * len(ids)
            for position, tag in zip(first, example.tags, strict=True):
                if position >= 0:
                    labels[position] = numbers[tag]
            item["labels"] = labels
        return item

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        read = [max((i for i, at in enumerate(item["first"], start=1) if at >= 0), default=0) for (item,) in items]
        return Cut(
            texts=sum(words < len(example.words) for words, example in zip(read, examples, strict=True)),
            entities=sum(e.end > words for words, x in zip(read, examples, strict=True) for e in entities(x.tags)),
        )

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = pad_inputs(items, self.tokenizer.pad_token_id)
        batch["first"] = pad([item["first"] for item in items], -1)
        if "labels" in items[0]:
            batch["labels"] = pad([item["labels"] for item in items], IGNORE)
        return batch

    def n_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits  # (B, T, C)
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
        )

    def predict(self, model: nn.Module, batch: Batch) -> list[list[tuple[int, float]]]:
        """For each row the (tag number, probability) of each word position; padding included."""
        best = model(**inputs_of(batch)).logits.float().softmax(-1).max(-1)  # (B, T)
        first = batch["first"]
        there = first >= 0
        tags = best.indices.gather(1, first.clamp_min(0)).where(there, 0).tolist()  # (B, W)
        scores = best.values.gather(1, first.clamp_min(0)).tolist()
        return [list(zip(*row, strict=True)) for row in zip(tags, scores, strict=True)]

    def answer(self, example: Example, raws: Sequence[list[tuple[int, float]]]) -> Tagged:
        kept = raws[0][: len(example.words)]
        return Tagged(tuple(self.labels[tag] for tag, _ in kept), tuple(score for _, score in kept))

    def score(self, examples: Sequence[Example], answers: Sequence[Tagged]) -> Scores:
        return entity_scores([example.tags for example in examples], [answer.tags for answer in answers])

    def statistics(self, examples: Sequence[Example], answers: Sequence[Tagged]) -> dict[str, Statistic]:
        return entity_statistics([example.tags for example in examples], [answer.tags for answer in answers])

    def to_json(self, example: Example, answer: Tagged) -> dict[str, Any]:
        found = entities(answer.tags)
        scores = [sum(answer.scores[e.start : e.end]) / (e.end - e.start) for e in found]
        return {"text": example.text, "entities": entity_dicts(example, found, scores)}

    def expected(self, example: Example) -> list[dict[str, Any]]:
        return entity_dicts(example, entities(example.tags))


def entity_dicts(example: Example, found: Sequence[Entity], scores: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Entities as transformers' pipelines give them; start and end are offsets into the example's text."""
    dicts: list[dict[str, Any]] = []
    for entity in found:
        start, end = example.offsets[entity.start][0], example.offsets[entity.end - 1][1]
        dicts.append({"entity_group": entity.type, "word": example.text[start:end], "start": start, "end": end})
    for entry, score in zip(dicts, scores, strict=False):
        entry["score"] = score
    return dicts
