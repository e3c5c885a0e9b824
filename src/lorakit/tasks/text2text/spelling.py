"""Words as a tokenizer can write them and a format can hold them, so that what is read is what can be copied."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an output, special and unknown pieces kept; end and padding left out."""
    silent = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    visible = [i for i in ids if i not in silent]
    text: str = tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
