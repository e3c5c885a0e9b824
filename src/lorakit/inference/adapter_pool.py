"""Adapters by name over one base model: recently used ones in memory, the others loaded on demand in the background."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from lorakit.data.example import Example
from lorakit.errors import AdapterError, DataError, OutputError, did_you_mean
from lorakit.inference.adapter_folder import ADAPTER, shipped_folder, shipped_in
from lorakit.inference.answer import as_input
from lorakit.inference.shared_base import Resident, SharedModel, Stamp, model_of, stamp_of
from lorakit.inference.side import read_facts
from lorakit.lora.peft_files import WEIGHTS_FILE
from lorakit.runtime.files import is_leftover

LIMIT_BYTES = 2**30
CLOSE_S = 5.0  # to wait for a load in progress
SPECIAL = 32  # more than any tokenizer adds to a text, prefixes included


class Query(NamedTuple):
    """A text, and the name of the adapter to answer it."""

    adapter: str
    example: Example


class AdapterPool:
    """Adapters over one frozen base; with the same answers as separate Predictors, many in one forward.

    Ranks, targets, variants, heads and tasks may differ. Each kind of model (taggers, classifiers) has forwards of its own
    over the same weights. A background thread loads them; if it takes more than
    `load_s` seconds for a folder (on a disk that hangs), it is abandoned and another thread continues. Adapters stay in
    memory up to `limit_bytes` together, plus those that a current batch needs; the least recently used is dropped
    first. Only one thread at a time may call `answer`.

    Raises:
        AdapterError: an adapter's base model differs from the first one's, or it is damaged or too large.
        ConfigError: this machine has no such device.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        device: str = "auto",
        limit_bytes: int = LIMIT_BYTES,
        load_s: float = math.inf,
    ) -> None:
        if not folders:
            raise OutputError("no adapter to answer with")
        self.folders = dict(folders)
        self.limit_bytes, self.load_s = limit_bytes, load_s
        self.shared = SharedModel(shipped_folder(next(iter(folders.values()))), device=device)
        self._models = {model_of(self.shared.side): self.shared}  # only the loader adds to it
        self._resident: dict[str, Resident] = {}  # by name, the least recently used first
        self._uses: Counter[str] = Counter()  # by key, in current batches
        self._refused: dict[str, Stamp] = {}  # by name, the last version that could not be loaded
        self._lock = threading.RLock()  # for both, and for the contents of hosts
        self._loads: queue.SimpleQueue[tuple[str, Future[Resident]] | None] = queue.SimpleQueue()
        self._loaders = 0  # started so far; only the last one is active
        self._start_loader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._loaders += 1
        self._loads.put(None)
        self._loader.join(min(self.load_s, CLOSE_S))

    @property
    def resident(self) -> list[str]:
        """The names of adapters in memory, the least recently used first."""
        with self._lock:
            return list(self._resident)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        with self._lock:
            return sum(resident.size for resident in self._resident.values())

    def in_memory(self, name: str) -> Resident | None:
        """The version in memory, or None."""
        with self._lock:
            return self._resident.get(name)

    # Loading

    def load(self, name: str) -> Future[Resident]:
        """Load an adapter in the current version of its folder; serving continues meanwhile.

        Raises:
            DataError: no adapter has this name. The future raises errors of its folder.
        """
        self._check_name(name)
        future: Future[Resident] = Future()
        self._loads.put((name, future))
        with self._lock:
            if self._load_began is not None and time.monotonic() - self._load_began > self.load_s:
                self._start_loader()
        return future

    def _start_loader(self) -> None:
        self._load_began: float | None = None
        self._loaders += 1
        # a daemon: the process can exit even if it hangs
        self._loader = threading.Thread(target=self._work, args=(self._loaders,), name="adapter-loader", daemon=True)
        self._loader.start()

    def _work(self, loader: int) -> None:
        while loader == self._loaders and (job := self._loads.get()) is not None:
            name, future = job
            if not future.set_running_or_notify_cancel():
                continue
            self._load_began = time.monotonic()
            try:
                resident = self._load(name, loader)
            except Exception as err:  # nothing in a folder may end the thread
                future.set_exception(err)
            else:
                future.set_result(resident)
            with self._lock:
                if loader == self._loaders:
                    self._load_began = None

    def refresh(self) -> dict[str, Future[Resident]]:
        """Reload each adapter in memory whose folder has changed; until then, or if that fails, the old version serves."""
        with self._lock:
            residents = {name: resident for name, resident in self._resident.items() if name in self.folders}
        return {
            name: self.load(name)
            for name, resident in residents.items()
            if stamp_of(resident.folder) not in (resident.stamp, self._refused.get(name))  # which were tried
        }

    def rename(self, folders: Mapping[str, Path]) -> None:
        """Serve these names from now on; others are dropped once no batch uses them."""
        with self._lock:
            self.folders = dict(folders)
            for name in self._resident.keys() - self.folders.keys():
                self._drop_unused(self._resident.pop(name))
            self._refused = {name: stamp for name, stamp in self._refused.items() if name in self.folders}

    def _load(self, name: str, loader: int) -> Resident:
        with self._lock:
            before = self._resident.get(name)
        stamp: Stamp = ()
        try:
            folder = self._folder(name)
            stamp = stamp_of(folder)
            if before is not None and (before.folder, before.stamp) == (folder, stamp):
                return before
            resident = self._model(folder).build(folder)
            if resident.size > self.limit_bytes:
                raise AdapterError(
                    f"{folder}: takes {resident.size:,} bytes in memory; the limit is {self.limit_bytes:,}"
                )
        except Exception:
            self._refused[name] = stamp
            raise
        with self._lock:
            if loader != self._loaders:
                raise AdapterError(f"{folder}: not read within {self.load_s:g} s")
            resident.shared.add(resident)
            before = self._resident.pop(name, None)
            self._resident[name] = resident
            if before is not None:
                self._drop_unused(before)
            size = self.size  # the least recently used ones not in a batch go, until the limit is kept
            for other, old in list(self._resident.items()):
                if size <= self.limit_bytes:
                    break
                if other != name and not self._uses[old.key]:
                    del self._resident[other]
                    old.shared.remove(old)
                    size -= old.size
        return resident

    def _model(self, folder: Path) -> SharedModel:
        """The model that answers with an adapter of this kind, made if it is the first one."""
        key = model_of(read_facts(folder))
        if key not in self._models:
            self._models[key] = SharedModel(folder, over=self.shared)
        return self._models[key]

    def _check_name(self, name: str) -> None:
        if name not in self.folders:
            raise DataError(f"no adapter {name!r}; {did_you_mean(name, self.folders)}")

    def _folder(self, name: str) -> Path:
        self._check_name(name)
        return shipped_folder(self.folders[name])

    def _drop_unused(self, resident: Resident) -> None:
        """Drop a version without a name, unless a batch uses it."""
        if not self._uses[resident.key] and resident not in self._resident.values():
            resident.shared.remove(resident)

    @contextmanager
    def held(self, names: Iterable[str]) -> Iterator[dict[str, Resident]]:
        """Residents by name, loaded if needed, that stay in memory within this block."""
        distinct = list(dict.fromkeys(names))
        residents: dict[str, Resident] = {}
        try:
            while missing := [name for name in distinct if name not in residents]:
                with self._lock:
                    for name in missing:
                        if resident := self._resident.pop(name, None):
                            self._resident[name] = residents[name] = resident  # the most recently used now
                            self._uses[resident.key] += 1
                for future in [self.load(name) for name in missing if name not in residents]:
                    future.result(None if math.isinf(self.load_s) else self.load_s)
            yield residents
        finally:
            with self._lock:
                for resident in residents.values():
                    self._uses[resident.key] -= 1
                    self._drop_unused(resident)

    # Answering

    def answer(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """Answer each query, in order, as Predictor does; at most a few thousand, all checked."""
        places: dict[str, list[int]] = {}
        for place, (name, _) in enumerate(queries):
            places.setdefault(name, []).append(place)
        answers: dict[int, dict[str, Any]] = {}
        for names in self._waves(places):
            with self.held(names) as residents:
                by_model: dict[SharedModel, list[int]] = {}
                for name in names:
                    by_model.setdefault(residents[name].shared, []).extend(places[name])
                for model, own in by_model.items():
                    group = model.answer([(residents[queries[i].adapter], queries[i].example) for i in own])
                    answers.update(zip(own, group, strict=True))
        return [answers[place] for place in range(len(queries))]

    def is_cut(self, query: Query) -> bool:
        """Whether the text is longer than its adapter's limit."""
        with self.held([query.adapter]) as residents:
            task, most = residents[query.adapter].task, residents[query.adapter].side.max_length
            example = as_input(task, query.example)
            if len("".join((example.text, example.pair or "", *example.choices)).encode()) < most - SPECIAL:
                return False  # a token has at least one byte
            return task.cut([example], task.encode([example])).texts > 0

    def _waves(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Groups of adapters that fit into memory together, by the sizes of their files."""
        wave: list[str] = []
        size = 0
        for name in names:
            weights = self._folder(name) / WEIGHTS_FILE
            more = weights.stat().st_size if weights.is_file() else 0  # loading reports what is wrong
            if wave and size + more > self.limit_bytes:
                yield wave
                wave, size = [], 0
            wave.append(name)
            size += more
        yield wave


def find_adapters(path: Path) -> dict[str, Path]:
    """The adapters of a path, by name: the run or adapter itself, or those in its subfolders.

    Raises:
        OutputError: there is none.
    """
    if not path.is_dir():
        raise OutputError(f"{path}: no such folder")
    resolved = path.resolve()
    if shipped_in(path):
        return {(resolved.parent if resolved.name == ADAPTER else resolved).name: path}
    whole = (folder for folder in sorted(path.iterdir()) if not is_leftover(folder.name))
    adapters = {folder.name: folder for folder in whole if shipped_in(folder)}
    if not adapters:
        raise OutputError(f"{path}: not a run, an adapter or a folder of them")
    return adapters
