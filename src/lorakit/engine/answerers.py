"""What answers examples: one run, or of many adapters the one that each example names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.data.example import Columns, Example
from lorakit.digest import folder_sha256
from lorakit.engine.adapter import read_side, shipped_folder
from lorakit.engine.pool import AdapterPool, Asked, find_adapters
from lorakit.engine.predictor import check_asked, load
from lorakit.engine.side import Side
from lorakit.errors import DataError, did_you_mean
from lorakit.fingerprints import fingerprint_of
from lorakit.models import find
from lorakit.runtime.events import Report, ignore


@dataclass(frozen=True)
class Answerer:
    """Gives the lines of `Predictor.predict`, a few thousand examples at a time; each must have been checked.

    `check` raises a DataError that begins with the example's place where it cannot be answered.
    """

    columns: Columns  # that texts are in unless others are named
    tasks: Sequence[str]  # whose answers it gives
    identity: Mapping[str, str]  # what the answers depend on, of files the sha256
    check: Callable[[Example], None]
    lines: Callable[[Sequence[Example]], list[dict[str, Any]]]

    def asked(self, columns: Columns) -> Columns:
        """The columns that are named, its own for the others."""
        named = {role: name for role in ("text", "pair", "label") if (name := getattr(columns, role))}
        return replace(self.columns, **named)


def by_run(
    path: str | Path, *, allow_base_mismatch: bool = False, merge: bool = False, report: Report = ignore
) -> Answerer:
    """All answers by one run or adapter, loaded with these options; errors as `load`."""
    predictor = load(path, allow_base_mismatch=allow_base_mismatch, merge=merge, report=report)
    side = predictor.side
    return Answerer(
        replace(side.columns, label=None),
        [side.task.name],
        {**_identity({"": shipped_folder(Path(path))}, side), **({"merged": "yes"} if merge else {})},
        lambda example: check_asked(example, side, example.where),
        predictor.lines,
    )


@contextmanager
def by_label(folder: Path) -> Iterator[Answerer]:
    """Each answer by the adapter below a folder that the example has as its label; errors as `AdapterPool`."""
    folders = {name: shipped_folder(path) for name, path in find_adapters(folder).items()}
    sides = {name: read_side(path) for name, path in folders.items()}

    def check(example: Example) -> None:
        if (name := str(example.label)) not in sides:
            raise DataError(f"{example.where}: no adapter {name!r}; {did_you_mean(name, sides)}")
        check_asked(example, sides[name], example.where)

    with AdapterPool(folders) as pool:

        def lines(examples: Sequence[Example]) -> list[dict[str, Any]]:
            return pool.answer([Asked(str(example.label), replace(example, label=None)) for example in examples])

        tasks = sorted({side.task.name for side in sides.values()})
        yield Answerer(Columns(), tasks, _identity(folders, next(iter(sides.values()))), check, lines)


def _identity(folders: Mapping[str, Path], side: Side) -> dict[str, str]:
    adapters = {f"adapter {name}".strip(): folder_sha256(folder) for name, folder in folders.items()}
    if side.method == "full":
        return adapters
    base = fingerprint_of(find(side.base.name, side.base.revision))
    return {
        "base": base.weights,
        "base's config": f"{base.config}",
        "base's tokenizer": f"{base.tokenizer}",
        **adapters,
    }
