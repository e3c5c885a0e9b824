"""Trackers hear what metrics.jsonl says, each line once, whatever stops and resumes the run; none of them can end it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorakit.app import trackers
from lorakit.app.api import train_recipe, train_recipes
from lorakit.app.trackers import Opening
from lorakit.errors import ConfigError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Event, Note
from lorakit.training.results import Result
from tests.runs import Sections, changed, read_lines, scores_of

pytestmark = pytest.mark.usefixtures("no_pictures")
Heard = list[tuple[int, str, float]]
NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class Service:
    """What stands behind a fake: runs by id, what they heard, and how they ended."""

    heard: dict[str, Heard] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, set[str]] = field(default_factory=dict)
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)

    def open(self, id: str | None, settings: dict[str, Any]) -> str:
        id = id or f"run-{len(self.heard)}"
        self.heard.setdefault(id, [])
        self.settings.setdefault(id, {}).update(settings)
        return id


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Service:
    """Weights & Biases as far as it is used."""
    service = Service()

    def init(*, id: str | None, config: dict[str, Any], **options: Any) -> Any:
        assert options["reinit"] == "create_new"
        assert options["resume"] == (None if id is None else "allow")
        name = service.open(id, config)

        def log(values: dict[str, float]) -> None:
            step = int(values.pop("step"))
            service.heard[name] += [(step, key, value) for key, value in values.items()]

        def save(path: str, base_path: str, policy: str) -> None:
            service.files.setdefault(name, set()).add(str(Path(path).relative_to(base_path)))

        return SimpleNamespace(
            id=name,
            log=log,
            save=save,
            define_metric=lambda names, step_metric: None,
            summary=service.summary.setdefault(name, {}),
            finish=lambda exit_code: service.ended.update({name: exit_code == 0}),
        )

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return service


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Service:
    """MLflow as far as it is used."""
    service = Service()

    class MlflowClient:
        def create_run(self, experiment: str, run_name: str) -> Any:
            assert experiment == "experiment of lorakit"
            return SimpleNamespace(info=SimpleNamespace(run_id=service.open(None, {})))

        def update_run(self, id: str, status: str) -> None:
            assert id in service.heard

        def log_param(self, id: str, key: str, value: str) -> None:
            assert key not in service.settings[id], "MLflow refuses a setting that changes"
            service.settings[id][key] = value

        def log_metric(self, id: str, name: str, value: float, step: int | None = None) -> None:
            if step is None:
                service.summary.setdefault(id, {})[name] = value
            else:
                service.heard[id].append((step, name, value))

        def log_artifact(self, id: str, path: str) -> None:
            service.files.setdefault(id, set()).add(Path(path).name)

        def set_terminated(self, id: str, status: str) -> None:
            service.ended[id] = status == "FINISHED"

    module = ModuleType("mlflow")
    module.MlflowClient = MlflowClient  # type: ignore[attr-defined]
    module.set_experiment = lambda name: SimpleNamespace(  # type: ignore[attr-defined]
        experiment_id=f"experiment of {name}"
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return service


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Service:
    """trackio as far as it is used."""
    service = Service()

    def init(*, name: str, config: dict[str, Any], **options: Any) -> Any:
        service.open(name, config)

        def log(values: dict[str, float], step: int | None = None) -> None:
            if step is None:
                service.summary.setdefault(name, {}).update(values)
            else:
                service.heard[name] += [(step, key, value) for key, value in values.items()]

        print("* Trackio project initialized")
        return SimpleNamespace(log=log, finish=lambda: service.ended.update({name: True}))

    module = ModuleType("trackio")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return service


def recipe(raw: Sections, folder: Path, *names: str) -> Recipe:
    return changed(raw, f"output.dir={folder}", f"output.trackers={json.dumps(names)}")


def metrics_of(folder: Path) -> Heard:
    """The numbers of metrics.jsonl, under the names that trackers give them."""
    lines = read_lines(folder / "metrics.jsonl")
    return [
        (line["step"], f"{'validation' if 'validation' in line else 'train'}/{key}", value)
        for line in lines
        for key, value in line.get("validation", line).items()
        if key != "step"
    ]


def stop_and_go_on(made: Recipe) -> Path:
    """Train until the first evaluation, step 3, then to the end, step 5."""
    for until in (0.5, None):
        (result,) = train_recipes([made], resume="auto", until=until)
        assert isinstance(result, Result)
    return result.folder


def test_each_tracker_hears_each_line_once_in_one_run(
    wandb: Service,
    mlflow: Service,
    trackio: Service,
    five_steps: Sections,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = stop_and_go_on(recipe(five_steps, tmp_path / "run", *NAMES))
    scores = scores_of(folder)
    for service in (wandb, mlflow, trackio):
        (id,) = service.heard
        assert service.heard[id] == metrics_of(folder)
        assert service.summary[id]["best/accuracy"] == scores["accuracy"]
        assert str(service.settings[id]["train.seed"]) == str(scores["seed"])
        assert service.ended[id] is True
        if service is not trackio:  # which keeps no files
            assert service.files[id] == {"recipe.toml", "scores.json"}
    assert sorted(metrics_of(folder)) == sorted(in_tensorboard(folder))
    assert set(json.loads((folder / "trackers.json").read_text())) == set(NAMES)
    assert capsys.readouterr().out == ""


def in_tensorboard(folder: Path) -> Heard:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {tag.partition("/")[0] for tag in events.Tags()["tensors"]} == {"recipe", "scores"}
    names = events.Tags()["scalars"]
    return [(e.step, name, pytest.approx(e.value)) for name in names for e in events.Scalars(name)]  # of 32 bits


def test_runs_trained_together_have_a_tracker_run_each(
    wandb: Service, mlflow: Service, five_steps: Sections, tmp_path: Path
) -> None:
    made = recipe(five_steps, tmp_path / "run", "wandb", "mlflow")
    train_recipe(made.model_copy(update={"train": made.train.model_copy(update={"seeds": (1, 2)})}))
    for service in (wandb, mlflow):
        assert list(service.heard.values()) == [metrics_of(tmp_path / "run" / f"seed-{seed}") for seed in (1, 2)]
        assert [str(settings["train.seed"]) for settings in service.settings.values()] == ["1", "2"]


class Failing:
    """A tracker that raises in one of its methods."""

    id = "failing"

    def __init__(self, where: str, error: BaseException) -> None:
        self.where, self.error = where, error

    def _at(self, place: str) -> None:
        if place == self.where:
            raise self.error

    def open(self, opening: Opening) -> Failing:
        self._at("open")
        return self

    def log(self, step: int, values: object) -> None:
        self._at("log")

    def leave(self, scores: object, files: object) -> None:
        self._at("leave")

    def close(self, is_whole: bool) -> None:
        self._at("close")


def test_failing_trackers_are_left_out_with_one_note_each(
    monkeypatch: pytest.MonkeyPatch, five_steps: Sections, tmp_path: Path
) -> None:
    for name, where in zip(NAMES, ("open", "log", "leave", "close"), strict=True):
        error = SystemExit("no\nroute") if where == "open" else RuntimeError("no\nroute")
        monkeypatch.setitem(trackers.TRACKERS, name, ("json", Failing(where, error).open))  # type: ignore[arg-type]
    events: list[Event] = []
    result = train_recipe(recipe(five_steps, tmp_path / "run", *NAMES), report=events.append)
    notes = [event.text for event in events if isinstance(event, Note) and "continues without it" in event.text]
    kinds = ("SystemExit", *("RuntimeError",) * 3)
    assert notes == [
        f"{name}: {kind}: no; the run continues without it" for name, kind in zip(NAMES, kinds, strict=True)
    ]
    assert (result.folder / "scores.json").is_file()


def test_run_that_breaks_off_ends_as_failed(mlflow: Service, five_steps: Sections, tmp_path: Path) -> None:
    def report(event: Event) -> None:
        if getattr(event, "number", 0) == 2:
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        train_recipe(recipe(five_steps, tmp_path / "run", "mlflow"), report=report)
    assert mlflow.ended == {"run-0": False}
    assert mlflow.summary == {}


def test_tracker_that_is_not_installed_is_named_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, five_steps: Sections, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"output\.trackers: trackio is not installed; pip install 'lorakit\[trackio\]'"
    ):
        train_recipe(recipe(five_steps, tmp_path / "run", "trackio"))
    assert not (tmp_path / "run").exists()
