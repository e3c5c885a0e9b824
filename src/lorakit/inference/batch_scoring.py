"""Answers to files of any size, shard by shard. Shards are written atomically; an interrupted job continues where it stopped.

A shard holds the answers to a fixed range of rows of one input file, given by its name. A restart therefore only looks at
which shards exist, and continues after them.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.data.columnar import schema_of
from lorakit.data.columns import Table, choose_columns, examples_of
from lorakit.data.delimited import Row, sound
from lorakit.data.example import Columns, Example
from lorakit.data.streaming import stamp_of, stream
from lorakit.errors import ConfigError, DataError, OutputError, did_you_mean
from lorakit.hashing import fingerprint_of, folder_sha256
from lorakit.inference.adapter_folder import read_side, shipped_folder
from lorakit.inference.adapter_pool import AdapterPool, Query, find_adapters
from lorakit.inference.answer import check_input, chunks
from lorakit.inference.predictor import load
from lorakit.inference.side import Side
from lorakit.model_files import find
from lorakit.models import versions
from lorakit.runtime.events import Note, Report, ignore
from lorakit.runtime.files import atomic_file, atomic_json, cannot_write, locked, make_folder
from lorakit.runtime.signals import stop_on_signals
from lorakit.task_info import TASKS

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_ROWS = 16384  # held in memory at a time; a kill loses at most this many
HEAD = 100  # rows used to detect columns
TELL_EVERY_S = 10.0
JOB, SUCCESS = "_job.json", "_SUCCESS.json"  # readers of folders skip files that begin with _


@dataclass(frozen=True)
class Job:
    """The input files, and the form of the answers."""

    files: Sequence[Path]
    columns: Columns  # None: those of training, or the usual names; the label column names the adapter
    keep: Sequence[str] = ()  # columns of the input to copy to the answers
    shard_rows: int = SHARD_ROWS
    format: Format = "parquet"
    skips_bad: bool = False  # otherwise a bad row is an error


def score_files(job: Job, answerer: Answerer, out: Path, report: Report = ignore) -> dict[str, Any]:
    """Answer all rows of the files into a folder, or continue it; returns the totals.

    Raises:
        DataError: a file cannot be read, or a row cannot be answered (unless bad rows are skipped); finished shards stay.
        OutputError: the folder holds something else or another job's answers, or another process uses it.
        Interrupted: a signal stopped it; the same call continues.
    """
    scoring = _start_scoring(job, answerer, out, report)
    with _job_folder(out, scoring.settings(), report), stop_on_signals():
        return scoring.run()


@contextmanager
def _job_folder(folder: Path, settings: Mapping[str, Any], report: Report) -> Iterator[None]:
    def check(holds: set[str]) -> None:
        shown = {name for name in holds if not name.startswith(".")}
        try:
            before = json.loads((folder / JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            before = None
        if shown and not (isinstance(before, dict) and "answered by" in before):
            raise OutputError(f"--out {folder}: contains something else; choose another folder")
        for key, value in json.loads(json.dumps(settings)).items() if shown - {JOB} else ():
            if (old := before.get(key)) != value:
                if isinstance(value, dict) and isinstance(old, dict):
                    key, old, value = next(
                        (k, old.get(k), value.get(k)) for k in {**value, **old} if old.get(k) != value.get(k)
                    )
                raise OutputError(
                    f"--out {folder}: {key} changed since the folder was started: it was {old}, now it is {value}; "
                    "choose another folder"
                )

    try:
        make_folder(folder)
    except OSError as err:
        raise cannot_write(folder, err) from err
    with locked(folder, check, "answering", "--out", report):
        if not any(path.name != JOB for path in folder.glob("[!.]*")):  # no answers yet: the job may change
            atomic_json(folder / JOB, {**settings, "versions": versions()})
        yield


def _start_scoring(job: Job, answerer: Answerer, folder: Path, report: Report) -> _Scoring:
    """Detect the columns in the first rows and check every file, before anything is written."""
    encoded = {path: Columns(encoding=answerer.columns.encoding_of(path)) for path in job.files}
    heads = {
        path: [row for row in islice(stream(path, options=encoded[path]), HEAD) if isinstance(row, Row)]
        for path in job.files
    }
    path, head = next(((path, head) for path, head in heads.items() if head), (job.files[0], []))
    if not head:
        raise DataError(f"{path}: no record" + (", and none in the other files" if len(job.files) > 1 else ""))
    table = Table(str(path), head, job.columns.over(answerer.columns, path), [])
    words = table.column("text", table.options.text) is None and table.column("words", None) is not None
    columns = table.options
    if columns.choices is not None:
        columns = choose_columns(table, "text")
    elif not words:
        columns = replace(columns, text=table.required("text", columns.text))
    for note in table.notes:
        report(Note(note))
    for path, head in heads.items():
        there = [*{name: None for row in head for name in row.values}]
        if lacking := next((name for name in job.keep if head and name not in there), None):
            raise DataError(f"{path}: --keep {lacking} is not a column; {did_you_mean(lacking, there)}")
    schemas = {path: schema_of(path) for path in job.files}
    types: dict[str, Any] = {}  # of the --keep columns: text if the files have no types
    known = answer_types()
    for name in job.keep:
        if name in known:
            raise ConfigError(f"--keep {name}: answers already have a column of that name")
        by_path = {path: schema and schema.field(name).type for path, schema in schemas.items()}
        first = next(iter(by_path.values()))
        if other := next((path for path, type in by_path.items() if type != first), None):
            raise DataError(f"{other}: --keep {name} is {by_path[other]} here, and {first} in {job.files[0]}")
        types[name] = first or known["generated"]
    return _Scoring(job, answerer, folder, report, columns, encoded, answer_schema(answerer.tasks, types))


@dataclass
class _Scoring:
    """A job with known columns, of the input and of the answers."""

    job: Job
    answerer: Answerer
    folder: Path
    report: Report
    columns: Columns
    encoded: Mapping[Path, Columns]  # how the bytes of each file are read
    schema: Any
    begun: float = field(default_factory=time.monotonic)
    last_note: float = field(default_factory=time.monotonic)
    done: int = 0  # rows since the start

    def settings(self) -> dict[str, Any]:
        """What the answers depend on, under the names that messages use."""
        job = self.job
        return {
            "answered by": dict(self.answerer.identity()),
            "input": {str(path): stamp_of(path) for path in job.files},
            "columns": asdict(self.columns),
            "--keep": list(job.keep),
            "--shard-rows": job.shard_rows,
            "--format": job.format,
        }

    def run(self) -> dict[str, Any]:
        """Answer the remaining rows; returns the totals of all shards."""
        files = [self._file(number, path) for number, path in enumerate(self.job.files)]
        totals = {key: sum(file[key] for file in files) for key in ("rows", "answered", "rejected")}
        atomic_json(self.folder / SUCCESS, {**totals, "files": files})
        return totals

    def _file(self, number: int, path: Path) -> dict[str, Any]:
        """Write the missing shards of a file; returns its totals."""
        note = self.folder / f"_file-{number:05}.json"
        if note.exists():
            known: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
            return known
        size, stamp = self.job.shard_rows, stamp_of(path)
        start = next(first for first in count(0, size) if not self._shard(number, first).exists())
        choices = self.columns.choices or ()
        choices = (choices,) if isinstance(choices, str) else choices
        roles = (self.columns.text, self.columns.pair, self.columns.label, *choices, *self.job.keep)
        # all columns are read if texts are lists of words
        names = [n for n in roles if isinstance(n, str)] if self.columns.text else None
        rows = stream(path, start, names, self.encoded[path])
        for first in count(start, size):
            if not (some := list(islice(rows, size))):
                break
            records, bad = self._answered(path, first, some)
            if stamp_of(path) != stamp:
                raise DataError(f"{path}: changed while it was read")
            if bad:  # before the answers, which mark the shard as done
                write_lines(self._rejected(number, first), bad)
            write_answers(self._shard(number, first), records, self.schema)
            self._tell(len(some))
        shards: dict[str, Any] = {}
        for first in count(0, self.job.shard_rows):
            if not (shard := self._shard(number, first)).exists():
                break
            answered, rejected = count_records(shard), count_records(self._rejected(number, first))
            shards[shard.name] = {"first": first + 1, "rows": answered + rejected, "rejected": rejected}
        n, rejected = (sum(shard[key] for shard in shards.values()) for key in ("rows", "rejected"))
        totals = {"file": str(path), "rows": n, "answered": n - rejected, "rejected": rejected, "shards": shards}
        atomic_json(note, totals)
        return totals

    def _shard(self, number: int, first: int) -> Path:
        return self.folder / f"part-{number:05}-{first:012}.{self.job.format}"

    def _rejected(self, number: int, first: int) -> Path:
        return self.folder / f"_rejected-{number:05}-{first:012}.jsonl"

    def _answered(
        self, path: Path, first: int, rows: Sequence[Row | DataError]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The answers to some rows, and the rejected rows, each with its position and --keep columns."""
        text = answer_types()["generated"]
        examples = self._examples(path, rows)
        answers = chain.from_iterable(map(self.answerer.lines, chunks([e for e in examples if isinstance(e, Example)])))
        records: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for number, (row, example) in enumerate(zip(rows, examples, strict=True), start=first + 1):
            values = row.values if isinstance(row, Row) else {}
            chosen = {name: values.get(name) for name in self.job.keep}
            for name, value in chosen.items() if self.job.format == "parquet" else ():
                if self.schema.field(name).type == text and not (value is None or isinstance(value, str)):
                    chosen[name] = json.dumps(value, ensure_ascii=False, default=str)  # of a file without types
            place = {**chosen, FILE: str(path), ROW: number}
            if isinstance(example, DataError):
                bad.append({**place, "reason": str(example)})
            else:
                records.append({**next(answers), **place})
        return records, bad

    def _examples(self, path: Path, rows: Sequence[Row | DataError]) -> list[Example | DataError]:
        """An example for each row, or its error; all rows at once if there are no errors, which is faster."""
        with suppress(DataError):
            return list(self._checked(str(path), rows))
        examples: list[Example | DataError] = []
        for row in rows:
            try:
                examples += self._checked(row.where if isinstance(row, Row) else str(path), [row])
            except DataError as err:
                if not self.job.skips_bad:
                    raise
                examples.append(err)
        return examples

    def _checked(self, place: str, rows: Sequence[Row | DataError]) -> list[Example]:
        examples = examples_of(Table(place, list(sound(rows)), self.columns, []), "text")
        for example in examples:
            self.answerer.check(example)
        return examples

    def _tell(self, rows: int) -> None:
        self.done += rows
        now = time.monotonic()
        if now - self.last_note > TELL_EVERY_S:
            self.last_note = now
            self.report(Note(f"{self.done:,} rows answered, {self.done / (now - self.begun):,.0f} a second"))


# Files of answers, as Parquet or JSON lines, with the columns of each task's answers.


Format = Literal["parquet", "jsonl"]
ENDINGS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # of a file of answers
GROUP = 4096  # answers per row group of Parquet

FILE, ROW = "file", "row"  # the position of an answer's text; rows are counted from 1


def answer_types() -> dict[str, pa.DataType]:
    """Of every column that answers may have."""
    import pyarrow as pa  # late, as below: 0.1 s that answers to a few texts do not need

    text, number, whole = pa.string(), pa.float64(), pa.int64()
    entity = {"entity_group": text, "word": text, "start": whole, "end": whole, "score": number}
    return {
        FILE: pa.dictionary(pa.int32(), text),
        ROW: whole,
        "label": text,
        "score": number,
        "labels": pa.list_(text),
        "value": number,
        "entities": pa.list_(pa.struct(entity)),
        "generated": text,
        "probabilities": pa.map_(text, number),
        "embedding": pa.list_(pa.float32()),
    }


def answer_schema(tasks: Iterable[str], keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """The columns of these tasks' answers: position of the text, --keep columns, answer."""
    import pyarrow as pa

    types, keys = answer_types(), {key for task in tasks for key in TASKS[task].answer_columns}
    answer = {key: type for key, type in types.items() if key in keys}
    return pa.schema({FILE: types[FILE], ROW: types[ROW], **keep, **answer})


def write_answers(path: Path, records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Atomically write the records' columns that are in the schema, as Parquet or JSON lines by the path's suffix.

    Raises:
        DataError: a value of a --keep column has another type.
        OutputError: the file cannot be written.
    """
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pa.Table.from_pylist(records, schema)
        except (pa.ArrowException, ValueError, TypeError) as err:
            raise DataError(f"{records[0][FILE]}: a --keep column changes its type: {err}") from err
        with atomic_file(path) as unfinished:
            pq.write_table(table, unfinished)
    else:
        lines = ({name: record[name] for name in schema.names if name in record} for record in records)
        write_lines(path, lines)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Atomically write JSON lines; dates and the like as text."""
    with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)


def check_ending(path: Path) -> None:
    """Raise an OutputError if the suffix of a file of answers is not one of its formats."""
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(f"--out {path}: use one of the suffixes {', '.join(ENDINGS)}, or a folder")


def stream_answers(path: Path, answers: Iterable[Mapping[str, Any]], tasks: Iterable[str], *, pairs: bool) -> None:
    """Write answers one by one into a file that appears when complete, in the format of its suffix.

    Columns are those of all the tasks. In .csv and .tsv a cell that is neither text nor number (probabilities, entities,
    several labels) is JSON.

    Raises:
        OutputError: the file cannot be written, or its suffix is unknown.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_ending(path)
    ending = path.suffix.lower()
    texts = [(name, pa.string()) for name in ("text", "pair")[: 1 + pairs]]
    schema = pa.schema([*texts, *list(answer_schema(tasks, {}))[2:]])
    with atomic_file(path) as unfinished:
        if ending == ".parquet":
            rest = iter(answers)
            with pq.ParquetWriter(unfinished, schema) as writer:
                while some := list(islice(rest, GROUP)):
                    writer.write_table(pa.Table.from_pylist(some, schema))
            return
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            if ending in (".csv", ".tsv"):
                table = csv.writer(file, delimiter="," if ending == ".csv" else "\t", lineterminator="\n")
                table.writerow(schema.names)
                for answer in answers:
                    table.writerow([_cell(answer.get(name)) for name in schema.names])
            else:
                file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def count_records(path: Path) -> int:
    """The number of records in a file of answers; 0 if the file does not exist."""
    if not path.exists():
        return 0
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as file:
        return sum(1 for _ in file)


# Answerers: one run, or the adapter that each example names.


@dataclass(frozen=True)
class Answerer:
    """Answers a few thousand checked examples at a time, as `Predictor.predict`.

    `check` raises a DataError that begins with the example's position if it cannot be answered.
    """

    columns: Columns  # of the input, unless others are named
    tasks: Sequence[str]  # that it answers
    identity: Callable[[], Mapping[str, str]]  # what the answers depend on; files by their sha256, which takes a moment
    check: Callable[[Example], None]
    lines: Callable[[Sequence[Example]], list[dict[str, Any]]]


def by_run(
    path: str | Path,
    *,
    allow_base_mismatch: bool = False,
    merge: bool = False,
    device: str = "auto",
    report: Report = ignore,
) -> Answerer:
    """Answers by one run or adapter, loaded with these options; errors as `load`."""
    predictor = load(path, allow_base_mismatch=allow_base_mismatch, merge=merge, device=device, report=report)
    side, folders = predictor.side, {"": shipped_folder(Path(path))}
    return Answerer(
        replace(side.columns, label=None),
        [side.task.name],
        lambda: {**_identity(folders, side), **({"merged": "yes"} if merge else {})},
        lambda example: check_input(example, side, example.where),
        predictor.lines,
    )


@contextmanager
def by_label(folder: Path, *, device: str = "auto") -> Iterator[Answerer]:
    """Answers by the adapter in a folder that each example's label names; errors as `AdapterPool`."""
    folders = {name: shipped_folder(path) for name, path in find_adapters(folder).items()}
    sides = {name: read_side(path) for name, path in folders.items()}

    def check(example: Example) -> None:
        if (name := str(example.label)) not in sides:
            raise DataError(f"{example.where}: no adapter {name!r}; {did_you_mean(name, sides)}")
        check_input(example, sides[name], example.where)

    with AdapterPool(folders, device=device) as pool:

        def lines(examples: Sequence[Example]) -> list[dict[str, Any]]:
            return pool.answer([Query(str(example.label), replace(example, label=None)) for example in examples])

        tasks = sorted({side.task.name for side in sides.values()})
        first = next(iter(sides.values()))
        yield Answerer(Columns(), tasks, lambda: _identity(folders, first), check, lines)


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
