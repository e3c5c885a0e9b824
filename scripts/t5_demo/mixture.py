"""The text-to-text examples that ``t5-demo`` is pre-trained on, as byte ids.

Most are named entity recognition over machine-made sentences.  The others serve it: copying
teaches the decoder to point at the source, asking for one kind of name teaches the types, and
filling gaps shows the model the wording of real sentences, whose labels it never gets.

Since the sentences are made here, more is known of them than the answer, and the model is told
it while it trains (``Example``): of every source byte the type of its entity and which in the
sentence that is, of every answered byte where in the source it stands.  An answer alone says
so little about a sentence that a small model needs far longer to find this out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from grammar import Grammar, Sentence
from torch import Tensor

PAD, EOS, FIRST_BYTE, FIRST_SENTINEL = 0, 1, 3, 259
POOL = 3000
WARM_MIXTURE = {"copy": 60, "names": 15, "ner": 25}
MIXTURE = {"ner": 76, "one": 7, "names": 4, "copy": 4, "fill": 9}
TYPES = ("", "PER", "LOC", "ORG", "MISC")
TAGS, ORDERS = 2 * len(TYPES) - 1, 9
UNKNOWN = -100
ONE_TYPE = {"people": "PER", "places": "LOC", "groups": "ORG", "others": "MISC"}
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,-'éöñćş"

Ids = list[int]


@dataclass(frozen=True)
class Example:
    """A source and a target, each closed by the end symbol, and hints where there are any.

    Hints are ``UNKNOWN`` or, for a source byte, ``tags`` (0 outside of names, else twice the
    place of the type in ``TYPES``, less one at the first byte of a name) and ``orders`` (0, else
    the number of the entity), and for a target byte ``origins``: the source byte to look at.
    """

    source: Ids
    target: Ids
    tags: Ids
    orders: Ids
    origins: Ids


def encode(text: str) -> Ids:
    """The ids that ByT5Tokenizer gives to plain text."""
    return [byte + FIRST_BYTE for byte in text.encode("utf-8")] + [EOS]


def decode(ids: Ids) -> str:
    """Text back from ids; special symbols are left out."""
    return bytes(i - FIRST_BYTE for i in ids if FIRST_BYTE <= i < FIRST_SENTINEL).decode("utf-8", "ignore")


class Mixture:
    """Draws examples of all tasks; everything random comes from one seed."""

    def __init__(self, seed: int, real_sentences: list[str]) -> None:
        self.rng = random.Random(seed)
        self.grammar = Grammar(seed + 1, real_sentences)
        self.real_sentences = real_sentences

    def example(self, warm: bool) -> Example:
        """One example; ``warm`` is the short opening phase, mostly copying."""
        mixture = WARM_MIXTURE if warm else MIXTURE
        task = self.rng.choices(list(mixture), list(mixture.values()))[0]
        if task == "copy":
            return self._copy(24 if warm else 60)
        if task == "fill":
            return self._fill()
        sentence = self.grammar.sentence()
        while warm and len(sentence.text) > 60:
            sentence = self.grammar.sentence()
        return self._extract(task, sentence)

    def _extract(self, task: str, sentence: Sentence) -> Example:
        """All entities with types, all names, or the names of one type."""
        prefix = self.rng.choice(list(ONE_TYPE)) if task == "one" else task
        wanted = [entity for entity in sentence.entities if task != "one" or entity.kind == ONE_TYPE[prefix]]
        source = encode(f"{prefix}: {sentence.text}")
        shift = len(prefix) + 2
        tags, orders = [0] * len(source), [0] * len(source)
        for number, entity in enumerate(sentence.entities, start=1):
            first, size = shift + entity.start, len(entity.name.encode("utf-8"))
            kind = 2 * TYPES.index(entity.kind)
            tags[first : first + size] = [kind - 1] + [kind] * (size - 1)
            orders[first : first + size] = [min(number, ORDERS - 1)] * size
        target, origins = b"", []
        for entity in wanted:
            name, first = entity.name.encode("utf-8"), shift + entity.start
            kind = f": {entity.kind}" if task == "ner" else ""
            joint = " | " if target else ""
            last = origins[-1:] * len(joint)
            target += joint.encode() + name + kind.encode()
            origins += [*last, *range(first, first + len(name)), *[first + len(name) - 1] * len(kind)]
        end = len(source) - 1
        target = target or b"None"
        origins = origins or [end] * len(target)
        return Example(source, encode(target.decode("utf-8")), tags, orders, [*origins, end])

    def _copy(self, longest: int) -> Example:
        """A random string, or invented words, to be repeated."""
        if self.rng.random() < 0.5:
            text = "".join(self.rng.choices(ALPHABET, k=self.rng.randint(3, longest))).strip() or "a"
        else:
            text = self.grammar.names.full()
        source, target = encode("copy: " + text), encode(text)
        unknown = [UNKNOWN] * len(source)
        return Example(source, target, unknown, unknown, list(range(len(source) - len(target), len(source))))

    def _fill(self) -> Example:
        """T5's span corruption over bytes: short gaps, named by sentinels, to be filled."""
        real = self.rng.random() < 0.7
        ids = encode(self.rng.choice(self.real_sentences) if real else self.grammar.sentence().text)[:-1]
        source, target, at, sentinel = [], [], 0, FIRST_SENTINEL
        while at < len(ids):
            keep = self.rng.randint(6, 40)
            gap = self.rng.randint(1, 8)
            source += ids[at : at + keep]
            hidden = ids[at + keep : at + keep + gap]
            if hidden:
                source.append(sentinel)
                target += [sentinel, *hidden]
                sentinel += 1
            at += keep + gap
        unknown = [UNKNOWN] * (len(source) + 1)
        return Example([*source, EOS], [*target, EOS], unknown, unknown, [UNKNOWN] * (len(target) + 1))


def pad(rows: list[Ids], value: int) -> Tensor:
    """Rows of ids as one matrix."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def collate(examples: list[Example]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The keyword arguments of the model, and the hints."""
    source = pad([example.source for example in examples], PAD)
    labels = pad([example.target for example in examples], UNKNOWN)
    hints = {
        key: pad([getattr(example, key) for example in examples], UNKNOWN) for key in ("tags", "orders", "origins")
    }
    return {"input_ids": source, "attention_mask": source.ne(PAD).long(), "labels": labels}, hints


def batches(
    mixture: Mixture, token_budget: int, warm_batches: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Endless batches of examples of similar length; padding counts against the budget."""
    made = 0
    while True:
        warm = made < warm_batches
        pool = [mixture.example(warm) for _ in range(POOL)]
        pool.sort(key=lambda example: (len(example.source) // 8, len(example.target)))
        packed = list(pack(pool, token_budget))
        mixture.rng.shuffle(packed)
        for examples in packed:
            made += 1
            yield collate(examples)


def pack(pool: list[Example], token_budget: int) -> Iterator[list[Example]]:
    """Cut a sorted pool into batches whose padded size fits the budget."""
    batch: list[Example] = []
    source = target = 0
    for example in pool:
        wider_source, wider_target = max(source, len(example.source)), max(target, len(example.target))
        if batch and (wider_source + wider_target) * (len(batch) + 1) > token_budget:
            yield batch
            batch, wider_source, wider_target = [], len(example.source), len(example.target)
        batch.append(example)
        source, target = wider_source, wider_target
    yield batch
