"""Answers to files, shard by shard: every row once, whatever happens on the way, and nothing mixed."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.data.example import Columns, Example
from lorakit.data.files import find_files
from lorakit.errors import ConfigError, DataError, Interrupted, OutputError
from lorakit.inference import batch_scoring
from lorakit.inference.batch_scoring import Answerer, Job, score_files
from lorakit.runtime.events import Note, ignore
from lorakit.runtime.files import locked, temporary_name

FILES, ROWS, SHARD = 3, 1700, 256  # the last shard of each file is shorter
KILLS = 3


class Killed(BaseException):
    """Stands for a SIGKILL."""


def lengths(examples: Sequence[Example]) -> list[dict[str, Any]]:
    return [{"text": e.text, "value": float(len(e.text))} for e in examples]


def accept(example: Example) -> None:
    if "refused" in example.text:
        raise DataError(f"{example.where}: refused")


ANSWERER = Answerer(Columns(), ["sequence_regression"], lambda: {"base": "1", "adapter": "2"}, accept, lengths)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    for i in range(FILES):
        texts = ["x" * (1 + (i * ROWS + j) % 97) for j in range(ROWS)]
        ids = range(i * ROWS, (i + 1) * ROWS)
        pq.write_table(pa.table({"id": ids, "text": texts}), tmp_path / f"in-{i}.parquet", row_group_size=500)
    return Job(find_files([str(tmp_path / "in-*.parquet")]), Columns(), keep=("id",), shard_rows=SHARD)


def answers(folder: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = pq.read_table(folder).to_pylist()  # which leaves out what begins with _
    return records


def test_every_row_has_its_answer_and_its_place(job: Job, tmp_path: Path) -> None:
    told: list[str] = []
    totals = score_files(job, ANSWERER, tmp_path / "out", lambda event: told.append(str(event)))
    assert totals == {"rows": FILES * ROWS, "answered": FILES * ROWS, "rejected": 0}
    expected = [
        {"file": str(path), "row": j + 1, "id": i * ROWS + j, "value": 1.0 + (i * ROWS + j) % 97}
        for i, path in enumerate(job.files)
        for j in range(ROWS)
    ]
    assert answers(tmp_path / "out") == expected
    success = json.loads((tmp_path / "out" / batch_scoring.SUCCESS).read_text())
    assert [list(file["shards"].values())[-1] for file in success["files"]] == FILES * [
        {"first": ROWS // SHARD * SHARD + 1, "rows": ROWS % SHARD, "rejected": 0}
    ]
    assert "text is column 'text'" in told[0]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_killed_job_ends_as_one_never_killed(
    job: Job, tmp_path: Path, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, format=format)
    score_files(job, ANSWERER, tmp_path / "straight")
    chance = random.Random(0)
    answered: list[str] = []
    whole = batch_scoring.write_answers

    def write(path: Path, records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
        left[0] -= 1
        if left[0] or chance.random() < 0.5:  # else before the publication, or while it lasts
            whole(path, records, schema)
            answered.extend(str(record["id"]) for record in records)
        if not left[0]:
            temporary_name(path).write_bytes(b"half")
            raise Killed

    left = [0]
    monkeypatch.setattr(batch_scoring, "write_answers", write)
    for _ in range(KILLS):
        left[0] = chance.randint(1, 6)
        with pytest.raises(Killed):
            score_files(job, ANSWERER, tmp_path / "out")
        assert not (tmp_path / "out" / batch_scoring.SUCCESS).exists()
    left[0] = -1
    score_files(job, ANSWERER, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert sorted(answered, key=int) == [str(i) for i in range(FILES * ROWS)]  # and none was published twice
    before = len(answered)
    score_files(job, ANSWERER, tmp_path / "out")
    assert len(answered) == before


def test_signal_ends_with_what_is_published(job: Job, tmp_path: Path) -> None:
    calls = []

    def stopped(examples: Sequence[Example]) -> list[dict[str, Any]]:
        calls.append(len(examples))
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return lengths(examples)

    with pytest.raises(Interrupted, match="SIGTERM"):
        score_files(job, replace(ANSWERER, lines=stopped), tmp_path / "out")
    assert len(answers(tmp_path / "out")) == 3 * SHARD
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert score_files(job, ANSWERER, tmp_path / "out")["answered"] == FILES * ROWS
    assert len(answers(tmp_path / "out")) == FILES * ROWS


@pytest.mark.parametrize(
    ("change", "answerer", "message"),
    [
        ({"shard_rows": 2 * SHARD}, ANSWERER, "--shard-rows changed .* was 256, now it is 512"),
        ({"keep": ()}, ANSWERER, "--keep changed"),
        ({"format": "jsonl"}, ANSWERER, "--format changed"),
        ({"columns": Columns(text="other")}, ANSWERER, "text changed .* was text, now it is other"),
        (
            {},
            replace(ANSWERER, identity=lambda: {"base": "1", "adapter": "3"}),
            "adapter changed .* was 2, now it is 3",
        ),
    ],
)
def test_other_job_is_refused(
    job: Job, tmp_path: Path, change: Mapping[str, Any], answerer: Answerer, message: str
) -> None:
    table = pq.read_table(job.files[0]).slice(0, SHARD)
    pq.write_table(table.append_column("other", table["text"]), tmp_path / "one.parquet")
    job = replace(job, files=[tmp_path / "one.parquet"])
    score_files(job, ANSWERER, tmp_path / "out")
    with pytest.raises(OutputError, match=message):
        score_files(replace(job, **change), answerer, tmp_path / "out")


def test_changed_input_is_refused(job: Job, tmp_path: Path) -> None:
    score_files(job, ANSWERER, tmp_path / "out")
    table = pq.read_table(job.files[1])
    pq.write_table(table.slice(1), job.files[1])
    with pytest.raises(OutputError, match=r"in-1.parquet changed since the folder was started"):
        score_files(job, ANSWERER, tmp_path / "out")


def test_input_that_changes_while_it_is_read_is_refused(job: Job, tmp_path: Path) -> None:
    def meddle(examples: Sequence[Example]) -> list[dict[str, Any]]:
        job.files[0].touch()
        return lengths(examples)

    with pytest.raises(DataError, match=r"in-0.parquet: changed while it was read"):
        score_files(job, replace(ANSWERER, lines=meddle), tmp_path / "out")


def test_second_process_and_strangers_folder_are_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        locked(tmp_path / "out", ignore, "answering", "--out"),
        pytest.raises(OutputError, match=r"process \d+ on .* is answering there; .* another --out"),
    ):
        score_files(job, ANSWERER, tmp_path / "out")
    for name, content in (
        ("letter.txt", ""),
        (batch_scoring.JOB, "[]"),
        (".lock", "somebody's"),
        (".tmp-letter-1", ""),
    ):
        folder = tmp_path / f"out-{name}"
        folder.mkdir()
        (folder / "letter.txt").touch()
        (folder / name).write_text(content)
        with pytest.raises(OutputError, match="contains something else"):
            score_files(job, ANSWERER, folder)
        assert (folder / name).read_text() == content and len([*folder.iterdir()]) == len({name, "letter.txt"})
    (folder / "letter.txt").unlink()
    (folder / ".lock").symlink_to(tmp_path / "letter.txt")
    with pytest.raises(OutputError, match="another program's"):
        score_files(job, ANSWERER, folder)


LINES = [
    '{"id": 1, "text": "a"}',
    '{"id": 2, "text": ""}',
    "{",
    '{"id": [4], "text": "to be refused"}',
    '{"id": 5}',
    '{"id": null, "text": "b"}',
]


def test_bad_rows_stop_the_job_or_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([LINES[0]] * 3 + LINES))
    job = Job([path], Columns(), keep=("id",), shard_rows=4)
    with pytest.raises(DataError, match=r"in.jsonl:5: column 'text' is empty"):
        score_files(
            replace(job, shard_rows=5), ANSWERER, tmp_path / "out"
        )  # nothing answered yet, so settings may change
    with pytest.raises(DataError, match=r"in.jsonl:5: column 'text' is empty"):
        score_files(job, ANSWERER, tmp_path / "out")
    totals = score_files(replace(job, skips_bad=True), ANSWERER, tmp_path / "out")  # goes on
    assert totals == {"rows": 9, "answered": 5, "rejected": 4}
    assert [(r["row"], r["id"], r["value"]) for r in answers(tmp_path / "out")] == [
        *((i, "1", 1.0) for i in (1, 2, 3, 4)),
        (9, None, 1.0),
    ]
    lines = [
        json.loads(line)
        for file in sorted((tmp_path / "out").glob("_rejected-*"))
        for line in file.read_text().splitlines()
    ]
    assert [(line["row"], line["id"]) for line in lines] == [(5, "2"), (6, None), (7, "[4]"), (8, "5")]
    reasons = ("column 'text' is empty", "not JSON", "refused", ":8: data.text = 'text' is not a column")
    assert all(reason in line["reason"] for reason, line in zip(reasons, lines, strict=True))


@pytest.mark.parametrize(
    ("patterns", "keep", "error", "message"),
    [
        (["in-*.parquet", "in-0.parquet"], (), DataError, "in-0.parquet: named twice"),
        (["non-*.parquet"], (), DataError, "non-.*: no such file"),
        (["."], (), DataError, "no such file: it is a folder; its files are '.*/[*].parquet'"),
        (["in-*.parquet"], ("idd",), DataError, "--keep idd is not a column; did you mean 'id'"),
        (["in-*.parquet", "z.parquet"], ("id",), DataError, "z.parquet: --keep id is string here, and int64 in"),
        (["z.parquet"], ("score",), ConfigError, "--keep score: answers already have a column of that name"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    job: Job, tmp_path: Path, patterns: Sequence[str], keep: Sequence[str], error: type[Exception], message: str
) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": ["b"], "score": [1]}), tmp_path / "z.parquet")
    with pytest.raises(error, match=message):
        files = find_files([str(tmp_path / pattern) for pattern in patterns])
        score_files(replace(job, files=files, keep=keep), ANSWERER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kept_class_numbers_get_their_names(tmp_path: Path) -> None:
    features = {"info": {"features": {"c": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    table = pa.table({"c": [1, 0], "text": ["a", "b"]}).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "in.parquet")
    score_files(Job([tmp_path / "in.parquet"], Columns(), keep=("c",)), ANSWERER, tmp_path / "out")
    assert [record["c"] for record in answers(tmp_path / "out")] == ["yes", "no"]


def test_rate_is_told(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_scoring, "TELL_EVERY_S", -1.0)
    told: list[str] = []
    score_files(
        job, ANSWERER, tmp_path / "out", lambda event: told.append(event.text) if isinstance(event, Note) else None
    )
    assert any(f"{2 * SHARD:,} rows answered, " in text for text in told)
