"""Four workers of one search as a user starts them, two of them killed: every trial is accounted for. Prints its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from tests.runs import changed, save_bert, sections, write_reviews

pytestmark = pytest.mark.faults
TRIALS, WORKERS, KILLED, WAIT_S = 16, 4, 2, 900


def start(recipe: Path, folder: Path, *, storage: str = "") -> subprocess.Popen[str]:
    words = (str(recipe), "train.lr=1e-4..1e-2", "lora.r=2..8", f"output.dir={folder}", "--trials", str(TRIALS))
    command = (sys.executable, "-m", "lorakit", "sweep", *words, f"--optuna={storage}", "--worker", "--at-once", "2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def study_of(folder: Path, storage: str) -> optuna.Study | None:
    try:
        return optuna.load_study(study_name=folder.name, storage=storage)
    except Exception:  # not begun yet
        return None


def test_trials_of_killed_workers_are_all_accounted_for(tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("validation", 2)):
        write_reviews(tmp_path / f"{name}.csv", 101, seed)
    recipe, folder = tmp_path / "recipe.toml", tmp_path / "search"
    raw = sections(save_bert(tmp_path / "bert"), tmp_path)
    recipe.write_text(changed(raw, "train.epochs=12", "train.checkpoint_every=10").to_toml())
    given = os.environ.get("LORAKIT_TEST_STORAGE", "")  # of a database, to try one by hand
    storage = given or f"sqlite:///{folder / 'optuna.db'}"
    began = time.monotonic()
    workers = [start(recipe, folder, storage=given) for _ in range(WORKERS)]
    try:
        for victim in workers[:KILLED]:
            while not (study := study_of(folder, storage)) or not any((folder).glob("*/checkpoints/step-*")):
                assert time.monotonic() - began < WAIT_S and all(worker.poll() is None for worker in workers[KILLED:])
                time.sleep(0.2)
            held = sum(trial.state.name == "RUNNING" for trial in study.trials)
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
            print(f"killed a worker after {time.monotonic() - began:.0f} s, {held} trials in hand of all")
        printed = [worker.communicate(timeout=WAIT_S)[0] for worker in workers[KILLED:]]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers[KILLED:]] == [0, 0], printed
    study = study_of(folder, storage)
    assert study is not None
    states = Counter(trial.state.name for trial in study.trials)
    failed = [trial for trial in study.trials if trial.state.name == "FAIL"]
    print(f"{dict(states)} in {time.monotonic() - began:.0f} s; trained again: {[t.number for t in failed]}")
    assert states["COMPLETE"] >= TRIALS and states["RUNNING"] == states["WAITING"] == 0
    again = [trial.params for trial in failed if "members" in trial.user_attrs]
    done = [trial.params for trial in study.trials if trial.state.name == "COMPLETE"]
    assert again and all(params in done for params in again)
    members = json.loads((folder / "sweep.json").read_text())["members"]
    assert len({member["name"] for member in members}) == states["COMPLETE"]
    for member in members:
        assert member["status"] == "done" and (folder / member["name"] / "scores.json").is_file()
    assert {path.parent.name for path in folder.glob("*/scores.json")} == {member["name"] for member in members}
