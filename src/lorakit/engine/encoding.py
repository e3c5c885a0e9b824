"""Examples to items: in memory, or once for all runs into a folder that is named by what they are made of."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.data.cache import FACTS, CachedItems, write_items
from lorakit.data.example import Example, examples_sha256
from lorakit.data.streaming import Streamed
from lorakit.digest import folder_sha256
from lorakit.errors import OutputError
from lorakit.inference.answer import chunks
from lorakit.models import save_tokenizer
from lorakit.runtime.files import atomic_folder, remove_folder
from lorakit.tasks.base import Item, Task

FORMAT = 1  # to be raised when a task encodes otherwise than before
MOST_BYTES = 64 * 2**30  # that a cache takes; what was not used for the longest time goes first


def encode(
    task: Task, examples: Sequence[Example], cache: Path | None, made_of: Any = None
) -> Sequence[Sequence[Item]]:
    """The items of each example, from the cache where one is named; filled in some thousand examples at a time.

    `made_of` is what the items depend on besides the examples, the tokenizer and the task's name; ready for JSON.

    Raises:
        DataError: what lies in the cache is damaged.
        OutputError: it cannot be written.
    """
    if cache is None:
        return task.encode(examples)
    folder = cache / _name(task, examples, made_of)
    if not (folder / FACTS).is_file():
        try:
            with atomic_folder(folder) as unfinished:
                write_items(unfinished, map(task.encode, chunks(examples)))
        except OutputError:
            if not (folder / FACTS).is_file():  # else another process was quicker
                raise
        _prune(cache, folder)
    found = CachedItems(folder)
    (folder / FACTS).touch()
    return found


def _name(task: Task, examples: Sequence[Example], made_of: Any) -> str:
    tokenizer = _tokenizer_sha256(task.tokenizer)
    texts = examples.sha256 if isinstance(examples, Streamed) else examples_sha256(examples)
    facts = [FORMAT, task.name, list(task.labels), tokenizer, texts, made_of]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _tokenizer_sha256(tokenizer: Any) -> str:
    """sha256 of its files, but for how its last call has cut and padded texts."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_tokenizer(tokenizer, place)
        if (path := place / "tokenizer.json").is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**facts, "truncation": None, "padding": None}), encoding="utf-8")
        return folder_sha256(place)


def _prune(cache: Path, newest: Path) -> None:
    """Remove what was used least recently, until the rest and the newest keep the bound; nothing of another's."""
    ours = (facts.parent for facts in cache.glob(f"*/{FACTS}") if re.fullmatch("[0-9a-f]{64}", facts.parent.name))
    sizes = {folder: sum(path.stat().st_size for path in folder.iterdir()) for folder in ours}
    for folder in sorted(sizes, key=lambda folder: (folder / FACTS).stat().st_mtime):
        if sum(sizes.values()) <= MOST_BYTES:
            return
        if folder != newest:
            remove_folder(folder)
            del sizes[folder]
