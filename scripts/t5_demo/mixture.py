"""The text-to-text examples that ``t5-demo`` is pre-trained on, as byte ids.

Most are named entity recognition over machine-made sentences.  The others serve it: copying
teaches the decoder to point at the source, asking for one kind of name teaches the types, and
filling gaps shows the model the wording of real sentences, whose labels it never gets.
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
ONE_TYPE = {"people": "PER", "places": "LOC", "groups": "ORG", "others": "MISC"}
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,-'éöñćş"

Ids = list[int]


@dataclass(frozen=True)
class Example:
    """A source and a target, each closed by the end symbol."""

    source: Ids
    target: Ids


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
        if task == "ner":
            return Example(encode("ner: " + sentence.text), encode(sentence.target()))
        if task == "names":
            names = [name for name, _ in sentence.entities]
            return Example(encode("names: " + sentence.text), encode(" | ".join(names) or "None"))
        prefix = self.rng.choice(list(ONE_TYPE))
        names = [name for name, kind in sentence.entities if kind == ONE_TYPE[prefix]]
        return Example(encode(f"{prefix}: {sentence.text}"), encode(" | ".join(names) or "None"))

    def _copy(self, longest: int) -> Example:
        """A random string, or invented words, to be repeated."""
        if self.rng.random() < 0.5:
            text = "".join(self.rng.choices(ALPHABET, k=self.rng.randint(3, longest))).strip() or "a"
        else:
            text = self.grammar.names.full()
        return Example(encode("copy: " + text), encode(text))

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
        return Example([*source, EOS], [*target, EOS])


def pad(rows: list[Ids], value: int) -> Tensor:
    """Rows of ids as one matrix."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """The keyword arguments of the model."""
    source = pad([example.source for example in examples], PAD)
    labels = pad([example.target for example in examples], -100)
    return {"input_ids": source, "attention_mask": source.ne(PAD).long(), "labels": labels}


def batches(mixture: Mixture, token_budget: int, warm_batches: int) -> Iterator[dict[str, Tensor]]:
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
