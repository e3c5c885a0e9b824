"""The forms in which a text-to-text model may write entities, by the names that task.format has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError
from lorakit.tasks.entity_list import ListFormat
from lorakit.tasks.entity_markup import MarkupFormat
from lorakit.tasks.entity_sentinels import SentinelFormat
from lorakit.tasks.entity_text import EntityFormat
from lorakit.tasks.spelling import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS: Mapping[str, Callable[[PreTrainedTokenizerBase], EntityFormat]] = {
    "list": lambda _: ListFormat(),
    "tanl": lambda _: MarkupFormat(),
    "sentinel": lambda tokenizer: SentinelFormat(count_sentinels(tokenizer)),
}


def make_format(name: str, tokenizer: PreTrainedTokenizerBase, types: Sequence[str]) -> EntityFormat:
    """The format of this name, with every delimiter and type tried out in the tokenizer.

    Raises:
        ConfigError: one of them does not come back as it was written.
    """
    form = FORMATS[name](tokenizer)
    others = " or ".join(repr(other) for other in FORMATS if other != name)
    where = f"task.format = {name!r}"
    for delimiter in form.delimiters:
        if (back := _back(tokenizer, delimiter)) != delimiter:
            raise ConfigError(
                f"{where}: the tokenizer of this model cannot write {delimiter!r} (it comes back as {back!r}); try {others}"
            )
    for kind in types:
        words, tags = ("x", "y"), (f"B-{kind}", f"I-{kind}")
        written = form.write(words, tags)
        back = _back(tokenizer, written)
        if form.read(back, words, types).tags != tags:
            raise ConfigError(
                f"{where}: the entity type {kind!r} does not survive: written {written!r}, read back as {back!r}; "
                f"rename the type in the data, or try {others}"
            )
    return form


def count_sentinels(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of <extra_id_0>, <extra_id_1>, ... the vocabulary has.

    Raises:
        ConfigError: it has none.
    """
    vocabulary = tokenizer.get_vocab()
    count = 0
    while f"<extra_id_{count}>" in vocabulary:
        count += 1
    if not count:
        raise ConfigError(
            "task.format = 'sentinel': the tokenizer of this model has no <extra_id_0>; try 'list' or 'tanl'"
        )
    return count


def _back(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return decode(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
