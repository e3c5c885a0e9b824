"""Named entities written out by a T5: `ner: Peter Blackburn visits EU .` -> `Peter Blackburn: PER | EU: ORG`."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import Tensor, nn

from lorakit.data.example import Example
from lorakit.data.tags import OUTSIDE, entities, to_tags
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, Cut, Item, Task
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.entities import entity_scores, entity_statistics
from lorakit.tasks.metrics.labels import prf
from lorakit.tasks.text2text.decoding import Language, Written, collate, greedy, losses_of_rows, target_ids
from lorakit.tasks.text2text.entity_format import EntityFormat, Mention, Reading
from lorakit.tasks.text2text.formats import make_format
from lorakit.tasks.text2text.spelling import Spelling, decode
from lorakit.tasks.token_classification import entity_dicts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAULTS = ("malformed", "unknown_type", "invented", "misordered")  # numbers in a Reading


class Window(NamedTuple):
    """Words of an example as the model reads them, and their tags."""

    words: Sequence[str]
    tags: Sequence[str]


class Kept(NamedTuple):
    """What the length limits leave of a window: the tags that can still be learned, and what was cut."""

    tags: Sequence[str]
    text_is_cut: bool
    target_is_cut: bool


@dataclass(frozen=True)
class Extracted:
    """The outputs for an example, one a window, and what was read out of them."""

    written: tuple[Written, ...]
    texts: tuple[str, ...]
    readings: tuple[Reading, ...]

    @property
    def tags(self) -> list[str]:
        """An IOB2 tag for each word of the example."""
        tags = [tag for reading in self.readings for tag in reading.tags]
        return to_tags(entities(tags), len(tags))


@dataclass(frozen=True)
class Text2TextNer(Task):
    """NER as generation, in one of the `FORMATS`. The labels are entity types."""

    info = TASKS["text2text_ner"]
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    max_length: int
    prefix: str = "ner: "
    max_target_length: int = 128
    constrained: bool = False
    format: str = "list"

    @classmethod
    def make(
        cls, section: TaskSection, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...], max_length: int
    ) -> Self:
        knobs = (section.prefix, section.max_target_length, section.constrained, section.format)
        task = cls(tokenizer, labels, max_length, *knobs)
        _ = task.form  # refuses a tokenizer or a type that cannot be used
        return task

    @cached_property
    def form(self) -> EntityFormat:
        """How entities are written."""
        return make_format(self.format, self.tokenizer, self.labels)

    @cached_property
    def spelling(self) -> Spelling:
        """How words are."""
        return Spelling(self.tokenizer, self.form.drop_ins)

    def windows(self, example: Example) -> list[Window]:
        """The example as the model reads it: whole, unless the format cannot speak of so many words at once."""
        words = self.spelling.words(example.words)
        tags = to_tags(entities(example.tags), len(words))
        size = self.form.longest or max(1, len(words))
        return [Window(words[at : at + size], tags[at : at + size]) for at in range(0, len(words), size)]

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        self.spelling.words([word for example in examples for word in example.words])  # all at once is faster
        windows = [self.windows(example) for example in examples]
        flat = [window for own in windows for window in own]
        inputs = self._input_ids(
            [self._source(window.words) for window in flat], truncation=True, max_length=self.max_length
        )
        targets = target_ids(self.tokenizer, [self.form.write(*window) for window in flat], self.max_target_length)
        items: list[Item] = [{"input_ids": i, "labels": t} for i, t in zip(inputs, targets, strict=True)]
        if self.constrained:  # the words go along as code points, since a batch is made of numbers
            items = [{**i, "source": [ord(c) for c in " ".join(w.words)]} for i, w in zip(items, flat, strict=True)]
        rest = iter(items)
        return [[next(rest) for _ in own] for own in windows]

    def _source(self, words: Sequence[str]) -> str:
        return self.prefix + self.form.source(words)

    def _input_ids(self, sources: Sequence[str], **options: Any) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(sources), verbose=False, **options)["input_ids"]
        return ids

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        """An entity is lost where not all of its words are read, or where the target's kept part does not name it."""
        texts = targets = lost = 0
        for example, own in zip(examples, items, strict=True):
            left = [self._within_limits(window, item) for window, item in zip(self.windows(example), own, strict=True)]
            texts += any(part.text_is_cut for part in left)
            targets += any(part.target_is_cut for part in left)
            if any(part.text_is_cut or part.target_is_cut for part in left):
                named = [tag for part in left for tag in part.tags]
                lost += len(set(entities(example.tags)) - set(entities(named)))
        return Cut(texts, targets, lost)

    def _within_limits(self, window: Window, item: Item) -> Kept:
        """What the limits leave of a window."""
        n, tags = len(window.words), list(window.tags)
        if len(item["input_ids"]) >= self.max_length:
            sources = [self._source(window.words[:i]) for i in range(n + 1)]
            read = bisect_right(sources, self.max_length, key=lambda source: len(self._input_ids([source])[0])) - 1
            n = max(0, read)  # the prefix alone may be too long
        if target_is_cut := self.tokenizer.eos_token_id not in item["labels"]:
            text = decode(self.tokenizer, item["labels"])
            tags = list(self.form.read(text, window.words, self.labels, ended=False).tags)
        text_is_cut = n < len(window.words)
        return Kept([*tags[:n], *[OUTSIDE] * (len(tags) - n)], text_is_cut, target_is_cut)

    def collate(self, items: Sequence[Item]) -> Batch:
        return collate(items, self.tokenizer)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return losses_of_rows(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> list[Written]:
        languages = [self.language(row) for row in batch["source"].tolist()] if self.constrained else None
        return greedy(model, batch, self.max_target_length, languages)

    def language(self, source: Sequence[int]) -> Language:
        """What may be written for the words whose code points these are."""
        words = "".join(map(chr, source)).rstrip("\0").split(" ")
        return Language(self.tokenizer, partial(self.form.ways, words=words, types=self.labels))

    def answer(self, example: Example, raws: Sequence[Written]) -> Extracted:
        texts = [decode(self.tokenizer, raw.ids) for raw in raws]
        readings = [
            self.form.read(text, window.words, self.labels, ended=raw.ended)
            for text, window, raw in zip(texts, self.windows(example), raws, strict=True)
        ]
        return Extracted(tuple(raws), tuple(texts), tuple(readings))

    def evaluate(self, examples: Sequence[Example], answers: Sequence[Extracted]) -> Evaluation:
        """Scores of entities, and the shares of outputs with some fault.

        surface_f1: F1 over words and type alone, blind to the place, as many T5 tutorials score; a diagnostic.
        malformed: with a piece that is not of the form. unknown_type: with a type that training did not have.
        invented: with a mention of what does not stand in the source. misordered: with a mention of what stands before
        the mention written before it. truncated: that reached max_target_length before their end.
        """
        tags = [example.tags for example in examples], [answer.tags for answer in answers]
        readings = [reading for answer in answers for reading in answer.readings]
        written = [raw for answer in answers for raw in answer.written]
        scores = {
            **entity_scores(*tags),
            "surface_f1": self._surface_f1(examples, answers),
            **{fault: _share([getattr(reading, fault) > 0 for reading in readings]) for fault in FAULTS},
            "truncated": _share([not raw.ended for raw in written]),
        }
        return Evaluation(scores, entity_statistics(*tags))

    def _surface_f1(self, examples: Sequence[Example], answers: Sequence[Extracted]) -> float:
        """F1 over (sentence, surface, type), duplicates counted."""
        right = n_predicted = n_gold = 0
        for example, answer in zip(examples, answers, strict=True):
            words = self.spelling.words(example.words)
            gold = Counter(Mention(" ".join(words[e.start : e.end]), e.type) for e in entities(example.tags))
            predicted = Counter(chain.from_iterable(reading.mentions for reading in answer.readings))
            right += (gold & predicted).total()
            n_predicted += predicted.total()
            n_gold += gold.total()
        return prf(right, n_predicted, n_gold)["f1"]

    def to_json(self, example: Example, answer: Extracted) -> dict[str, Any]:
        spans = entities(answer.tags)
        score = min((raw.score for raw in answer.written), default=1.0)
        return {
            "text": example.text,
            "entities": entity_dicts(example, spans, [score] * len(spans)),
            "generated": " ".join(answer.texts),
        }

    def expected(self, example: Example) -> str:
        return " ".join(self.form.write(*window) for window in self.windows(example))


def _share(claims: Sequence[bool]) -> float:
    return sum(claims) / max(1, len(claims))
