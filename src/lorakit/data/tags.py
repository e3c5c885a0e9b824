"""Tags of words: which scheme a file uses, the entities that its tags mean, and their conversion to IOB2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

OUTSIDE = "O"
BEGINS = frozenset("BSU")  # prefixes that begin an entity whatever stands before
ENDS = frozenset("ESLU")  # prefixes after which nothing goes on
PREFIXES = BEGINS | ENDS | {"I"}


class Entity(NamedTuple):
    """A typed stretch of words: words[start:end]."""

    type: str
    start: int
    end: int


def split_tag(tag: str) -> tuple[str, str]:
    """The prefix and the type of a tag: `B-PER` gives ("B", "PER"), `O` gives ("O", "")."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def is_tag(tag: str) -> bool:
    """Whether this is `O`, or a type behind one of the prefixes of IOB (B, I), IOBES (E, S) or BILOU (L, U)."""
    prefix, kind = split_tag(tag)
    return tag == OUTSIDE or (prefix in PREFIXES and bool(kind))


def standard(tag: str) -> str:
    """A tag with its prefix in capitals and the M- of BMES as I-; what is not a tag as it stands."""
    prefix, dash, kind = tag.partition("-")
    prefix = prefix.upper()
    if not dash:
        return prefix if prefix == OUTSIDE else tag
    plain = f"{'I' if prefix == 'M' else prefix}-{kind}"
    return plain if is_tag(plain) else tag


def starts_entity(tag: str, previous: str) -> bool:
    """Whether an entity begins here as conlleval reads it: at B- and S-, after E- and S-, after O, after another type."""
    prefix, kind = split_tag(tag)
    before, kind_before = split_tag(previous)
    return tag != OUTSIDE and (prefix in BEGINS or before in ENDS or kind != kind_before)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities in a sequence of tags of any scheme, read as conlleval does (so broken sequences have an answer)."""
    every: list[Entity] = []
    previous = OUTSIDE
    for i, tag in enumerate(tags):
        if starts_entity(tag, previous):
            every.append(Entity(split_tag(tag)[1], i, i + 1))
        elif tag != OUTSIDE:
            every[-1] = every[-1]._replace(end=i + 1)
        previous = tag
    return every


def strict_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities in strict IOB2: they begin at B- only, and an I- that continues nothing is no entity."""
    every: list[Entity] = []
    inside = ""  # type of the entity that the previous word belongs to
    for i, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        if prefix == "B":
            every.append(Entity(kind, i, i + 1))
            inside = kind
        elif prefix == "I" and kind == inside:
            every[-1] = every[-1]._replace(end=i + 1)
        else:
            inside = ""
    return every


def to_tags(spans: Iterable[Entity], length: int) -> list[str]:
    """IOB2 tags of non-overlapping entities over `length` words."""
    tags = [OUTSIDE] * length
    for kind, start, end in spans:
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


# Each scheme is a claim about two neighbours (O stands before the first word and after the last): whether the pair
# breaks it.


def _breaks_iob2(previous: str, tag: str) -> bool:
    """Every entity begins with B-."""
    prefix, kind = split_tag(tag)
    return prefix not in ("O", "B") and (prefix != "I" or kind != split_tag(previous)[1])


def _breaks_io(previous: str, tag: str) -> bool:
    """There is no B- at all."""
    return split_tag(tag)[0] not in ("O", "I")


def _breaks_iob1(previous: str, tag: str) -> bool:
    """A B- stands only where an entity touches another of its type."""
    prefix, kind = split_tag(tag)
    return prefix not in ("O", "B", "I") or (prefix == "B" and kind != split_tag(previous)[1])


def _breaks_ends(previous: str, tag: str, *, end: str, single: str) -> bool:
    """Every entity is a single-word tag, or goes from B- over I- to its end tag."""
    prefix, kind = split_tag(tag)
    before, kind_before = split_tag(previous)
    is_open = before in ("B", "I")
    if prefix in ("I", end):
        return not is_open or kind != kind_before
    return is_open or prefix not in ("O", "B", single)


# In the order of preference where a file breaks several equally often.
SCHEMES: Mapping[str, Callable[[str, str], bool]] = {
    "IOB2": _breaks_iob2,
    "IO": _breaks_io,
    "IOB1": _breaks_iob1,
    "IOBES": partial(_breaks_ends, end="E", single="S"),
    "BILOU": partial(_breaks_ends, end="L", single="U"),
}


def scheme(sentences: Iterable[Sequence[str]]) -> str:
    """The scheme that the tags of a whole file break least often: IOB2, IO, IOB1, IOBES or BILOU."""
    pairs = Counter(pair for tags in sentences for pair in pairwise((OUTSIDE, *tags, OUTSIDE)))
    broken = {name: sum(count for pair, count in pairs.items() if breaks(*pair)) for name, breaks in SCHEMES.items()}
    return min(broken, key=broken.__getitem__)


def odd_tags(tags: Sequence[str], scheme: str) -> list[int]:
    """The positions of the tags that break the scheme; an entity without its end is odd at its last tag."""
    breaks = SCHEMES[scheme]
    odd = []
    for i, (previous, tag) in enumerate(pairwise((OUTSIDE, *tags, OUTSIDE))):
        if breaks(previous, tag):
            unended = split_tag(previous)[0] in ("B", "I") and split_tag(tag)[0] in ("O", *BEGINS)
            odd.append(i - 1 if unended and scheme in ("IOBES", "BILOU") else i)
    return sorted(set(odd))
