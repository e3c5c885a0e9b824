"""Sweeps: what is trained, what goes on, what is left, resumed after a kill, over a trainer that takes no time."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.app.api import PARTS
from lorakit.app.sweep import training
from lorakit.app.sweep.command import Asked, run_sweep
from lorakit.errors import ConfigError, LorakitError, NumericsError, OutputError
from lorakit.recipe import Recipe
from lorakit.training.results import Result
from tests.app.conftest import Cli
from tests.runs import changed, sections

STEPS = 90


class Trainer:
    """Stands for `train_recipes`: a score that is best at lr 1e-2 and r 8, and better the longer it trains."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], float | None]] = []
        self.dies_after: int | None = None  # runs

    def __call__(
        self, recipes: Sequence[Recipe], *, report: object, resume: str | None, until: float | None
    ) -> list[Result | LorakitError]:
        self.calls.append(([Path(str(recipe.output.dir)).name for recipe in recipes], until))
        return [self.result(recipe, until) for recipe in recipes]

    def result(self, recipe: Recipe, until: float | None) -> Result | LorakitError:
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise KeyboardInterrupt
        folder = Path(str(recipe.output.dir))
        folder.mkdir(parents=True, exist_ok=True)
        if recipe.train.lr > 1:
            return NumericsError("step 3: the loss is nan")
        value = 0.9 - abs(recipe.train.lr - 1e-2) - abs(recipe.lora.r - 8) / 100 + recipe.train.seed / 1000
        scores: dict[str, Any] = {"metric": "accuracy", "accuracy": value * (until or 1.0)}
        if until is not None:
            return Result(folder, {**scores, "step": round(STEPS * until)})
        scores |= {
            "best_step": STEPS,
            "intervals": {"accuracy": [value - 0.02, value + 0.02]},
            "seed": recipe.train.seed,
        }
        for name in (*PARTS, "adapter/README.md"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("")
        (folder / "scores.json").write_text(json.dumps(scores))
        return Result(folder, scores)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    found = Trainer()
    monkeypatch.setattr(training, "train_recipes", found)
    monkeypatch.setattr("lorakit.app.sweep.command.write_plots", lambda sweep: None)
    return found


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    raw = sections(Path("base"), Path("data"))
    Path("small.toml").write_text(changed(raw, "train.epochs=9").to_toml())
    return Path("small.toml")


FOLDER = Path("runs") / "small-sweep"
GRID = ("lora.r=4,8", "train.lr=1e-3,1e-2,1e-1")


def test_sweep_trains_every_point_and_finds_the_best(trainer: Trainer, recipe: Path) -> None:
    found = run_sweep(Asked(recipe, (*GRID, "train.epochs=2")))
    assert len(trainer.calls) == 1 and len(trainer.calls[0][0]) == 6
    assert found.best().name == "004-r8-lr0.01-seed0"
    assert [group.point["lora.r"] for group in found.ranked()][:3] == [8, 8, 4]
    rows = list(csv.DictReader((FOLDER / "sweep.csv").read_text().splitlines()))
    assert [float(row["accuracy"]) for row in rows] == sorted((float(row["accuracy"]) for row in rows), reverse=True)
    assert (rows[0]["train.lr"], rows[0]["lora.r"], rows[0]["status"]) == ("0.01", "8", "done")


def test_seeds_are_judged_by_their_mean(trainer: Trainer, recipe: Path) -> None:
    found = run_sweep(Asked(recipe, ("lora.r=8,8000",), seeds=(0, 4)))
    first = found.ranked()[0]
    assert (first.name, [member.seed for member in first.members]) == ("000-r8", [0, 4])
    one, other = (member.scores["accuracy"] for member in first.members)
    assert first.goodness("accuracy") == pytest.approx((one + other) / 2) and one < other
    assert found.best().name == "001-r8-seed4"


def test_a_point_that_fails_is_told_and_ends_nothing(trainer: Trainer, recipe: Path) -> None:
    found = run_sweep(Asked(recipe, ("train.lr=1e-2,9",)))
    assert [(member.status, member.error) for member in found.members] == [
        ("done", None),
        ("failed", "step 3: the loss is nan"),
    ]
    with pytest.raises(LorakitError, match="all 2 runs of the sweep failed; 000-lr8-seed0: step 3"):
        run_sweep(Asked(recipe, ("train.lr=8,9", "output.dir=bad")))


def test_halving_takes_the_best_third_from_rung_to_rung(trainer: Trainer, recipe: Path) -> None:
    rates = ",".join(f"{1e-3 * i:g}" for i in range(1, 10))
    found = run_sweep(Asked(recipe, (f"train.lr={rates}",), halving=3))
    assert [(len(names), until) for names, until in trainer.calls] == [(9, 1 / 9), (3, 1 / 3), (1, None)]
    assert [group.point["train.lr"] for group in found.ranked()] == sorted(
        (float(r) for r in rates.split(",")), reverse=True
    )
    assert [group.status for group in found.ranked()] == ["done"] + 8 * ["paused"]


def test_halving_of_steps_asks_for_evaluations_and_refuses_a_single_epoch(trainer: Trainer, recipe: Path) -> None:
    words = ("train.lr=1e-3,1e-2,1e-1",)
    found = run_sweep(Asked(recipe, (*words, "train.max_steps=100"), halving=3))
    assert found.recipe_of({}).train.eval_every == 34  # a third of 100, rounded up
    with pytest.raises(ConfigError, match=r"train\.epochs = 2 has no evaluation after a part of 1/3"):
        run_sweep(Asked(recipe, (*words, "train.epochs=2", "output.dir=other"), halving=3))


@pytest.mark.parametrize("halving", [None, 3])
@pytest.mark.parametrize("runs", [0, 2, 7])
def test_a_sweep_that_was_killed_goes_on_to_the_same_end(
    trainer: Trainer, recipe: Path, runs: int, halving: int | None
) -> None:
    words = (*GRID, "train.epochs=9")
    whole = run_sweep(Asked(recipe, (*words, "output.dir=whole"), halving=halving))
    trainer.dies_after = runs
    asked = Asked(recipe, words, halving=halving)
    if runs == 7 and halving is None:
        run_sweep(asked)  # it was done before the kill
    else:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(asked)
    trainer.dies_after = None
    trainer.calls.clear()
    again = run_sweep(Asked(recipe, words, halving=halving, resume=True))
    assert again.members == whole.members
    if halving is None:
        assert sum(len(names) for names, _ in trainer.calls) == max(0, 6 - runs)


@pytest.mark.parametrize("missing", ["report.html", "adapter/README.md", "loss.png", "predictions.jsonl", None])
@pytest.mark.parametrize("noted", ["waiting", "done"])
def test_what_is_missing_of_a_run_is_made_again(
    trainer: Trainer, recipe: Path, missing: str | None, noted: str
) -> None:
    whole = run_sweep(Asked(recipe, GRID))
    books = json.loads((FOLDER / "sweep.json").read_text())
    folder = FOLDER / whole.members[1].name
    if missing is None:
        (folder / ".lock").write_text("process 7 on node3")  # killed before it had ended
    else:
        (folder / missing).unlink()
    for member in books["members"]:
        member |= {"status": noted} if noted == "done" else {"status": noted, "scores": {}, "ended": None}
    (FOLDER / "sweep.json").write_text(json.dumps(books))
    trainer.calls.clear()
    again = run_sweep(Asked(recipe, GRID, resume=True))
    assert [names for names, _ in trainer.calls] == [[folder.name]]
    assert again.members == whole.members
    assert {member["status"] for member in json.loads((FOLDER / "sweep.json").read_text())["members"]} == {"done"}


def optuna_sweep(recipe: Path, **options: Any) -> Any:
    words = ("train.lr=1e-4..1.0", "lora.target_modules=[query],all-linear", "lora.r=4..12")
    return run_sweep(Asked(recipe, words, optuna="", **{"trials": 6, "at_once": 2, **options}))


def test_optuna_asks_for_several_at_once_and_is_told_what_they_gave(trainer: Trainer, recipe: Path) -> None:
    import optuna

    found = optuna_sweep(recipe, seeds=(0, 1))
    assert [len(names) for names, _ in trainer.calls] == [4, 4, 4]
    study = optuna.load_study(study_name=FOLDER.name, storage=f"sqlite:///{FOLDER / 'optuna.db'}")
    by_name = {group.name: group.goodness("accuracy") for group in found.groups}
    assert {trial.user_attrs["run"]: trial.value for trial in study.trials} == by_name
    assert len({json.dumps(dict(group.point)) for group in found.groups}) == 6
    assert {str(group.point["lora.target_modules"]) for group in found.groups} == {"['query']", "all-linear"}


def test_optuna_goes_on_after_a_kill_without_training_twice(trainer: Trainer, recipe: Path) -> None:
    trainer.dies_after = 3
    with pytest.raises(KeyboardInterrupt):
        optuna_sweep(recipe)
    trainer.dies_after = None
    first = trainer.calls[1][0]
    trainer.calls.clear()
    found = optuna_sweep(recipe, resume=True)
    assert trainer.calls[0][0] == first[1:]  # of the same two, one had ended
    assert len(found.members) == 6 and {member.status for member in found.members} == {"done"}


def test_failing_storage_is_named(trainer: Trainer, recipe: Path) -> None:
    import sqlite3

    optuna_sweep(recipe)
    with sqlite3.connect(FOLDER / "optuna.db") as database:
        database.execute("ALTER TABLE trials RENAME COLUMN state TO status")
    with pytest.raises(OutputError, match=r"--optuna: the storage fails: .* no such column"):
        optuna_sweep(recipe, resume=True)


@pytest.mark.parametrize("dies_in", ["tell", "enqueue_trial"])
def test_optuna_neither_loses_nor_doubles_a_trial_that_is_given_back_twice(
    trainer: Trainer, recipe: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    import optuna

    trainer.dies_after = 3
    with pytest.raises(KeyboardInterrupt):
        optuna_sweep(recipe)
    trainer.dies_after = None
    with monkeypatch.context() as patch:  # one of the two changes of the storage that giving back takes
        patch.setattr(optuna.Study, dies_in, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            optuna_sweep(recipe, resume=True)
    found = optuna_sweep(recipe, resume=True)
    assert [member.status for member in found.members] == 6 * ["done"]


def test_optuna_prunes_what_is_behind_and_lives_with_failures(trainer: Trainer, recipe: Path) -> None:
    words = ("train.lr=1e-3,1e-2,1e-1,9",)
    search = {"optuna": "", "trials": 9, "at_once": 9, "sampler": "random", "pruner": "halving"}
    found = run_sweep(Asked(recipe, words, **search))
    assert [until for _, until in trainer.calls] == [1 / 9, 1 / 3, None]
    assert "paused" in {member.status for member in found.members}
    assert {m.point["train.lr"]: m.status for m in found.members}[9] == "failed"
    assert found.best().point["train.lr"] == 1e-2
    with pytest.raises(ConfigError, match="--sampler tpr: did you mean 'tpe'"):
        optuna_sweep(recipe, sampler="tpr")
    with pytest.raises(ConfigError, match="--optuna and --trials N go together"):
        optuna_sweep(recipe, trials=None)


def test_resume_refuses_another_sweep_and_takes_more_points(trainer: Trainer, recipe: Path) -> None:
    run_sweep(Asked(recipe, GRID))
    with pytest.raises(OutputError, match="exists already"):
        run_sweep(Asked(recipe, GRID))
    with pytest.raises(ConfigError, match=r"another sweep: its train\.epochs was 9, now 1"):
        run_sweep(Asked(recipe, (*GRID, "train.epochs=1"), resume=True))
    trainer.calls.clear()
    more = run_sweep(Asked(recipe, ("lora.r=4,8,16", GRID[1]), resume=True))
    assert (len(more.members), len(trainer.calls[0][0])) == (9, 3)


def test_a_wrong_value_is_refused_before_anything_is_written(
    trainer: Trainer, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr='fast'|train\.lr=\"fast\""):
        run_sweep(Asked(recipe, ("train.lr=1e-3,fast",)))
    with pytest.raises(ConfigError, match=r"did you mean 'lora\.r'"):
        run_sweep(Asked(recipe, ("lora.rr=1,2",)))
    with pytest.raises(ConfigError, match="nothing to sweep over"):
        run_sweep(Asked(recipe, ("lora.r=4",)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a sweep is one process"):
        run_sweep(Asked(recipe, GRID))
    assert not Path("runs").exists() and trainer.calls == []


def test_command_prints_points_and_json_and_takes_halving_without_a_value(
    cli: Cli, trainer: Trainer, recipe: Path
) -> None:
    code, out, _ = cli("sweep", recipe, *GRID, "--seeds", "0,1", "--dry-run")
    assert (code, len(out.splitlines())) == (0, 13)
    assert out.splitlines()[0] == "000-r4-lr0.001-seed0: lora.r=4 train.lr=0.001 train.seed=0"
    assert not FOLDER.exists()
    code, out, _ = cli("sweep", recipe, "--json", "--halving", *GRID)
    assert code == 0 and trainer.calls[0][1] == pytest.approx(1 / 3)
    found = json.loads(out)
    assert found["best"]["run"] == str(FOLDER / "004-r8-lr0.01-seed0")
    assert found["points"][0]["score"] == pytest.approx(0.9)
    assert cli("sweep", recipe, "--seeds", "a", *GRID).code == 2


@pytest.mark.usefixtures("no_pictures")
def test_command_sweeps_a_real_recipe(cli: Cli, bert: Path, files: Path) -> None:
    Path("tiny.toml").write_text(changed(sections(bert, files), "train.epochs=1").to_toml())
    words = ("sweep", "tiny.toml", "lora.target_modules=[query],all-linear", "train.max_steps=2")
    code, out, err = cli(*words)
    assert code == 0, err
    folder = Path("runs") / "tiny-sweep"
    assert {"sweep.json", "sweep.csv", "sweep.png", "sweep.svg", "recipe.toml"} <= {p.name for p in folder.iterdir()}
    lines = out.splitlines()
    scores = [float(line.split()[1]) for line in lines[2:4]]
    assert scores == sorted(scores, reverse=True)
    run = next(line for line in lines if line.startswith("best: ")).removeprefix("best: ")
    assert lines[-1] == f'to use it: lorakit predict {run} "a text"'
    assert cli("predict", run, "a superb film").code == 0
    assert cli(*words, "--resume").out == out
