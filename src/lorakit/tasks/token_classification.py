"""Named entities by a tag for each word: words are scored, not sub-words, and all of them, however long the text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.data.tags import OUTSIDE, Entity, entities, split_tag
from lorakit.errors import ConfigError, ModelError
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import IGNORE, Batch, Item, Task, inputs_of, pad, pad_inputs
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.entities import entity_scores, entity_statistics
from lorakit.tasks.tag_decoding import CRF, Crf, iob2_rule, iob2_start, log_likelihood, marginals, viterbi

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ABSENT, PADDING = -1, -2  # in place of a sub-word's position: the word has none; there is no word


@dataclass(frozen=True)
class Tagged:
    """A tag and its probability for each word of the example."""

    tags: tuple[str, ...]
    scores: tuple[float, ...]


def layers(section: TaskSection, labels: tuple[str, ...]) -> dict[str, nn.Module]:
    """What is trained besides the head of a model that tags words."""
    return {CRF: Crf(len(labels))} if section.crf else {}


class Read(NamedTuple):
    """What one window says of its own words. Shapes: W words, C tags."""

    log_p: Tensor  # (W, C)
    transitions: Tensor  # (C, C)
    tags: Tensor  # (W,), the best of these words by themselves
    scores: Tensor  # (W,), their probabilities


@dataclass(frozen=True)
class TokenClassification(Task):
    """Word-level tagging. A text longer than the limit is read in overlapping windows, so that every word is answered.

    A word is answered by its first sub-word, whichever sub-words are trained: one that is cut in many pieces has no more
    say than another, and the first piece of every word is read, be the word longer than a window. With a CRF the words
    of a window are one path; it is trained and decoded over words alone.
    """

    info = TASKS["token_classification"]
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]  # tags, O first
    max_length: int
    stride: int | None = None  # tokens that neighbouring windows share; None: a quarter of max_length
    subwords: Literal["first", "all"] = "first"
    decoding: Literal["viterbi", "argmax"] = "viterbi"
    crf: bool = False

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        if not tokenizer.is_fast:
            raise ModelError(
                f"task.name = 'token_classification': {type(tokenizer).__name__} does not know which sub-word belongs to "
                "which word; use a base model with a fast tokenizer, or text2text_ner with a T5"
            )
        size = max_length - tokenizer.num_special_tokens_to_add()
        if section.stride is not None and section.stride >= size:
            raise ConfigError(
                f"task.stride = {section.stride}: a window of {max_length} tokens holds {size} of the text; "
                f"neighbours can share at most {size - 1}"
            )
        knobs = {key: getattr(section, key) for key in ("stride", "subwords", "decoding", "crf")}
        return cls(tokenizer, labels, max_length, **knobs)

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        words = [list(example.words) for example in examples]
        encoded = self.tokenizer(words, is_split_into_words=True, verbose=False)
        return [
            self._items(example, encoded["input_ids"][i], encoded.word_ids(i)) for i, example in enumerate(examples)
        ]

    def _items(self, example: Example, ids: list[int], word_ids: Sequence[int | None]) -> list[Item]:
        """An item for each window. `first` has the position of the first sub-word of each word that is its own."""
        inside = [position for position, word in enumerate(word_ids) if word is not None]
        head, tail = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))  # special tokens stand around
        spans = _spans(word_ids[head:tail], len(example.words))
        size = self.max_length - head - (len(ids) - tail)
        overlap = self.max_length // 4 if self.stride is None else self.stride
        items: list[Item] = []
        for window in windows(spans, tail - head, size, min(overlap, size - 1)):
            own = spans[window.first : window.last]
            window_ids = [*ids[:head], *ids[head + window.start : head + window.end], *ids[tail:]]
            first = [head + begin - window.start if begin < stop else ABSENT for begin, stop in own]
            item = {"input_ids": window_ids, "first": first}
            if example.tags:
                counts = [min(stop, window.end) - begin for begin, stop in own]
                item["labels"] = self._targets(len(window_ids), first, counts, example.tags[window.first : window.last])
            items.append(item)
        return items

    def _targets(self, length: int, first: list[int], counts: list[int], tags: Sequence[str]) -> list[int]:
        """The tag's number at the first sub-word of each word, and that of its I- at the others where all are trained."""
        numbers = {tag: i for i, tag in enumerate(self.labels)}
        labels = [IGNORE] * length
        for position, count, tag in zip(first, counts, tags, strict=True):
            if position != ABSENT:
                labels[position] = numbers[tag]
                if self.subwords == "all":
                    inside = numbers["I-" + split_tag(tag)[1] if tag != OUTSIDE else OUTSIDE]
                    labels[position + 1 : position + count] = [inside] * (count - 1)
        return labels

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = pad_inputs(items, self.tokenizer)
        batch["first"] = pad([item["first"] for item in items], PADDING)
        if "labels" in items[0]:
            batch["labels"] = pad([item["labels"] for item in items], IGNORE)
            batch["n_targets"] = (batch["labels"] != IGNORE).sum(1)
        return batch

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**inputs_of(batch)).logits.float()  # (B, T, C)
        labels = batch["labels"]
        if not self.crf:
            return F.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="none").sum(1)
        # words without a piece come last
        order = batch["first"].ge(0).long().argsort(dim=1, descending=True, stable=True)
        first = batch["first"].gather(1, order)  # (B, W)
        log_p = _at(logits.log_softmax(-1), first)
        tags = labels.gather(1, first.clamp_min(0)).clamp_min(0)
        return -log_likelihood(log_p, self._transitions(model, log_p), tags, first >= 0)

    def _transitions(self, model: nn.Module, log_p: Tensor) -> Tensor:
        """Scores of neighbouring tags, which are all alike without a CRF. Shapes: log_p (B, W, C), (B, C, C)."""
        if self.crf:
            table: Tensor = model.get_submodule(CRF)(log_p)
            return table
        return log_p.new_zeros(1, log_p.shape[-1], log_p.shape[-1]).expand(len(log_p), -1, -1)

    def predict(self, model: nn.Module, batch: Batch) -> list[Read]:
        first = batch["first"]  # (B, W)
        log_p = _at(model(**inputs_of(batch)).logits.float().log_softmax(-1), first)  # (B, W, C)
        transitions = self._transitions(model, log_p).detach().cpu()
        outside = torch.full_like(log_p, -torch.inf)
        outside[..., 0] = 0.0
        log_p = log_p.where((first >= 0)[..., None], outside).cpu()
        there = (first != PADDING).cpu()
        tags, scores = self._decode(log_p, transitions, there)
        lengths = there.sum(1).tolist()
        return [Read(log_p[i, :n], transitions[i], tags[i, :n], scores[i, :n]) for i, n in enumerate(lengths)]

    def _decode(self, log_p: Tensor, transitions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the best tags, and the probability of each at its word (with a CRF, over all paths).

        Shapes: log_p (B, W, C), transitions (B, C, C), mask, tags and probabilities (B, W).
        """
        if self.decoding == "argmax":
            tags = log_p.argmax(-1)
        else:
            begun = torch.cat([log_p[:, :1] + iob2_start(self.labels), log_p[:, 1:]], 1)
            tags = viterbi(begun, transitions + iob2_rule(self.labels), mask)
        p = marginals(log_p, transitions, mask) if self.crf else log_p.exp()
        return tags, p.gather(2, tags[..., None])[..., 0]

    def answer(self, example: Example, raws: Sequence[Read]) -> Tagged:
        _, transitions, tags, scores = raws[0]
        if len(raws) > 1:  # one path over the whole text, whatever each window would say alone
            log_p = torch.cat([raw.log_p for raw in raws])[None]
            (tags,), (scores,) = self._decode(log_p, transitions[None], torch.ones(log_p.shape[:2], dtype=torch.bool))
        return Tagged(tuple(self.labels[tag] for tag in tags.tolist()), tuple(scores.tolist()))

    def evaluate(self, examples: Sequence[Example], answers: Sequence[Tagged]) -> Evaluation:
        tags = [example.tags for example in examples], [answer.tags for answer in answers]
        return Evaluation(entity_scores(*tags), entity_statistics(*tags))

    def to_json(self, example: Example, answer: Tagged) -> dict[str, Any]:
        spans = entities(answer.tags)
        scores = [sum(answer.scores[e.start : e.end]) / (e.end - e.start) for e in spans]
        return {"text": example.text, "entities": entity_dicts(example, spans, scores)}

    def expected(self, example: Example) -> list[dict[str, Any]]:
        return entity_dicts(example, entities(example.tags))


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """The values at some sub-words. Shapes: values (B, T, C), positions (B, W), (B, W, C); below 0 stands for any."""
    return values.gather(1, positions.clamp_min(0)[..., None].expand(-1, -1, values.shape[-1]))


def _spans(word_ids: Sequence[int | None], n_words: int) -> list[tuple[int, int]]:
    """The sub-words [begin, stop) of each word; where it has none, an empty stretch behind the word before."""
    begins: dict[int, int] = {}
    stops: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            begins.setdefault(word, position)
            stops[word] = position + 1
    spans: list[tuple[int, int]] = []
    for word in range(n_words):
        before = spans[-1][1] if spans else 0
        spans.append((begins.get(word, before), stops.get(word, before)))
    return spans


def entity_dicts(example: Example, spans: Sequence[Entity], scores: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Entities as transformers' pipelines give them; start and end are offsets into the example's text."""
    dicts: list[dict[str, Any]] = []
    for entity in spans:
        start, end = example.offsets[entity.start][0], example.offsets[entity.end - 1][1]
        dicts.append({"entity_group": entity.type, "word": example.text[start:end], "start": start, "end": end})
    for entry, score in zip(dicts, scores, strict=False):
        entry["score"] = score
    return dicts


# A text longer than the model's limit as overlapping windows, each word answered where it has most context.


class Window(NamedTuple):
    """The sub-words [start, end) that the model reads at once, and the words [first, last) that it answers for."""

    start: int
    end: int
    first: int
    last: int


def windows(words: Sequence[tuple[int, int]], length: int, size: int, overlap: int) -> list[Window]:
    """Windows over a text of `length` sub-words; each word belongs to exactly one, which holds its first sub-word.

    `words` has the sub-words [start, end) of each word, in order; a word without a sub-word has start == end.
    All windows of a text have `size` sub-words, so the last one may overlap the one before by more than `overlap`.
    Where two windows hold a word, it goes to the one whose middle is nearer (to the earlier of two as near): that one
    has more text on the word's shorter side. What lies beyond the text's ends is nobody's context.
    """
    starts = [*range(0, max(length - size, 0), size - overlap), max(length - size, 0)]
    ends = [min(start + size, length) for start in starts]
    owners: list[int] = []
    for begin, stop in words:
        owner = owners[-1] if owners else 0
        # to the next window while it has the word's first sub-word, and the word's middle is beyond that of the overlap
        while owner + 1 < len(starts) and begin >= (start := starts[owner + 1]) and begin + stop > start + ends[owner]:
            owner += 1
        owners.append(owner)
    chosen: list[Window] = []
    first = 0
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        last = bisect_right(owners, number)
        if last > first or not words:
            chosen.append(Window(start, end, first, last))
        first = last
    return chosen
