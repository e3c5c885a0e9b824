"""Several workers of one search: nothing is trained twice or lost, whoever dies, over a trainer that takes no time."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from lorakit.app.sweep import workers
from lorakit.app.sweep.command import Asked, run_sweep
from lorakit.app.sweep.training import Sweep
from lorakit.errors import ConfigError, OutputError
from tests.app.test_sweep import FOLDER, GRID, Trainer, recipe, trainer  # noqa: F401  (fixtures)

pytestmark = pytest.mark.usefixtures("no_plots")
TRIALS, AT_ONCE = 5, 2
DATABASE = FOLDER / "optuna.db"


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "write_plots", lambda sweep: None)


def worker(recipe: Path, *words: str, **options: Any) -> Sweep:  # noqa: F811
    space = ("train.lr=1e-4..1e-1", "lora.r=4..12", *words)
    asked = {"optuna": "", "trials": TRIALS, "at_once": AT_ONCE, **options}
    return run_sweep(Asked(recipe, space, worker=True, **asked))


def dies(recipe: Path, trainer: Trainer, runs: int, **options: Any) -> None:  # noqa: F811
    trainer.dies_after = runs
    with pytest.raises(KeyboardInterrupt):
        worker(recipe, **options)
    trainer.dies_after = None


def states() -> Counter[str]:
    study = optuna.load_study(study_name=FOLDER.name, storage=f"sqlite:///{DATABASE}")
    return Counter(trial.state.name for trial in study.trials)


@pytest.mark.faults
def test_a_late_worker_finds_everything_done_and_shows_the_same(trainer: Trainer, recipe: Path) -> None:  # noqa: F811
    first = worker(recipe, seeds=(0, 1))
    assert sorted(name for names, _ in trainer.calls for name in names) == sorted(m.name for m in first.members)
    assert (len(first.members), states()) == (2 * TRIALS, {"COMPLETE": TRIALS})
    written = (FOLDER / "sweep.json").read_text()
    trainer.calls.clear()
    assert worker(recipe, seeds=(0, 1)).members == first.members and trainer.calls == []
    assert (FOLDER / "sweep.json").read_text() == written
    more = worker(recipe, seeds=(0, 1), trials=TRIALS + 1)
    assert more.members[: 2 * TRIALS] == first.members and len(trainer.calls) == 1


@pytest.mark.faults
def test_a_stopped_worker_gives_its_trials_back_at_once(trainer: Trainer, recipe: Path) -> None:  # noqa: F811
    dies(recipe, trainer, AT_ONCE + 1)
    assert states() == {"COMPLETE": AT_ONCE, "FAIL": AT_ONCE, "WAITING": AT_ONCE}
    given_back = trainer.calls[-1][0]
    found = worker(recipe)
    assert trainer.calls[AT_ONCE][0] == given_back[1:]  # in the same folders; of the two, one had come to its end
    assert {member.status for member in found.members} == {"done"}
    assert (len(found.members), states()) == (TRIALS, {"COMPLETE": TRIALS, "FAIL": AT_ONCE})


def test_trials_of_a_killed_worker_are_trained_by_another(
    trainer: Trainer,  # noqa: F811
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "GRACE_S", 1)
    monkeypatch.setattr(workers, "BEAT_S", 1)
    monkeypatch.setattr(workers, "LOOK_S", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "ask_again", lambda study, trial: None)  # as after SIGKILL
        dies(recipe, trainer, AT_ONCE + 1)
    assert states() == {"COMPLETE": AT_ONCE, "RUNNING": AT_ONCE}
    with sqlite3.connect(DATABASE) as database:  # one of them killed long ago, one before its first beat
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
        database.execute("DELETE FROM trial_heartbeats WHERE trial_id = (SELECT MAX(trial_id) FROM trials)")
    lost = trainer.calls[-1][0]
    found = worker(recipe)
    trained = Counter(name for names, _ in trainer.calls for name in names)
    assert {name for name, times in trained.items() if times > 1} == set(lost[1:])
    assert (len(found.members), states()) == (TRIALS, {"COMPLETE": TRIALS, "FAIL": AT_ONCE})
    rows = json.loads((FOLDER / "sweep.json").read_text())["members"]
    assert {row["name"] for row in rows} == set(trained) and {row["status"] for row in rows} == {"done"}


@pytest.mark.faults
def test_a_trial_that_kills_its_workers_is_given_up_and_told(
    trainer: Trainer,  # noqa: F811
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "ask_again", lambda study, trial: None)
    worker(recipe, trials=1)
    for _ in range(workers.RETRIES + 1):
        dies(recipe, trainer, 0, trials=2)
        with sqlite3.connect(DATABASE) as database:
            database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    found = worker(recipe, trials=2)
    assert [member.status for member in found.members] == ["done", "failed"]
    assert found.members[1].error == "its worker died, 4 times"
    assert states() == {"COMPLETE": 1, "FAIL": workers.RETRIES + 1}


@pytest.mark.faults
def test_a_pruner_thins_out_what_workers_train(trainer: Trainer, recipe: Path) -> None:  # noqa: F811
    found = worker(recipe, trials=9, at_once=9, sampler="random", pruner="halving")
    assert [until for _, until in trainer.calls] == [1 / 9, 1 / 3, None]
    assert states()["PRUNED"] == sum(member.status == "paused" for member in found.members) > 0


def test_of_trials_asked_at_the_same_time_the_last_ones_are_given_back() -> None:
    study = optuna.create_study()
    trials = [study.ask() for _ in range(TRIALS)]
    assert [workers._is_surplus(study, trial, 3) for trial in trials] == [False] * 3 + [True] * 2


@pytest.mark.faults
def test_another_search_is_refused(trainer: Trainer, recipe: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="--worker goes with --optuna"):
        run_sweep(Asked(recipe, GRID, worker=True))
    worker(recipe)
    with pytest.raises(ConfigError, match=r"--worker: .* another sweep: its train\.epochs was 9, now 1"):
        worker(recipe, "train.epochs=1")
    run_sweep(Asked(recipe, (*GRID, "output.dir=alone"), optuna="", trials=1))
    with pytest.raises(ConfigError, match="the study 'alone' was begun without"):
        worker(recipe, "output.dir=alone")
    Path("other").mkdir()
    for name in ("letters.txt", "recipe.toml"):
        (Path("other") / name).touch()
        with pytest.raises(OutputError, match="exists already, and holds no search"):
            worker(recipe, "output.dir=other")
    assert not [*FOLDER.glob(".*"), *Path("other").glob(".*")]  # no locks


def test_a_plain_sweep_and_workers_keep_out_of_each_others_folder(
    trainer: Trainer,  # noqa: F811
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        for other in (lambda: worker(recipe, "train.epochs=9"), lambda: run_sweep(Asked(recipe, GRID, resume=True))):
            try:
                other()
            except OutputError as err:
                refused.append(str(err))
        return trainer(*arguments, **options)

    monkeypatch.setattr("lorakit.app.sweep.training.train_recipes", meanwhile)
    run_sweep(Asked(recipe, GRID))
    assert len(refused) == 2 and all("is training there" in told for told in refused)
