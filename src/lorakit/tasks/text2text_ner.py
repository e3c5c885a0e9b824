"""Named entities written out by a T5: `ner: Peter Blackburn visits EU .` -> `Peter Blackburn: PER | EU: ORG`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.data.tags import entities, to_tags
from lorakit.recipe import TaskSection
from lorakit.tasks.base import (
    IGNORE,
    Batch,
    Cut,
    Item,
    Scores,
    Statistic,
    Untuned,
    count_longer,
    inputs_of,
    pad,
    pad_inputs,
)
from lorakit.tasks.constrained import Constraint, Language
from lorakit.tasks.entity_list import Aligned, Parsed, align, parse, write
from lorakit.tasks.entity_scores import entity_scores, entity_statistics, prf
from lorakit.tasks.token_classification import entity_dicts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Generated(NamedTuple):
    """One output of the decoder: its text, whether it ended by itself, and its mean probability a token."""

    text: str
    ended: bool
    score: float


@dataclass(frozen=True)
class Extracted:
    """An output and what was made of it."""

    generated: Generated
    parsed: Parsed
    aligned: Aligned


class _Confidence:
    """A logits processor that changes nothing and keeps the log-probability of the greedy choice at each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().log_softmax(-1).amax(-1))  # (B,)
        return scores


@dataclass(frozen=True)
class Text2TextNer(Untuned):
    """NER as generation. The labels are entity types; entities are found again in the words, left to right."""

    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_length: int
    prefix: str = "ner: "
    max_target_length: int = 128
    constrained: bool = False
    name: str = "text2text_ner"
    kind: str = "text2text"
    metric: str = "entity_f1"
    metrics: tuple[str, ...] = ("entity_f1", "entity_f1_strict")

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        return cls(tokenizer, labels, max_length, section.prefix, section.max_target_length, section.constrained)

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        inputs = [self._input(example) for example in examples]
        ids = self.tokenizer(inputs, truncation=True, max_length=self.max_length)["input_ids"]
        targets = [self.expected(example) for example in examples]
        labels = self.tokenizer(text_target=targets, truncation=True, max_length=self.max_target_length)["input_ids"]
        items: list[Item] = [{"input_ids": i, "labels": t} for i, t in zip(ids, labels, strict=True)]
        if self.constrained:  # the words go along as code points, since a batch is made of numbers
            items = [{**i, "source": [ord(c) for c in " ".join(e.words)]} for i, e in zip(items, examples, strict=True)]
        return [[item] for item in items]

    def _input(self, example: Example) -> str:
        return self.prefix + " ".join(example.words)

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        def inputs(positions: list[int]) -> list[list[int]]:
            ids: list[list[int]] = self.tokenizer([self._input(examples[i]) for i in positions])["input_ids"]
            return ids

        def targets(positions: list[int]) -> list[list[int]]:
            texts = [self.expected(examples[i]) for i in positions]
            ids: list[list[int]] = self.tokenizer(text_target=texts)["input_ids"]
            return ids

        return Cut(
            texts=count_longer([item["input_ids"] for (item,) in items], self.max_length, inputs),
            targets=count_longer([item["labels"] for (item,) in items], self.max_target_length, targets),
        )

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = pad_inputs(items, self.tokenizer.pad_token_id)
        batch["labels"] = pad([item["labels"] for item in items], IGNORE)
        if self.constrained:
            batch["source"] = pad([item["source"] for item in items], 0)
        return batch

    def n_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        decoder_input = model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
        logits = model(**inputs_of(batch), decoder_input_ids=decoder_input).logits  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def predict(self, model: nn.Module, batch: Batch) -> list[Generated]:
        confidence = _Confidence()
        constraint = [Constraint([self._language(row) for row in batch["source"].tolist()])] if self.constrained else []
        sequences: Tensor = model.generate(  # type: ignore[operator]
            **inputs_of(batch),
            max_new_tokens=self.max_target_length,
            do_sample=False,
            num_beams=1,
            logits_processor=[*constraint, confidence],
        )
        output = sequences[:, 1:]  # (B, T) without the start token
        log_p = torch.stack(confidence.steps, 1)  # (B, T)
        ended = output == self.tokenizer.eos_token_id
        kept = (ended.cumsum(1) - ended.long()) == 0  # up to and with the first end token
        means = (log_p * kept).sum(1) / kept.sum(1)
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        rows = zip(texts, ended.any(1).tolist(), means.exp().tolist(), strict=True)
        return [Generated(*row) for row in rows]

    def _language(self, source: list[int]) -> Language:
        words = "".join(map(chr, source)).rstrip("\0").split(" ")
        return Language(self.tokenizer, self.labels, words)

    def answer(self, example: Example, raws: Sequence[Generated]) -> Extracted:
        (raw,) = raws
        parsed = parse(raw.text, self.labels)
        return Extracted(raw, parsed, align(parsed.mentions, example.words))

    def score(self, examples: Sequence[Example], answers: Sequence[Extracted]) -> Scores:
        gold, tags = _tags(examples, answers)
        mentions = sum(len(answer.parsed.mentions) for answer in answers)
        return {
            **entity_scores(gold, tags),
            "surface_f1": _surface_f1(examples, answers),  # words and type alone, a diagnostic
            "malformed": _share(answer.parsed.malformed + answer.parsed.unknown_type > 0 for answer in answers),
            "unknown_type": _share(answer.parsed.unknown_type > 0 for answer in answers),
            "truncated": _share(not answer.generated.ended for answer in answers),
            "invented": sum(answer.aligned.invented for answer in answers) / max(1, mentions),
        }

    def statistics(self, examples: Sequence[Example], answers: Sequence[Extracted]) -> dict[str, Statistic]:
        return entity_statistics(*_tags(examples, answers))

    def to_json(self, example: Example, answer: Extracted) -> dict[str, Any]:
        found = answer.aligned.entities
        return {
            "text": example.text,
            "entities": entity_dicts(example, found, [answer.generated.score] * len(found)),
            "generated": answer.generated.text,
        }

    def expected(self, example: Example) -> str:
        return write(example.words, entities(example.tags))


def _tags(examples: Sequence[Example], answers: Sequence[Extracted]) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """Gold and answered IOB2 tags."""
    found = [to_tags(a.aligned.entities, len(e.words)) for e, a in zip(examples, answers, strict=True)]
    return [example.tags for example in examples], list(found)


def _share(claims: Iterable[bool]) -> float:
    values = list(claims)
    return sum(values) / max(1, len(values))


def _surface_f1(examples: Sequence[Example], answers: Sequence[Extracted]) -> float:
    """F1 over (sentence, surface, type) with duplicates counted, as most T5 tutorials score; blind to the place."""
    right = found = wanted = 0
    for example, answer in zip(examples, answers, strict=True):
        gold = Counter((" ".join(example.words[e.start : e.end]), e.type) for e in entities(example.tags))
        said = Counter((mention.surface, mention.type) for mention in answer.parsed.mentions)
        right += (gold & said).total()
        found += said.total()
        wanted += gold.total()
    return prf(right, found, wanted)["f1"]
