"""Named entities written out by a T5: `ner: Peter Blackburn visits EU .` -> `Peter Blackburn: PER | EU: ORG`."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from torch import nn

from lorakit.data.example import Example
from lorakit.data.tags import entities
from lorakit.recipe import TaskSection
from lorakit.task_info import TASKS
from lorakit.tasks.base import Batch, Cut, Item, pad
from lorakit.tasks.metrics.bootstrap import Evaluation
from lorakit.tasks.metrics.entities import entity_scores, entity_statistics
from lorakit.tasks.metrics.labels import prf
from lorakit.tasks.text2text.decoding import Language, WritingTask, Written, decode, greedy, target_ids
from lorakit.tasks.text2text.entity_format import EntityFormat, Mention, Reading
from lorakit.tasks.text2text.formats import make_format
from lorakit.tasks.token_classification import entity_dicts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LOST = "*"  # stands for a character that the tokenizer does not know


class Spelling:
    """The spelling of words in the source and the output of a text-to-text model.

    Most words are spelled as they are. The rest come out of the tokenizer as another text (it folds compatibility
    characters and white space, and lacks some altogether), look like one of its special tokens, or hold a delimiter of
    the format. Those are replaced before the model reads them, so that a copy of what it read can always be written and
    be found again. No spelled word is empty or has white space in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, drop_ins: Mapping[str, str]) -> None:
        self.tokenizer = tokenizer
        self.drop_ins = str.maketrans(dict(drop_ins))
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)))
        self._known: dict[str, str] = {}

    def words(self, words: Sequence[str]) -> list[str]:
        """The words, spelled."""
        if new := [word for word in dict.fromkeys(words) if word not in self._known]:
            plain = [self._plain(word) for word in new]
            for word, text, back in zip(new, plain, self._back(plain), strict=True):
                self._known[word] = text if text and text == back else self._repaired(word, back)
        return [self._known[word] for word in words]

    def _repaired(self, word: str, back: str) -> str:
        letters = "".join(
            self._first_stable(self._back([letter])[0], unicodedata.normalize("NFKD", letter)[:1]) or LOST
            for letter in word
        )
        return self._first_stable(back, letters) or LOST * len(word) or LOST

    def _first_stable(self, *texts: str) -> str:
        """The first of the texts that the tokenizer gives back, or none."""
        plain = [self._plain(text) for text in texts]
        return next((text for text, back in zip(plain, self._back(plain), strict=True) if text and text == back), "")

    def _plain(self, text: str) -> str:
        """Without special tokens, delimiters, white space and control characters."""
        text = self.special.sub(lambda match: "(" + match[0][1:], text).translate(self.drop_ins)
        return "".join(c for c in text if c.isprintable() and not c.isspace())

    def _back(self, words: Sequence[str]) -> list[str]:
        """What the tokenizer gives back of each word behind another; nothing where it has no piece for a part."""
        ids = self.tokenizer([f"x {word}" for word in words], add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        return ["" if unknown in row else decode(self.tokenizer, row).removeprefix("x").strip() for row in ids]


FAULTS = ("malformed", "unknown_type", "invented", "misordered")  # numbers in a Reading


class Extracted(NamedTuple):
    """The output for an example, and what was read out of it."""

    written: Written
    text: str
    reading: Reading

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the example's words."""
        return self.reading.tags


@dataclass(frozen=True)
class Text2TextNer(WritingTask):
    """NER as generation, in one of the `FORMATS`. The labels are entity types."""

    info = TASKS["text2text_ner"]
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

    def encode(self, examples: Sequence[Example]) -> list[list[Item]]:
        self.spelling.words([word for example in examples for word in example.words])  # all at once is faster
        sources = [self.spelling.words(example.words) for example in examples]
        inputs = self._input_ids(sources, truncation=True, max_length=self.max_length)
        targets = target_ids(self.tokenizer, [self.expected(example) for example in examples], self.max_target_length)
        items: list[Item] = [{"input_ids": i, "labels": t} for i, t in zip(inputs, targets, strict=True)]
        if self.constrained:  # the words go along as code points, since a batch is made of numbers
            items = [{**i, "source": [ord(c) for c in " ".join(w)]} for i, w in zip(items, sources, strict=True)]
        return [[item] if words else [] for item, words in zip(items, sources, strict=True)]

    def _input_ids(self, sources: Sequence[Sequence[str]], **options: Any) -> list[list[int]]:
        texts = [self.prefix + " ".join(words) for words in sources]
        ids: list[list[int]] = self.tokenizer(texts, verbose=False, **options)["input_ids"]
        return ids

    def cut(self, examples: Sequence[Example], items: Sequence[Sequence[Item]]) -> Cut:
        """An entity is lost where not all of its words are read, or where the target's kept part does not name it."""
        texts = targets = lost = 0
        for example, own in zip(examples, items, strict=True):
            for item in own:  # none for a text without words
                words, tags = self.spelling.words(example.words), example.tags
                n_read = len(words)
                if len(item["input_ids"]) >= self.max_length:
                    starts = [words[:i] for i in range(n_read + 1)]
                    fits = bisect_right(starts, self.max_length, key=lambda start: len(self._input_ids([start])[0]))
                    n_read = max(0, fits - 1)  # the prefix alone may be too long
                if target_is_cut := self.tokenizer.eos_token_id not in item["labels"]:
                    text = decode(self.tokenizer, item["labels"])
                    tags = self.form.read(text, words, self.labels, ended=False).tags
                texts += n_read < len(words)
                targets += target_is_cut
                lost += len(set(entities(example.tags)) - set(entities(tags[:n_read])))
        return Cut(texts, targets, lost)

    def collate(self, items: Sequence[Item]) -> Batch:
        batch = super().collate(items)
        if self.constrained:
            batch["source"] = pad([item["source"] for item in items], 0)  # (B, characters)
        return batch

    def predict(self, model: nn.Module, batch: Batch) -> list[Written]:
        languages = [self.language(row) for row in batch["source"].tolist()] if self.constrained else None
        return greedy(model, batch, self.max_target_length, languages)

    def language(self, source: Sequence[int]) -> Language:
        """What may be written for the words whose code points these are."""
        words = "".join(map(chr, source)).rstrip("\0").split(" ")
        return Language(self.tokenizer, partial(self.form.ways, words=words, types=self.labels))

    def answer(self, example: Example, raws: Sequence[Written]) -> Extracted:
        if not raws:  # a text without words
            return Extracted(Written((), ended=True, score=1.0), "", Reading((), ()))
        (raw,) = raws
        text = decode(self.tokenizer, raw.ids)
        reading = self.form.read(text, self.spelling.words(example.words), self.labels, ended=raw.ended)
        return Extracted(raw, text, reading)

    def evaluate(self, examples: Sequence[Example], answers: Sequence[Extracted]) -> Evaluation:
        """Scores of entities, and the shares of outputs with some fault.

        surface_f1: F1 over words and type alone, blind to the place, as many T5 tutorials score; a diagnostic.
        malformed: with a piece that is not of the form. unknown_type: with a type that training did not have.
        invented: with a mention of what does not stand in the source. misordered: with a mention of what stands before
        the mention written before it. truncated: that reached max_target_length before their end.
        """
        tags = [example.tags for example in examples], [answer.tags for answer in answers]
        scores = {
            **entity_scores(*tags),
            "surface_f1": self._surface_f1(examples, answers),
            **{fault: _share([getattr(answer.reading, fault) > 0 for answer in answers]) for fault in FAULTS},
            "truncated": _share([not answer.written.ended for answer in answers]),
        }
        return Evaluation(scores, entity_statistics(*tags))

    def _surface_f1(self, examples: Sequence[Example], answers: Sequence[Extracted]) -> float:
        """F1 over (sentence, surface, type), duplicates counted."""
        right = n_predicted = n_gold = 0
        for example, answer in zip(examples, answers, strict=True):
            words = self.spelling.words(example.words)
            gold = Counter(Mention(" ".join(words[e.start : e.end]), e.type) for e in entities(example.tags))
            predicted = Counter(answer.reading.mentions)
            right += (gold & predicted).total()
            n_predicted += predicted.total()
            n_gold += gold.total()
        return prf(right, n_predicted, n_gold)["f1"]

    def to_json(self, example: Example, answer: Extracted) -> dict[str, Any]:
        spans = entities(answer.tags)
        return {
            "text": example.text,
            "entities": entity_dicts(example, spans, [answer.written.score] * len(spans)),
            "generated": answer.text,
        }

    def expected(self, example: Example) -> str:
        return self.form.write(self.spelling.words(example.words), example.tags)


def _share(claims: Sequence[bool]) -> float:
    return sum(claims) / max(1, len(claims))
