"""Files larger than memory, row by row from any row on, and their examples, read again for each pass over them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.columns import Table, choose_columns, examples_of
from lorakit.data.delimited import Row, read_lines
from lorakit.data.example import Columns, Example, Wants, examples_sha256
from lorakit.data.formats import ENDINGS, FORMATS
from lorakit.data.spans import CODE_UNITS
from lorakit.data.text import MOST_BAD, bad_records, encoding_note, in_order, inner_name, left_out
from lorakit.errors import DataError

PIECE = 4096  # rows that become examples together
MOST_NOTES = 20  # of one source; a note that lists places comes once a piece

Rows = Iterator[Row | DataError]
# Begins anew at each call; what the user is to be told goes into the list.
Reading = Callable[[list[str]], Iterable[Row | DataError]]
LINES = ".txt"  # each line a text
STREAMS = (*(ending for format in FORMATS.values() if format.by_rows for ending in format.endings), LINES)


def stream(
    path: Path,
    start: int = 0,
    columns: Sequence[str] | None = None,
    options: Columns = Columns(),
    notes: list[str] | None = None,
) -> Rows:
    """The rows of a file from row `start` (0 is the first) on, and in place of a row what is wrong with it.

    Parquet is entered at the row group that holds the row; text is read up to it. Of text all columns are given.

    Raises:
        DataError: no such file, no format that can be read by rows, or damage behind which no row can be found.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    ending, notes = inner_name(path).suffix.lower(), [] if notes is None else notes
    if ending not in STREAMS:
        raise DataError(f"{path}: cannot be read row by row; these can: {', '.join(STREAMS)}")
    if ending != LINES and not FORMATS[ENDINGS[ending]].is_text:
        return iter(FORMATS[ENDINGS[ending]].read(path, options, notes, start, columns))
    notes += encoding_note(path, options.encoding)
    read = read_lines if ending == LINES else FORMATS[ENDINGS[ending]].read
    return islice(read(path, options, notes), start, None)


def stamp_of(path: Path) -> str:
    """What changes with a file, in words; it must stay the same while the file is read."""
    stat = path.stat()
    return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns} ns"


class Streamed(Sequence[Example]):
    """The examples of one source in their order, and the sha256 of all of them.

    The columns are those that the first rows have. Making one is the first pass, which meets whatever is wrong.

    Raises:
        DataError: a record is incomplete or there is none; or, in a later pass, the source changed.
    """

    def __init__(self, source: str, reading: Reading, columns: Columns, wants: Wants) -> None:
        self.source, self.notes = source, list[str]()
        self._reading, self._columns, self._wants = reading, columns, wants
        self._n, self._bad, self.left_out = 0, list[DataError](), 0
        self.sha256 = examples_sha256(self._counted())
        if self.left_out and (columns.on_bad == "stop" or not self._n):
            raise bad_records(source, self._bad, self.left_out, of_all=not self._n)
        self.notes += left_out(source, self._bad, self.left_out)
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
        return (example for examples, _, _ in self._pieces() for example in examples)

    def _counted(self) -> Iterator[Example]:
        for examples, notes, bad in self._pieces():
            self._n += len(examples)
            self.left_out += len(bad)
            self._bad += bad[: MOST_BAD - len(self._bad)]
            self.notes += [note for note in notes if note not in self.notes][: MOST_NOTES - len(self.notes)]
            yield from examples

    def _pieces(self) -> Iterator[tuple[list[Example], list[str], list[DataError]]]:
        """The examples of some thousand rows, the notes on them, and what is wrong with the others."""
        of_reading: list[str] = []
        reading, columns = iter(self._reading(of_reading)), self._columns
        with closing(reading) if isinstance(reading, Generator) else nullcontext():
            while some := list(islice(reading, PIECE)):
                rows = [row for row in some if isinstance(row, Row)]
                bad = [row for row in some if isinstance(row, DataError)]
                table = Table(self.source, rows, columns, [], bad)
                examples = examples_of(table, self._wants) if rows else []
                if f"{self.source}: {CODE_UNITS}" in table.notes:  # a file counts in one way, which later rows may tell
                    raise DataError(
                        f"{rows[0].where}: {CODE_UNITS}, which needs the whole file; leave data.cache unset"
                    )
                yield examples, [*of_reading, *table.notes], in_order(bad)
                columns = choose_columns(table, self._wants) if rows else columns


def reading_of(files: Sequence[Path], options: Columns = Columns()) -> Reading:
    """The rows of files that `stream` can read, one file after the other; they must stay as they are now."""
    stamps = [stamp_of(path) for path in files]

    def rows(notes: list[str]) -> Iterator[Row | DataError]:
        for path, stamp in zip(files, stamps, strict=True):
            yield from stream(path, options=options, notes=notes)
            if stamp_of(path) != stamp:
                raise DataError(f"{path}: changed while it was read")

    return rows
