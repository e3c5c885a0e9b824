"""Points that Optuna chooses: several trials asked together, trained together, and told together.

Optuna maximises the goodness of the score: the score itself, or its negative where less is better.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.app.sweep.points import SEED, Axis, Choice, Point, toml
from lorakit.app.sweep.training import Group, Sweep
from lorakit.errors import ConfigError, OutputError, did_you_mean, first_line
from lorakit.runtime.events import Note

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, TrialState

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "qmc": "QMCSampler",
    "gp": "GPSampler",
    "cmaes": "CmaEsSampler",
}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    # what is asked for together must not be the same point
    "tpe": {"constant_liar": True},
    # a rung is a step to Optuna; those of a sweep begin with 1
    "halving": {"min_resource": 1, "reduction_factor": 3},
    "hyperband": {"min_resource": 1},
}
FILE = "optuna.db"
BUSY_S = 60  # how long another process may hold an SQLite file
RETRIES = 3  # of a trial whose workers die
RUN, FAILED = "run", "failed"  # user attributes of a trial: the name of its run; there, where that failed
Running = dict["Trial", Group]  # the trials in hand


@dataclass(frozen=True)
class Search:
    """What is asked of Optuna."""

    trials: int
    at_once: int = 4  # trials trained together
    storage: str | None = None  # a URL of Optuna's, or an SQLite file; unset: one in the sweep's folder
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0

    def open_storage(self, folder: Path, **heartbeat: Any) -> RDBStorage:
        """The storage; `heartbeat` as Optuna's class takes it.

        Raises:
            ConfigError: it cannot be reached, or is none.
        """
        from optuna.exceptions import StorageInternalError
        from optuna.storages import RDBStorage

        url = self.storage or str(folder / FILE)
        url = url if "://" in url else f"sqlite:///{Path(url).absolute()}"
        wait = {"connect_args": {"timeout": BUSY_S}} if url.startswith("sqlite") else {}
        try:
            return RDBStorage(url, engine_kwargs=wait, **heartbeat)
        except (ImportError, ValueError, StorageInternalError) as err:
            raise ConfigError(f"--optuna: {first_line(err)}") from err


def search(sweep: Sweep, axes: Sequence[Axis], seeds: Sequence[int], asked: Search, shares: Sequence[float]) -> None:
    """Ask, train and tell until there are so many trials; the pruner looks after each share of the steps.

    Raises:
        ConfigError: Optuna is not installed, or the study is there and not to be resumed.
        OutputError: the storage fails.
    """
    with storage_errors():
        study = open_study(sweep, asked, asked.open_storage(sweep.folder), sweep.is_resumed)
        _ask_again_for_killed(study)
        while (left := asked.trials - told(study)) > 0:
            trials = [study.ask(distributions(axes)) for _ in range(min(asked.at_once, left))]
            running = {trial: _group(sweep, axes, trial, seeds) for trial in trials}
            train_trials(study, sweep, running, shares)
            best = study.best_value if any(t.state.name == "COMPLETE" for t in study.trials) else None
            sweep.report(
                Note(f"{told(study)} of {asked.trials} trials" + ("" if best is None else f", best {best:.4f}"))
            )


@contextmanager
def storage_errors() -> Iterator[None]:
    """Say in one line what a storage refuses to do."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as err:
        raise OutputError(f"--optuna: the storage fails: {first_line(err.__cause__ or err)}") from err


def train_trials(
    study: Study,
    sweep: Sweep,
    running: Running,
    shares: Sequence[float],
    note: Callable[[Running], None] = lambda running: None,
) -> None:
    """Train the trials to their ends, those left out that the pruner ends; `note` is called before any is told."""
    for rung, share in enumerate(shares, start=1):
        sweep.train(list(running.values()), until=share)
        note(running)
        for trial, group in list(running.items()):
            if (value := group.goodness_at(share)) > float("-inf"):
                trial.report(value, rung)
                if trial.should_prune():
                    study.tell(trial, state=state("PRUNED"), skip_if_finished=True)
                    del running[trial]
    sweep.train(list(running.values()))
    note(running)
    for trial, group in list(running.items()):
        _tell(study, trial, group.goodness(sweep.metric or ""))
        del running[trial]


def check_optuna(asked: Search) -> None:
    """Refuse what cannot be before anything is written.

    Raises:
        ConfigError: Optuna is not installed, or it has no such sampler or pruner.
    """
    for name, known, option in ((asked.sampler, SAMPLERS, "--sampler"), (asked.pruner, PRUNERS, "--pruner")):
        if name not in known:
            raise ConfigError(f"{option} {name}: {did_you_mean(name, known)}")
    try:
        import optuna  # noqa: F401
    except ImportError as err:
        raise ConfigError("--optuna needs the package optuna: pip install 'lorakit[sweep]'") from err


def open_study(sweep: Sweep, asked: Search, storage: RDBStorage, may_exist: bool, seed: int | None = None) -> Study:
    """The study of a sweep in its storage; a sampler without a seed gets one by how many trials there are.

    Raises:
        ConfigError: it is there and may not be, or the sampler needs a package that is not.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = sweep.folder.name
    pruner = _made(optuna.pruners, PRUNERS, asked.pruner)
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=may_exist, pruner=pruner
        )
        # begun anew by each process, so that a resumed search does not draw the same numbers again
        begin = asked.seed + len(study.trials) if seed is None else seed
        study.sampler = _made(optuna.samplers, SAMPLERS, asked.sampler, seed=begin)
    except optuna.exceptions.DuplicatedStudyError as err:
        raise ConfigError(
            f"--optuna: the study {name!r} is there already; --resume, or choose another output.dir"
        ) from err
    except ImportError as err:
        raise ConfigError(f"--optuna: {first_line(err)}") from err
    return study


def _made(module: Any, table: Mapping[str, str], name: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are still marked experimental
        return getattr(module, table[name])(**OPTIONS.get(name, {}), **options)


def distributions(axes: Sequence[Axis]) -> dict[str, Any]:
    """What Optuna calls the axes."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for axis in axes:
        if isinstance(axis, Choice):
            found[axis.key] = CategoricalDistribution([toml(value) for value in axis.values])  # it takes no lists
        elif axis.is_whole:
            found[axis.key] = IntDistribution(int(axis.low), int(axis.high))
        else:
            found[axis.key] = FloatDistribution(axis.low, axis.high, log=axis.is_log)
    return found


def point_of(axes: Sequence[Axis], trial: Trial) -> Point:
    """The point that a trial is."""
    values = {axis.key: {toml(v): v for v in axis.values} for axis in axes if isinstance(axis, Choice)}
    return {key: values[key][said] if key in values else said for key, said in trial.params.items()}


def _group(sweep: Sweep, axes: Sequence[Axis], trial: Trial, seeds: Sequence[int]) -> Group:
    (group,) = sweep.add([{**point_of(axes, trial), SEED: seed} for seed in seeds])
    trial.set_user_attr(RUN, group.name)
    return group


def _tell(study: Study, trial: Trial, value: float) -> None:
    if value > float("-inf"):
        study.tell(trial, value, skip_if_finished=True)
        return
    trial.set_user_attr(FAILED, True)
    study.tell(trial, state=state("FAIL"), skip_if_finished=True)


def is_over(trial: FrozenTrial) -> bool:
    """Whether nothing more is to come of a trial; of one whose process was killed another is asked for instead."""
    is_given_up = len(trial.system_attrs.get("retry_history", ())) >= RETRIES
    return trial.state.is_finished() and (trial.state != state("FAIL") or FAILED in trial.user_attrs or is_given_up)


def told(study: Study) -> int:
    """Trials that are over."""
    return sum(map(is_over, study.get_trials(deepcopy=False)))


def _ask_again_for_killed(study: Study) -> None:
    """What a killed process was training is asked for again: the same points, whose runs go on."""
    for trial in study.get_trials(deepcopy=False, states=(state("RUNNING"),)):
        ask_again(study, trial)


def ask_again(study: Study, trial: Trial | FrozenTrial) -> None:
    """Give a trial back, for whoever asks next; a kill in between neither loses nor doubles it."""
    waiting = study.get_trials(deepcopy=False, states=(state("WAITING"),))
    if all(other.system_attrs.get("fixed_params") != trial.params for other in waiting):
        study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
    study.tell(trial.number, state=state("FAIL"), skip_if_finished=True)


def state(name: str) -> TrialState:
    """Optuna's state of this name."""
    from optuna.trial import TrialState

    return TrialState[name]
