"""Examples to items: in memory, or once for all runs into a folder that is named by what they are made of."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorakit.data.example import Example, examples_sha256
from lorakit.data.streaming import Streamed
from lorakit.errors import DataError, OutputError
from lorakit.hashing import folder_sha256
from lorakit.inference.answer import chunks
from lorakit.runtime.files import atomic_folder, remove_folder
from lorakit.tasks.base import Item, Task

FORMAT = 1  # to be raised when a task encodes otherwise than before
MOST_BYTES = 64 * 2**30  # that a cache takes; what was not used for the longest time goes first


def encode(
    task: Task, examples: Sequence[Example], cache: Path | None, tokenizer: Any = None, made_of: Any = None
) -> Sequence[Sequence[Item]]:
    """The items of each example, from the cache where one is named; filled in some thousand examples at a time.

    `made_of` is what the items depend on besides the examples, the tokenizer and the task's name; ready for JSON.

    Raises:
        DataError: what lies in the cache is damaged.
        OutputError: it cannot be written.
    """
    if cache is None:
        return task.encode(examples)
    folder = cache / _name(task, examples, tokenizer, made_of)
    if not (folder / FACTS).is_file():
        try:
            with atomic_folder(folder) as unfinished:
                write_items(unfinished, map(task.encode, chunks(examples)))
        except OutputError:
            if not (folder / FACTS).is_file():  # else another process was quicker
                raise
        _prune(cache, folder)
    items = CachedItems(folder)
    (folder / FACTS).touch()
    return items


def _name(task: Task, examples: Sequence[Example], tokenizer: Any, made_of: Any) -> str:
    texts = examples.sha256 if isinstance(examples, Streamed) else examples_sha256(examples)
    facts = [FORMAT, task.info.name, _tokenizer_sha256(tokenizer), texts, made_of]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _tokenizer_sha256(tokenizer: Any) -> str:
    """sha256 of its files, but for how its last call has cut and padded texts."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        tokenizer.save_pretrained(place)
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


# Encoded examples on disk: flat numbers that are mapped into memory, so that what is read is all that is held.


Numbers = np.ndarray[Any, Any]

FACTS = "items.json"  # written last
PER_EXAMPLE = "examples.i4"  # how many items each example has
ABSENT = -1  # the length of a key that an item does not have


class Column(NamedTuple):
    """The values of one key and one type of number, those of all items in a row, and where each item's end."""

    key: str
    values: Numbers
    lengths: Numbers
    ends: Numbers


class FlatItems(Sequence[Item]):
    """All items in a row, each read as it is asked for, and equal to the one that was written."""

    def __init__(self, columns: Sequence[Column], n: int) -> None:
        self.columns, self.n = columns, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.n))]
        i = range(self.n)[index]
        return {
            key: values[ends[i] - lengths[i] : ends[i]].tolist()
            for key, values, lengths, ends in self.columns
            if lengths[i] != ABSENT
        }


class CachedItems(Sequence[Sequence[Item]]):
    """The items of each example, from a folder that `write_items` filled.

    Raises:
        DataError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            if any((folder / name).stat().st_size != size for name, size in facts["sizes"].items()):
                raise ValueError("a file has another size than was written")
            columns = [_column(folder, *name) for name in facts["columns"]]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise DataError(f"{folder}: damaged: {err}; delete it, and it will be made again") from err
        self.ends = np.fromfile(folder / PER_EXAMPLE, "<i4").cumsum(dtype=np.int64)
        self.flat = FlatItems(columns, int(self.ends[-1]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        items: list[Item] = self.flat[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]
        return items


def write_items(folder: Path, encoded: Iterable[Sequence[Sequence[Item]]]) -> None:
    """Fill a folder with the items of each example, which come some examples at a time; no more than these are held."""
    n = 0
    files: dict[tuple[str, str], tuple[Any, Any]] = {}
    with ExitStack() as stack:
        per_example = stack.enter_context((folder / PER_EXAMPLE).open("wb"))
        for some in encoded:
            np.array([len(items) for items in some], "<i4").tofile(per_example)
            flat = [{(key, _type(row)): row for key, row in item.items()} for items in some for item in items]
            for name in {name: None for item in flat for name in item}:
                if name not in files:
                    values, lengths = (stack.enter_context(path.open("wb")) for path in _paths(folder, *name))
                    files[name] = values, lengths
                    np.full(n, ABSENT, "<i4").tofile(lengths)  # of the items that did not have it
            for name, (values, lengths) in files.items():
                rows = [item.get(name) for item in flat]
                np.array([ABSENT if row is None else len(row) for row in rows], "<i4").tofile(lengths)
                np.array([*chain.from_iterable(row for row in rows if row)], f"<{name[1]}").tofile(values)
            n += len(flat)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / FACTS).write_text(json.dumps({"columns": list(files), "sizes": sizes}) + "\n", encoding="utf-8")


def _type(row: Sequence[Any]) -> str:
    """Ids are below 2^31; shares and targets are Python's floats."""
    return "f8" if any(isinstance(value, float) for value in row) else "i4"


def _paths(folder: Path, key: str, type: str) -> tuple[Path, Path]:
    return folder / f"{key}.{type}.values", folder / f"{key}.{type}.lengths"


def _column(folder: Path, key: str, type: str) -> Column:
    path, lengths_path = _paths(folder, key, type)
    empty = not path.stat().st_size  # no empty file can be mapped
    # a plain array over the mapping, of which it takes half the time to cut a piece
    values = np.empty(0, f"<{type}") if empty else np.asarray(np.memmap(path, f"<{type}", "r"))
    lengths = np.fromfile(lengths_path, "<i4")
    return Column(key, values, lengths, np.maximum(lengths, 0).cumsum(dtype=np.int64))
