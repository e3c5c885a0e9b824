"""Between any two operations on files a process may die, and each of them may fail: what was there before is whole."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakit.errors import NumericsError, OutputError, StorageError
from lorakit.runtime.files import atomic_folder, atomic_text, remove_leftovers
from lorakit.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from tests.faults.failing_disk import Disk, Killed, failing
from tests.faults.outcome import differences, outcome
from tests.runs import Sections, changed, resumed, start


def checkpoint_of(step: int) -> Checkpoint:
    """Tensors and state all of which say the step."""
    return Checkpoint(step, {"a": torch.full((7,), step), "b": torch.full((3, 3), float(step))}, {"of": step})


def assert_one_step(found: Checkpoint, steps: tuple[int, ...]) -> None:
    """All of the checkpoint is of the same step, one of these."""
    assert found.step in steps
    assert found.state["of"] == found.step
    assert all((tensor == found.step).all() for tensor in found.tensors.values())


def operations(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """How many operations on files a save over two older ones takes."""
    for step in (1, 2):
        save_checkpoint(folder, checkpoint_of(step))
    with failing(monkeypatch, Disk(folder)) as disk:
        save_checkpoint(folder, checkpoint_of(3))
    return disk.count


def test_death_between_any_two_operations_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = operations(monkeypatch, tmp_path / "count")
    assert points > 10
    found = []
    for at in range(1, points + 1):
        folder = tmp_path / str(at)
        for step in (1, 2):
            save_checkpoint(folder, checkpoint_of(step))
        with pytest.raises(Killed), failing(monkeypatch, Disk(folder, at)):
            save_checkpoint(folder, checkpoint_of(3))
        newest, notes = newest_checkpoint(folder)
        assert_one_step(newest, (2, 3))
        assert notes == []
        found.append(newest.step)
        remove_leftovers(folder, alone=True)  # and the next save goes through
        save_checkpoint(folder, checkpoint_of(4))
        assert newest_checkpoint(folder)[0].step == 4
    assert found == sorted(found)  # the new one is there from one operation on
    print(
        f"{points} deaths in a save: {found.count(2)} left the old checkpoint, {found.count(3)} the new one, 0 neither"
    )


ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_failure_of_any_operation_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    points = operations(monkeypatch, tmp_path / "count")
    refused = 0
    for at in range(1, points + 1):
        folder = tmp_path / str(at)
        for step in (1, 2):
            save_checkpoint(folder, checkpoint_of(step))
        try:
            with failing(monkeypatch, Disk(folder, at, OSError(number, os.strerror(number)))):
                save_checkpoint(folder, checkpoint_of(3))
        except StorageError as err:
            refused += 1
            words = rf"step-00000003: cannot be written: {os.strerror(number)} (92 bytes needed, "
            assert words in str(err)
            assert "bytes free there)" in str(err)
            assert err.exit_code == 5
            assert_one_step(newest_checkpoint(folder)[0], (2, 3))
            assert load_checkpoint(folder / "step-00000001").step == 1
        else:  # an old one could not be taken away, which does no harm
            assert newest_checkpoint(folder)[0].step == 3
    assert refused > points / 2


@pytest.mark.parametrize("there_before", [False, True])
def test_death_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    def write(folder: Path, text: str) -> None:
        with atomic_folder(folder / "adapter", replace=True) as place:
            atomic_text(place / "one", text)
            atomic_text(place / "two", text)

    for at in range(1, 100):
        folder = tmp_path / str(at)
        if there_before:
            write(folder, "old")
        try:
            with failing(monkeypatch, Disk(folder, at)):
                write(folder, "new")
        except Killed:
            if folder.is_dir():
                remove_leftovers(folder, alone=True)
            texts = [(folder / "adapter" / name) for name in ("one", "two")]
            written = {path.read_text() if path.is_file() else None for path in texts}
            assert written in ([{"old"}, {"new"}] if there_before else [{None}, {"new"}])
        else:
            assert at > 10
            break


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit on the size of files that this process writes, which acts as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_checkpoint_too_large_for_the_disk_is_a_storage_error(tmp_path: Path, small_files: None) -> None:
    save_checkpoint(tmp_path, checkpoint_of(1))
    large = Checkpoint(2, {"a": torch.zeros(1 << 16)}, {})
    with pytest.raises(
        StorageError, match=r"step-00000002: cannot be written: File too large \(262,144 bytes needed, "
    ):
        save_checkpoint(tmp_path, large)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_one_step(newest_checkpoint(tmp_path)[0], (1,))


def test_no_checkpoint_is_written_of_numbers_that_are_not_finite(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint_of(step))
    with pytest.raises(NumericsError, match="step 3: moment is not finite"):
        save_checkpoint(tmp_path, Checkpoint(3, {"moment": torch.tensor([1.0, float("inf")])}, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


# Flipped bits


def flips_found(folder: Path, n: int) -> int:
    """How many of n flips of a random bit, in a random file of a checkpoint, are found."""
    chance, found = random.Random(0), 0
    save_checkpoint(folder, checkpoint_of(1))
    files = sorted((folder / "step-00000001").iterdir())
    for _ in range(n):
        path = chance.choice(files)
        whole = path.read_bytes()
        harmed = bytearray(whole)
        harmed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(harmed)
        try:
            load_checkpoint(folder / "step-00000001")
        except OutputError:
            found += 1
        path.write_bytes(whole)
    return found


@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=pytest.mark.faults)])
def test_every_flipped_bit_is_found(tmp_path: Path, flips: int) -> None:
    assert flips_found(tmp_path, flips) == flips


# Whole runs


DEATHS = 8  # of this test, over as many runs as that takes


def die_and_go_on(five_steps: Sections, folder: Path, monkeypatch: pytest.MonkeyPatch, chance: random.Random) -> int:
    """Let a run die at random operations on files again and again until it ends; how often it died."""
    deaths = 0
    while True:
        if any(folder.glob("checkpoints/step-*")):
            remove_leftovers(folder, alone=True)
            remove_leftovers(folder / "checkpoints", alone=True)
            run = resumed(changed(five_steps), folder)
        else:
            run = start(changed(five_steps), folder)
        try:
            with failing(monkeypatch, Disk(folder, chance.randint(10, 90))):
                run.fit()
            return deaths
        except Killed:
            deaths += 1


def test_runs_that_die_several_times_end_as_the_one_that_did_not(
    five_steps: Sections, never_stopped: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, deaths, runs = random.Random(0), 0, 0
    while deaths < DEATHS:
        deaths += die_and_go_on(five_steps, tmp_path / str(runs), monkeypatch, chance)
        assert differences(outcome(tmp_path / str(runs)), never_stopped) == []
        runs += 1
    print(f"{deaths} deaths in {runs} runs: {runs}/{runs} end bit for bit as the one that never died")


@pytest.mark.faults
def test_run_that_dies_at_any_operation_ends_as_the_one_that_did_not(
    five_steps: Sections, never_stopped: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 1000):
        folder = tmp_path / str(at)
        run = start(changed(five_steps), folder)
        try:
            with failing(monkeypatch, Disk(folder, at)):
                run.fit()
            break
        except Killed:
            die_and_go_on(five_steps, folder, monkeypatch, random.Random(at))
        assert differences(outcome(folder), never_stopped) == [], at
    print(f"a run of {at - 1} operations on files dies at each: all end bit for bit as the one that never died")
