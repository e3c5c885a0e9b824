"""Examples of sources that are larger than memory: read again for each pass over them, some thousand rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.columns import Table, examples_of, settled
from lorakit.data.example import Columns, Example, Wants, examples_sha256
from lorakit.data.spans import CODE_UNITS
from lorakit.data.streams import stamp_of, stream
from lorakit.data.tables import Row, sound
from lorakit.errors import DataError

PIECE = 4096  # rows that become examples together
MOST_NOTES = 20  # of one source; a note that lists places comes once a piece

Reading = Callable[[], Iterable[Row | DataError]]  # begins anew at each call


class Streamed(Sequence[Example]):
    """The examples of one source in their order, and the sha256 of all of them.

    The columns are those that the first rows have. Making one is the first pass, which meets whatever is wrong.

    Raises:
        DataError: a record is incomplete or there is none; or, in a later pass, the source changed.
    """

    def __init__(self, source: str, reading: Reading, columns: Columns, wants: Wants) -> None:
        self.source, self.notes = source, list[str]()
        self._reading, self._columns, self._wants = reading, columns, wants
        self._n = 0
        self.sha256 = examples_sha256(self._counted())
        if not self._n:
            raise DataError(f"{source}: no record")

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        """Reads from the first row on."""
        if isinstance(index, slice):
            return list(islice(self, *index.indices(self._n)))
        return next(islice(self, range(self._n)[index], None))

    def __iter__(self) -> Iterator[Example]:
        return (example for examples, _ in self._pieces() for example in examples)

    def _counted(self) -> Iterator[Example]:
        for examples, notes in self._pieces():
            self._n += len(examples)
            self.notes += [note for note in notes if note not in self.notes][: MOST_NOTES - len(self.notes)]
            yield from examples

    def _pieces(self) -> Iterator[tuple[list[Example], list[str]]]:
        """The examples of some thousand rows, and what is to be told of these."""
        rows, columns = sound(self._reading()), self._columns
        while some := list(islice(rows, PIECE)):
            table = Table(self.source, some, columns, [])
            examples = examples_of(table, self._wants)
            if f"{self.source}: {CODE_UNITS}" in table.notes:  # a file counts in one way, which later rows may tell
                raise DataError(f"{some[0].where}: {CODE_UNITS}, which takes the whole file: leave data.cache unset")
            yield examples, table.notes
            columns = settled(table, self._wants)


def reading_of(files: Sequence[Path]) -> Reading:
    """The rows of files that `stream` can read, one file after the other; they must stay as they are now."""
    stamps = [stamp_of(path) for path in files]

    def rows() -> Iterator[Row | DataError]:
        for path, stamp in zip(files, stamps, strict=True):
            yield from stream(path)
            if stamp_of(path) != stamp:
                raise DataError(f"{path}: changed while it was read")

    return rows
