"""Sweeps, resumed after kills, over a trainer that takes no time."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from lorakit.app.commands import sweep as commands
from lorakit.app.sweep import study
from lorakit.app.sweep.plan import Options, make_plan
from lorakit.app.sweep.study import PRUNERS, SAMPLERS, Sweep, run_sweep
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
        intervals = {"accuracy": [value - 0.02, value + 0.02]}
        return Result(folder, {**scores, "best_step": STEPS, "intervals": intervals, "seed": recipe.train.seed})


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    stand_in = Trainer()
    monkeypatch.setattr(study, "train_recipes", stand_in)
    return stand_in


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    raw = sections(Path("base"), Path("data"))
    Path("small.toml").write_text(changed(raw, "train.epochs=9").to_toml())
    return Path("small.toml")


FOLDER = Path("runs") / "small-sweep"
GRID = ("lora.r=4,8", "train.lr=1e-3,1e-2,1e-1")


def trained(recipe: Path, *words: str, **options: Any) -> Sweep:
    return run_sweep(make_plan(Options(recipe, words, **options)))


def test_sweep_trains_every_point_and_finds_the_best(trainer: Trainer, recipe: Path) -> None:
    sweep = trained(recipe, *GRID, "train.epochs=2")
    assert len(trainer.calls) == 1 and len(trainer.calls[0][0]) == 6
    assert sweep.best().name == "004-r8-lr0.01-seed0"
    assert [group.point["lora.r"] for group in sweep.ranked()][:3] == [8, 8, 4]
    rows = list(csv.DictReader((FOLDER / "sweep.csv").read_text().splitlines()))
    assert [float(row["accuracy"]) for row in rows] == sorted((float(row["accuracy"]) for row in rows), reverse=True)
    assert (rows[0]["train.lr"], rows[0]["lora.r"], rows[0]["status"]) == ("0.01", "8", "done")


def test_seeds_are_judged_by_their_mean(trainer: Trainer, recipe: Path) -> None:
    sweep = trained(recipe, "lora.r=8,8000", seeds=(0, 4))
    first = sweep.ranked()[0]
    assert (first.name, [member.seed for member in first.members]) == ("000-r8", [0, 4])
    one, other = (member.scores["accuracy"] for member in first.members)
    assert first.goodness("accuracy") == pytest.approx((one + other) / 2) and one < other
    assert sweep.best().name == "000-r8-seed4"


def test_a_point_that_fails_is_shown_and_ends_nothing(trainer: Trainer, recipe: Path) -> None:
    sweep = trained(recipe, "train.lr=1e-2,9")
    assert [(m.status, m.error) for m in sweep.members] == [("done", None), ("failed", "step 3: the loss is nan")]
    with pytest.raises(LorakitError, match="all 2 runs of the sweep failed; 000-lr8-seed0: step 3"):
        trained(recipe, "train.lr=8,9", "output.dir=bad")


def test_halving_takes_the_best_third_from_rung_to_rung(trainer: Trainer, recipe: Path) -> None:
    rates = [1e-3 * i for i in range(1, 10)]
    sweep = trained(recipe, f"train.lr={','.join(f'{rate:g}' for rate in rates)}", halving=3)
    assert [(len(names), until) for names, until in trainer.calls] == [(9, 1 / 9), (3, 1 / 3), (1, None)]
    assert [group.point["train.lr"] for group in sweep.ranked()] == pytest.approx(sorted(rates, reverse=True))
    assert [group.status for group in sweep.ranked()] == ["done"] + 8 * ["paused"]


def test_halving_of_steps_asks_for_evaluations_and_refuses_a_single_epoch(recipe: Path) -> None:
    words = ("train.lr=1e-3,1e-2,1e-1",)
    plan = make_plan(Options(recipe, (*words, "train.max_steps=100"), halving=3))
    assert plan.recipe_of({}, 0).train.eval_every == 34  # a third of 100, rounded up
    with pytest.raises(ConfigError, match=r"train\.epochs = 2 has no evaluation after 1/3 of the steps"):
        make_plan(Options(recipe, (*words, "train.epochs=2"), halving=3))


@pytest.mark.parametrize(("halving", "runs"), [(None, 0), (None, 2), (3, 2), (3, 6)])
def test_a_sweep_that_was_killed_goes_on_to_the_same_end(
    trainer: Trainer, recipe: Path, runs: int, halving: int | None
) -> None:
    whole = trained(recipe, *GRID, "output.dir=whole", halving=halving)
    trainer.dies_after = runs
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, *GRID, halving=halving)
    trainer.dies_after = None
    assert trained(recipe, *GRID, halving=halving, resume=True).members == whole.members
    trainer.calls.clear()
    assert trained(recipe, *GRID, halving=halving, resume=True).members == whole.members and trainer.calls == []


@pytest.mark.parametrize("written", [1, 3])
def test_halving_killed_while_it_stops_runs_stops_the_same_ones(
    trainer: Trainer, recipe: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    whole = trained(recipe, *GRID, "output.dir=whole", halving=3)
    with monkeypatch.context() as patch:
        tells = iter(range(written))
        tell = Sweep._tell
        patch.setattr(Sweep, "_tell", lambda *args: tell(*args) if next(tells, None) is not None else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trained(recipe, *GRID, halving=3)
    assert trained(recipe, *GRID, halving=3, resume=True).members == whole.members


def search(recipe: Path, *words: str, **options: Any) -> Sweep:
    space = ("train.lr=1e-4..1.0", "lora.target_modules=[query],all-linear", "lora.r=4..12")
    return trained(recipe, *space, *words, **{"optuna": True, "trials": 6, "at_once": 2, **options})


def trials() -> list[FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(FOLDER / "optuna.log")))
    return optuna.load_study(study_name=FOLDER.name, storage=storage).trials


def states() -> Counter[str]:
    return Counter(trial.state.name for trial in trials())


def test_optuna_asks_for_several_at_once_and_learns_what_they_gave(trainer: Trainer, recipe: Path) -> None:
    sweep = search(recipe, seeds=(0, 1))
    assert [len(names) for names, _ in trainer.calls] == [4, 4, 4]
    values = {trial.user_attrs["members"][0]["name"]: trial.value for trial in trials()}
    assert values == {group.members[0].name: group.goodness("accuracy") for group in sweep.groups}
    assert len({json.dumps(dict(group.point)) for group in sweep.groups}) == 6
    assert {str(group.point["lora.target_modules"]) for group in sweep.groups} == {"['query']", "all-linear"}


def test_optuna_goes_on_after_a_kill_with_the_same_points(trainer: Trainer, recipe: Path) -> None:
    trainer.dies_after = 3
    with pytest.raises(KeyboardInterrupt):
        search(recipe)
    trainer.dies_after = None
    killed = trainer.calls[1][0]
    sweep = search(recipe, resume=True)
    assert trainer.calls[2][0] == killed
    assert len(sweep.members) == 6 and states() == {"COMPLETE": 6}


def test_optuna_prunes_what_is_behind_and_trains_no_known_point_again(trainer: Trainer, recipe: Path) -> None:
    options = {"optuna": True, "trials": 12, "at_once": 9, "sampler": "random", "pruner": "halving"}
    sweep = trained(recipe, "train.lr=1e-3,1e-2,1e-1,9", **options)
    assert [until for _, until in trainer.calls[:3]] == [1 / 9, 1 / 3, None]
    assert {m.point["train.lr"]: m.status for m in sweep.members}[9] == "failed"
    assert sweep.best().point["train.lr"] == 1e-2 and states()["PRUNED"] > 0
    assert len(trials()) == 12 > len(sweep.members)
    assert (tuple(SAMPLERS), tuple(PRUNERS)) == (commands.SAMPLERS, commands.PRUNERS)


def test_damaged_books_are_named(trainer: Trainer, recipe: Path) -> None:
    search(recipe)
    (FOLDER / "optuna.log").write_text("{\n{}\n")
    with pytest.raises(OutputError, match=r"optuna\.log: damaged"):
        search(recipe, resume=True)
    (FOLDER / "optuna.log").unlink()
    with pytest.raises(ConfigError, match=r"--resume: runs/small-sweep has no optuna\.log"):
        search(recipe, resume=True)


def test_resume_refuses_another_sweep_and_takes_more_points(trainer: Trainer, recipe: Path) -> None:
    trained(recipe, *GRID)
    with pytest.raises(OutputError, match="exists already"):
        trained(recipe, *GRID)
    with pytest.raises(ConfigError, match=r"another sweep: its train\.epochs was 9, now it is 1"):
        trained(recipe, *GRID, "train.epochs=1", resume=True)
    trainer.calls.clear()
    more = trained(recipe, "lora.r=4,8,16", GRID[1], resume=True)
    assert (len(more.members), len(trainer.calls[0][0])) == (9, 3)


# The command


def test_command_prints_points_and_json_and_takes_halving_without_a_value(
    cli: Cli, trainer: Trainer, recipe: Path
) -> None:
    code, out, _ = cli("sweep", recipe, *GRID, "--seeds", "0,1", "--dry-run")
    assert (code, len(out.splitlines())) == (0, 13)
    assert out.splitlines()[0] == "000-r4-lr0.001-seed0: lora.r=4 train.lr=0.001 train.seed=0"
    assert not FOLDER.exists()
    code, out, _ = cli("sweep", recipe, "--json", "--halving", *GRID)
    assert code == 0 and trainer.calls[0][1] == pytest.approx(1 / 3)
    facts = json.loads(out)
    assert facts["best"]["run"] == str(FOLDER / "004-r8-lr0.01-seed0")
    assert facts["points"][0]["score"] == pytest.approx(0.9)


@pytest.mark.usefixtures("no_pictures")
def test_command_sweeps_a_real_recipe(cli: Cli, bert: Path, files: Path) -> None:
    Path("tiny.toml").write_text(changed(sections(bert, files), "train.epochs=1").to_toml())
    words = ("sweep", "tiny.toml", "lora.target_modules=[query],all-linear", "train.max_steps=2")
    code, out, err = cli(*words)
    assert code == 0, err
    folder = Path("runs") / "tiny-sweep"
    assert {"sweep.json", "sweep.csv", "recipe.toml"} <= {p.name for p in folder.iterdir()}
    lines = out.splitlines()
    scores = [float(line.split()[1]) for line in lines[2:4]]
    assert scores == sorted(scores, reverse=True)
    run = next(line for line in lines if line.startswith("best: ")).removeprefix("best: ")
    assert lines[-1] == f'to try it: lorakit predict {run} "a text"'
    assert cli("predict", run, "a superb film").code == 0
    assert cli(*words, "--resume").out == out
