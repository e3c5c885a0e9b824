"""Answers to files of any size, shard by shard: each is published whole, and what was killed goes on where it stood.

A shard holds the answers to a fixed range of rows of one input file, and its name says which. So the shards that are there
are all that a restart needs to know: the next one begins behind them. Nothing else is counted or noted on the way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from lorakit.data.columnar import schema_of
from lorakit.data.columns import Table, examples_of
from lorakit.data.delimited import Row, sound
from lorakit.data.example import Columns, Example
from lorakit.data.streaming import stamp_of, stream
from lorakit.engine.answerers import Answerer
from lorakit.engine.evaluate import chunks
from lorakit.engine.shards import (
    FILE,
    ROW,
    TEXT,
    TYPES,
    Format,
    answer_schema,
    as_text,
    count_records,
    write_answers,
    write_lines,
)
from lorakit.errors import ConfigError, DataError, OutputError, did_you_mean
from lorakit.models import versions
from lorakit.runtime.events import Note, Report, ignore
from lorakit.runtime.files import atomic_text, cannot_write, locked, make_folder
from lorakit.runtime.signals import stop_on_signals

SHARD_ROWS = 16384  # so many are held at a time, and lost at most by a kill
HEAD = 100  # rows that are looked at to find columns
TELL_EVERY_S = 10.0
JOB, SUCCESS = "_job.json", "_SUCCESS.json"  # readers of folders leave files alone that begin with _


@dataclass(frozen=True)
class Job:
    """What is to be answered, and what the answers are to look like."""

    files: Sequence[Path]
    columns: Columns  # None: those of training, or the usual ones; the label names the adapter
    keep: Sequence[str] = ()  # columns of the input that stand beside the answers
    shard_rows: int = SHARD_ROWS
    format: Format = "parquet"
    skips_bad: bool = False  # else a bad row is an error
    part: tuple[int, int] = (1, 1)  # this process's share of the files: the first of one, the second of four


def score_files(job: Job, answerer: Answerer, out: Path, report: Report = ignore) -> dict[str, Any]:
    """Answer all rows of the files into a folder, or go on with it, and give the totals.

    Raises:
        DataError: a file cannot be read, or a row cannot be answered (unless bad rows are skipped); what was published stays.
        OutputError: the folder holds something else, answers by another job, or another process works there.
        Interrupted: a signal stopped it; the same call goes on.
    """
    part, parts = job.part
    if parts > len(job.files):
        raise ConfigError(f"--part {part}/{parts}: {len(job.files)} input files; parts have whole files each")
    own = [path for number, path in enumerate(job.files) if number % parts == part - 1]
    folder = out / f"part-{part}-of-{parts}" if parts > 1 else out
    scoring = _settled(replace(job, files=own), answerer, folder, report)
    with _job_folder(folder, scoring.settings(), report), stop_on_signals():
        return scoring.run()


@contextmanager
def _job_folder(folder: Path, settings: Mapping[str, Any], report: Report) -> Iterator[None]:
    def check(holds: set[str]) -> None:
        shown = {name for name in holds if not name.startswith(".")}
        before = _read_job(folder)
        if shown and before is None:
            raise OutputError(f"--out {folder}: holds something else; choose another folder")
        if before is not None and shown - {JOB}:
            _check_same(folder, before, settings)

    try:
        make_folder(folder)
    except OSError as err:
        raise cannot_write(folder, err) from err
    with locked(folder, check, "answering", "--out", report):
        if not any(path.name != JOB for path in folder.glob("[!.]*")):  # nothing is answered yet: the job may change
            atomic_text(folder / JOB, json.dumps({**settings, "versions": versions()}, indent=2) + "\n")
        yield


def _read_job(folder: Path) -> dict[str, Any] | None:
    """The job whose answers a folder holds; None where it has none."""
    try:
        found = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "answered by" in found else None


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on where the answers would not be those of one job."""
    for key, value in json.loads(json.dumps(now)).items():
        if (old := before.get(key)) != value:
            if isinstance(value, dict) and isinstance(old, dict):
                key, old, value = next(
                    (k, old.get(k), value.get(k)) for k in {**value, **old} if old.get(k) != value.get(k)
                )
            raise OutputError(
                f"--out {folder}: {key} changed since the answers there were begun: {old} then, {value} now; "
                "choose another folder"
            )


def _settled(job: Job, answerer: Answerer, folder: Path, report: Report) -> _Scoring:
    """The job with its columns found in the first rows, and every file looked at, before anything is written."""
    heads = {path: [row for row in islice(stream(path), HEAD) if isinstance(row, Row)] for path in job.files}
    path, head = next(((path, head) for path, head in heads.items() if head), (job.files[0], []))
    if not head:
        raise DataError(f"{path}: no record" + (", and none in the other files" if len(job.files) > 1 else ""))
    table = Table(str(path), head, answerer.asked(job.columns), [])
    words = table.column("text", table.asked.text) is None and table.column("words", None) is not None
    columns = table.asked if words else replace(table.asked, text=table.said("text", table.asked.text))
    for note in table.notes:
        report(Note(note))
    for path, head in heads.items():
        there = [*{name: None for row in head for name in row.values}]
        if lacking := next((name for name in job.keep if head and name not in there), None):
            raise DataError(f"{path}: --keep {lacking} is not a column; {did_you_mean(lacking, there)}")
    return _Scoring(job, answerer, folder, report, columns, answer_schema(answerer.tasks, _kept_types(job)))


def _kept_types(job: Job) -> dict[str, Any]:
    """The types of the columns that are kept: text where the files themselves have no types."""
    schemas = {path: schema_of(path) for path in job.files}
    types: dict[str, Any] = {}
    for name in job.keep:
        if name in TYPES:
            raise ConfigError(f"--keep {name}: answers have a column of that name")
        found = {path: schema and schema.field(name).type for path, schema in schemas.items()}
        types[name] = next(iter(found.values()))
        if other := next((path for path, type in found.items() if type != types[name]), None):
            raise DataError(f"{other}: --keep {name} is {found[other]} here, and {types[name]} in {job.files[0]}")
    return {name: type or TEXT for name, type in types.items()}


@dataclass
class _Scoring:
    """A job whose columns are known: those that are read, and those of the answers."""

    job: Job
    answerer: Answerer
    folder: Path
    report: Report
    columns: Columns
    schema: Any
    begun: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)
    done: int = 0  # rows, since it was begun

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, by the words in which a change of it is told."""
        job = self.job
        return {
            "answered by": dict(self.answerer.identity),
            "input": {str(path): stamp_of(path) for path in job.files},
            "columns": asdict(self.columns),
            "--keep": list(job.keep),
            "--shard-rows": job.shard_rows,
            "--format": job.format,
            "--part": "/".join(map(str, job.part)),
        }

    def run(self) -> dict[str, Any]:
        """Answer what is not answered yet; the totals are those of what lies there in the end."""
        files = [self._file(number, path) for number, path in enumerate(self.job.files)]
        totals = {key: sum(file[key] for file in files) for key in ("rows", "answered", "rejected")}
        atomic_text(self.folder / SUCCESS, json.dumps({**totals, "files": files}, indent=2) + "\n")
        return totals

    def _file(self, number: int, path: Path) -> dict[str, Any]:
        """Publish the shards of a file that are not there; its totals."""
        note = self.folder / f"_file-{number:05}.json"
        if note.exists():
            known: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
            return known
        size, stamp = self.job.shard_rows, stamp_of(path)
        start = next(first for first in count(0, size) if not self._shard(number, first).exists())
        rows = stream(path, start, self._used())
        for first in count(start, size):
            if not (some := list(islice(rows, size))):
                break
            records, bad = self._answered(path, first, some)
            if stamp_of(path) != stamp:
                raise DataError(f"{path}: changed while it was read")
            if bad:  # before the answers, with which the shard is done
                write_lines(self._rejected(number, first), bad)
            write_answers(self._shard(number, first), records, self.schema)
            self._tell(len(some))
        totals = self._totals(number, path)
        atomic_text(note, json.dumps(totals, indent=2) + "\n")
        return totals

    def _totals(self, number: int, path: Path) -> dict[str, Any]:
        """What lies there of a file that is done."""
        shards: dict[str, Any] = {}
        for first in count(0, self.job.shard_rows):
            if not (shard := self._shard(number, first)).exists():
                break
            answered, rejected = count_records(shard), count_records(self._rejected(number, first))
            shards[shard.name] = {"first": first + 1, "rows": answered + rejected, "rejected": rejected}
        rows, rejected = (sum(shard[key] for shard in shards.values()) for key in ("rows", "rejected"))
        return {"file": str(path), "rows": rows, "answered": rows - rejected, "rejected": rejected, "shards": shards}

    def _used(self) -> list[str] | None:
        """The columns to read; None, for all of them, where texts are lists of words."""
        roles = (self.columns.text, self.columns.pair, self.columns.label)
        return [name for name in (*roles, *self.job.keep) if isinstance(name, str)] if self.columns.text else None

    def _shard(self, number: int, first: int) -> Path:
        return self.folder / f"part-{number:05}-{first:012}.{self.job.format}"

    def _rejected(self, number: int, first: int) -> Path:
        return self.folder / f"_rejected-{number:05}-{first:012}.jsonl"

    def _answered(
        self, path: Path, first: int, rows: Sequence[Row | DataError]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The answers to some rows, and those that have none, each with its place and what is kept of it."""
        found = self._examples(path, rows)
        answers = chain.from_iterable(map(self.answerer.lines, chunks([e for e in found if isinstance(e, Example)])))
        records: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for number, (row, example) in enumerate(zip(rows, found, strict=True), start=first + 1):
            place = {**self._kept(row), FILE: str(path), ROW: number}
            if isinstance(example, DataError):
                bad.append({**place, "reason": str(example)})
            else:
                records.append({**next(answers), **place})
        return records, bad

    def _kept(self, row: Row | DataError) -> dict[str, Any]:
        values = row.values if isinstance(row, Row) else {}
        found = {name: values.get(name) for name in self.job.keep}
        if self.job.format == "parquet":
            return {name: as_text(v) if self.schema.field(name).type == TEXT else v for name, v in found.items()}
        return found

    def _examples(self, path: Path, rows: Sequence[Row | DataError]) -> list[Example | DataError]:
        """An example of each row, or what is wrong with it; all rows together where nothing is, which is quicker."""
        with suppress(DataError):
            return list(self._checked(str(path), rows))
        found: list[Example | DataError] = []
        for row in rows:
            try:
                found += self._checked(row.where if isinstance(row, Row) else str(path), [row])
            except DataError as err:
                if not self.job.skips_bad:
                    raise
                found.append(err)
        return found

    def _checked(self, place: str, rows: Sequence[Row | DataError]) -> list[Example]:
        examples = examples_of(Table(place, list(sound(rows)), self.columns, []), "text")
        for example in examples:
            self.answerer.check(example)
        return examples

    def _tell(self, rows: int) -> None:
        self.done += rows
        now = time.monotonic()
        if now - self.told > TELL_EVERY_S:
            self.told = now
            self.report(Note(f"{self.done:,} rows answered, {self.done / (now - self.begun):,.0f} a second"))
