"""Machine-made sentences with known named entities.

The demonstration model never sees a labelled sentence of the bundled data set while it is
pre-trained.  What it learns about names comes from here: templates (``templates.txt``), lists
of names (``names.txt``) and ordinary words (``words.txt``), names put together from syllables
so that it cannot rely on remembering them, and surfaces that change their type with the
context (``Jordan`` the country, the player, the club).

Run as a script, the module prints samples.
"""

from __future__ import annotations

import random
import re
import sys
from dataclasses import dataclass

from corpus import HERE, read_sections, read_unlabelled
from namegen import ENTITY_SLOTS, Names

MAX_BYTES = 190
CONTEXT_SECTIONS = {"lead", "tail"}
SECTION_WEIGHTS = {"plain": 10, "list": 4, "clause": 24}
DEFAULT_WEIGHT = 9

_ALTERNATIVES = re.compile(r"<([^<>]*)>")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Entity:
    """A name, its type, and the byte of the sentence at which it begins."""

    name: str
    kind: str
    start: int


@dataclass(frozen=True)
class Sentence:
    """Tokens joined by single spaces and the entities in source order."""

    text: str
    entities: tuple[Entity, ...]

    def target(self) -> str:
        """The answer to ``ner: ``: ``Peter Blackburn: PER | EU: ORG`` or ``None``."""
        return " | ".join(f"{entity.name}: {entity.kind}" for entity in self.entities) or "None"


@dataclass
class Piece:
    """A stretch of tokens; ``kind`` is the entity type, or None for ordinary words."""

    text: str
    kind: str | None = None


class Grammar:
    """Expands templates into sentences; everything random comes from one seed.

    ``prose`` are real sentences: their lower-case words fill gaps between the names.
    """

    def __init__(self, seed: int, prose: list[str]) -> None:
        self.rng = random.Random(seed)
        self.names = Names(self.rng, prose)
        sections = read_sections(HERE / "templates.txt")
        self.macros = {name[1:]: lines for name, lines in sections.items() if name.startswith("@")}
        self.context = {name: sections[name] for name in CONTEXT_SECTIONS}
        self.sections = {
            name: lines for name, lines in sections.items() if name[0] != "@" and name not in CONTEXT_SECTIONS
        }
        self.weights = [SECTION_WEIGHTS.get(name, DEFAULT_WEIGHT) for name in self.sections]

    def sentence(self) -> Sentence:
        """One sentence, short enough for a small model."""
        while True:
            made = self._finish(self._compose())
            if 0 < len(made.text.encode("utf-8")) <= MAX_BYTES:
                return made

    def _compose(self) -> list[Piece]:
        """A template, perhaps with a lead before it, a tail behind it, or a second clause."""
        section = self.rng.choices(list(self.sections), self.weights)[0]
        pieces = self.expand(self.rng.choice(self.sections[section]))
        if section == "list":
            return pieces
        bare = section == "plain" and self.rng.random() < 0.8
        if not bare and self.rng.random() < 0.14:
            pieces = self.expand(self.rng.choice(self.context["lead"])) + lowered(pieces)
        if not bare and pieces[-1].text == "." and self.rng.random() < 0.2:
            tail = self.expand(self.rng.choice(self.context["tail"]))
            pieces[-1:] = [*tail, Piece(".")]
        if pieces[-1].text == "." and self.rng.random() < 0.07:
            joint = self.rng.choice((", and", ", but", ";", "while", ", so", ", although", "because", "."))
            second = self.expand(self.rng.choice(self.sections["plain" if bare else "clause"]))
            pieces[-1:] = [Piece(joint), *(second if joint == "." else lowered(second))]
        if pieces[-1].text == "." and self.rng.random() < 0.04:
            pieces.pop()
        return pieces

    def expand(self, template: str) -> list[Piece]:
        """Choose among the alternatives of a template and fill its slots."""
        while "<" in template:
            template = _ALTERNATIVES.sub(lambda match: self.rng.choice(match[1].split("|")), template)
        pieces: list[Piece] = []
        for item in template.split():
            slot = _SLOT.fullmatch(item)
            if slot and slot[1] in self.macros:
                pieces.extend(self.expand(self.rng.choice(self.macros[slot[1]])))
            elif slot and slot[1] in ENTITY_SLOTS:
                pieces.append(self._entity(slot[1], pieces))
            else:
                text = _SLOT.sub(lambda match: self._filler(match[1]), item)
                pieces.extend([Piece(text)] if text else [])
        return pieces

    def _entity(self, slot: str, before: list[Piece]) -> Piece:
        """Fill an entity slot; now and then with a name that the sentence already has."""
        kind = ENTITY_SLOTS[slot]
        if slot not in ("nat", "nats", "lang", "religion", "law") and self.rng.random() < 0.06:
            words = [piece.text for piece in before if piece.kind in ("PER", "LOC", "ORG")]
            if words:
                return Piece(self.rng.choice(words).split()[-1], kind)
        return Piece(self._filler(slot), kind)

    def _filler(self, slot: str) -> str:
        """The text of a slot: a method of ``Names`` or, failing that, one of the lists."""
        if slot == "Vinf":
            return self.names.vinf_capital()
        maker = getattr(self.names, slot, None)
        return maker() if maker else self.names.pick(slot)

    def _finish(self, pieces: list[Piece]) -> Sentence:
        """Mend articles, begin with a capital, and join."""
        shout = self.rng.random() < 0.015
        texts = [piece.text for piece in pieces]
        for index in range(len(texts) - 1):
            if texts[index] == "a" and texts[index + 1][0] in "aeiouAEIO":
                texts[index] = "an"
        starts = [0] + [i + 1 for i, text in enumerate(texts[:-1]) if text in ('"', ".") and i + 1 < len(texts)]
        for index in starts:
            if pieces[index].kind is None and (index == 0 or texts[index - 1] == "." or index == 1):
                texts[index] = texts[index][0].upper() + texts[index][1:]
        if shout:
            texts = [text.upper() for text in texts]
        entities, at = [], 0
        for text, piece in zip(texts, pieces, strict=True):
            if piece.kind:
                entities.append(Entity(text, piece.kind, at))
            at += len(text.encode("utf-8")) + 1
        return Sentence(" ".join(texts), tuple(entities))


def lowered(pieces: list[Piece]) -> list[Piece]:
    """The same pieces for use after a lead: the first ordinary word loses its capital."""
    head = pieces[0]
    if head.kind is None and head.text not in ("I", "SOCCER"):
        return [Piece(head.text[0].lower() + head.text[1:]), *pieces[1:]]
    return pieces


if __name__ == "__main__":
    grammar = Grammar(int(sys.argv[1]) if len(sys.argv) > 1 else 0, read_unlabelled())
    for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 40):
        sample = grammar.sentence()
        print(f"{sample.text}\n    {sample.target()}")
