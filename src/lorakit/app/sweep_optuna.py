"""Points that Optuna chooses: several trials asked together, trained together, and told together.

Optuna maximises the goodness of the score: the score itself, or its negative where less is better.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.app.sweep import Group, Sweep
from lorakit.app.sweep_points import SEED, Axis, Choice, Point, toml
from lorakit.engine.events import Note
from lorakit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from optuna import Study, Trial

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
FAILED = "failed"  # user attribute of a trial whose run failed


@dataclass(frozen=True)
class Search:
    """What is asked of Optuna."""

    trials: int
    at_once: int = 4  # trials trained together
    storage: str | None = None  # a URL of Optuna's, or an SQLite file; unset: one in the sweep's folder
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0


def search(sweep: Sweep, axes: Sequence[Axis], seeds: Sequence[int], asked: Search, shares: Sequence[float]) -> None:
    """Ask, train and tell until there are so many trials; the pruner looks after each share of the steps.

    Raises:
        ConfigError: Optuna is not installed, or the study is there and not to be resumed.
    """
    import optuna

    study = _study(sweep, asked)
    _ask_again_for_killed(study)
    while (left := asked.trials - _told(study)) > 0:
        trials = [study.ask(_distributions(axes)) for _ in range(min(asked.at_once, left))]
        running = {trial: _group(sweep, axes, trial, seeds) for trial in trials}
        for rung, share in enumerate(shares, start=1):
            sweep.train(list(running.values()), until=share)
            for trial, group in list(running.items()):
                if (value := group.goodness_at(share)) > float("-inf"):
                    trial.report(value, rung)
                    if trial.should_prune():
                        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                        del running[trial]
        sweep.train(list(running.values()))
        for trial, group in running.items():
            _tell(study, trial, group.goodness(sweep.metric or ""))
        best = study.best_value if any(t.state.name == "COMPLETE" for t in study.trials) else None
        sweep.report(Note(f"{_told(study)} of {asked.trials} trials" + ("" if best is None else f", best {best:.4f}")))


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


def _study(sweep: Sweep, asked: Search) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = asked.storage or str(sweep.folder / FILE)
    storage = url if "://" in url else f"sqlite:///{Path(url).absolute()}"
    name = sweep.folder.name
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            load_if_exists=sweep.is_resumed,
            pruner=_made(optuna.pruners, PRUNERS, asked.pruner),
        )
        # begun anew by each process, so that a resumed search does not draw the same numbers again
        study.sampler = _made(optuna.samplers, SAMPLERS, asked.sampler, seed=asked.seed + len(study.trials))
    except optuna.exceptions.DuplicatedStudyError as err:
        raise ConfigError(
            f"--optuna: the study {name!r} is there already; --resume, or choose another output.dir"
        ) from err
    except (ImportError, optuna.exceptions.StorageInternalError) as err:
        raise ConfigError(f"--optuna: {str(err).splitlines()[0]}") from err
    return study


def _made(module: Any, table: Mapping[str, str], name: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are still marked experimental
        return getattr(module, table[name])(**OPTIONS.get(name, {}), **options)


def _distributions(axes: Sequence[Axis]) -> dict[str, Any]:
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


def _group(sweep: Sweep, axes: Sequence[Axis], trial: Trial, seeds: Sequence[int]) -> Group:
    values = {axis.key: {toml(v): v for v in axis.values} for axis in axes if isinstance(axis, Choice)}
    point: Point = {key: values[key][said] if key in values else said for key, said in trial.params.items()}
    (group,) = sweep.add([{**point, SEED: seed} for seed in seeds])
    trial.set_user_attr("run", group.name)
    return group


def _tell(study: Study, trial: Trial, value: float) -> None:
    if value > float("-inf"):
        study.tell(trial, value)
        return
    trial.set_user_attr(FAILED, True)
    study.tell(trial, state=_state("FAIL"))


def _told(study: Study) -> int:
    """Trials that are over, those of a killed process left out."""
    states = (_state("COMPLETE"), _state("PRUNED"), _state("FAIL"))
    over = study.get_trials(deepcopy=False, states=states)
    return sum(trial.state != _state("FAIL") or FAILED in trial.user_attrs for trial in over)


def _ask_again_for_killed(study: Study) -> None:
    """What a killed process was training is asked for again: the same points, whose runs go on."""
    for trial in study.get_trials(deepcopy=False, states=(_state("RUNNING"),)):
        study.tell(trial.number, state=_state("FAIL"))
        study.enqueue_trial(trial.params)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
