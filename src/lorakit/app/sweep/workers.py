"""One search by several workers: processes, of one machine or of many, that have Optuna's storage in common.

Each asks for a few trials, trains them together and tells what they gave. A heartbeat says in the storage that its trials are in
hand; where it has stopped, whoever looks next asks for them again. The storage has the books, and the tables are made from it.
"""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.app.sweep.points import SEED, Axis
from lorakit.app.sweep.search import (
    FILE,
    RETRIES,
    RUN,
    Running,
    Search,
    ask_again,
    distributions,
    is_over,
    open_study,
    point_of,
    state,
    storage_errors,
    told,
    train_trials,
)
from lorakit.app.sweep.table import write_csv, write_plots
from lorakit.app.sweep.training import Group, Member, Sweep, member_name, read_member
from lorakit.errors import ConfigError, OutputError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Note, Report
from lorakit.runtime.files import TURN, atomic_text, cannot_write, locked, make_folder, taking_turns
from lorakit.training.run_folder import RECIPE, is_run

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import RDBStorage

BEAT_S, GRACE_S = 5, 60  # between two beats; after so long without one a worker is taken for dead
LOOK_S = 2.0  # between two looks of a worker that has nothing to do
HOW, MEMBERS, METRIC = "how", "members", "metric"  # attributes of the study, and of a trial


class SharedSweep(Sweep):
    """A sweep of which this process trains a part; the books are in the storage."""

    def save(self) -> None:
        """Leave sweep.json to the end, when it says the same whoever writes it."""

    def take(self, members: Sequence[Member]) -> None:
        """Put members of this process in; one whose worker died after its run's end is not trained again."""
        self.members += members
        self._look_at_folders()

    def restore_from(self, study: Study) -> None:
        """Take the members of every worker from the storage."""
        found: dict[str, Member] = {}
        for trial in filter(is_over, study.get_trials(deepcopy=False)):
            for member in map(read_member, trial.user_attrs.get(MEMBERS, ())):
                if trial.state == state("FAIL") and member.status in ("waiting", "paused"):
                    member.status, member.error = "failed", f"its worker died, {RETRIES + 1} times"
                found[member.name] = member
            self.metric = trial.user_attrs.get(METRIC) or self.metric
        self.members = list(found.values())

    def write(self) -> None:
        """Leave sweep.json, the table and the pictures."""
        super().save()
        self.best()
        write_csv(self, self.folder / "sweep.csv")
        write_plots(self)


class Heartbeat:
    """Says in the storage that this process's trials are in hand."""

    def __init__(self, storage: RDBStorage, study: Study) -> None:
        self.storage = storage
        self.study_id = storage.get_study_id_from_name(study.study_name)
        self.trials, self.others = set[int](), set[int]()
        self._end = Event()
        self._thread = Thread(target=self._beat_on, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def hold(self, number: int) -> None:
        """Beat for a trial from now on."""
        self.beat(number)
        self.trials.add(number)

    def beat(self, number: int) -> None:
        """Beat once."""
        self.storage.record_heartbeat(self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number))

    def meet(self, numbers: set[int]) -> None:
        """Beat once for each trial of another worker: Optuna never ends a trial whose worker died before its first beat."""
        for number in numbers - self.trials - self.others:
            self.beat(number)
        self.others |= numbers

    def _beat_on(self) -> None:
        while not self._end.wait(BEAT_S):
            for number in list(self.trials):
                with suppress(Exception):  # a storage that is busy or away; the next beat tries again
                    self.beat(number)


class Space(NamedTuple):
    """Where points are drawn, with which seeds each is trained, and after which shares of the steps the pruner looks."""

    axes: Sequence[Axis]
    seeds: Sequence[int]
    shares: Sequence[float]


def work(sweep: SharedSweep, base: Recipe, space: Space, asked: Search) -> None:
    """Take part in a search, which the first worker begins, until all of its trials are over, whoever trained them.

    Raises:
        ConfigError: the storage holds another search. OutputError: the folder holds something else.
        LorakitError: a mistake that all points share, or a signal; the trials in hand are given back.
    """
    from optuna.exceptions import ExperimentalWarning

    with _shared(sweep.folder, base, sweep.report), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # is for its own loop; Heartbeat does it here
        with storage_errors():
            study = _worked(sweep, space, asked)
        with _turn(sweep.folder):
            sweep.restore_from(study)
            sweep.write()


def _worked(sweep: SharedSweep, space: Space, asked: Search) -> Study:
    study, storage = _joined(sweep, asked)
    with Heartbeat(storage, study) as heartbeat:
        while told(study) < asked.trials:
            _fail_stale(study, heartbeat)
            if running := _claimed(study, heartbeat, sweep, space, asked):
                _train(study, sweep, running, space)
                sweep.report(Note(f"{told(study)} of {asked.trials} trials are over; {len(sweep.members)} runs here"))
            else:
                time.sleep(LOOK_S)
    return study


def _joined(sweep: Sweep, asked: Search) -> tuple[Study, RDBStorage]:
    import optuna

    # workers must not draw the same points, but for the one sampler that shares its numbers through the storage
    chance = random.Random(f"{asked.seed}/{socket.gethostname()}/{os.getpid()}/{time.time_ns()}").getrandbits(31)
    again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
    heartbeat: dict[str, Any] = {
        "heartbeat_interval": BEAT_S,
        "grace_period": GRACE_S,
        "heartbeat_stale_trial_callback": again,
    }
    with _turn(sweep.folder):
        storage = asked.open_storage(sweep.folder, **heartbeat)
        study = open_study(sweep, asked, storage, True, asked.seed if asked.sampler == "qmc" else chance)
        if HOW not in study.user_attrs:
            if study.trials:
                raise ConfigError(
                    f"--worker: the study {study.study_name!r} was begun without; choose another output.dir"
                )
            study.set_user_attr(HOW, sweep.how)
    sweep.check_how(study.user_attrs[HOW], "--worker")
    return study, storage


def _fail_stale(study: Study, heartbeat: Heartbeat) -> None:
    import optuna

    optuna.storages.fail_stale_trials(study)
    heartbeat.meet({trial.number for trial in study.get_trials(deepcopy=False, states=(state("RUNNING"),))})


def _claimed(study: Study, heartbeat: Heartbeat, sweep: SharedSweep, space: Space, asked: Search) -> Running:
    """Trials for this worker: none where the others have the rest in hand."""
    running: Running = {}
    heartbeat.trials.clear()
    for _ in range(asked.at_once):
        every = study.get_trials(deepcopy=False)
        if sum(is_over(trial) or trial.state == state("RUNNING") for trial in every) >= asked.trials:
            break
        trial = study.ask(distributions(space.axes))
        heartbeat.hold(trial.number)
        if _is_surplus(study, trial, asked.trials):
            study.tell(trial, state=state("FAIL"))
            break
        running[trial] = _group(sweep, space, trial)
    return running


def _is_surplus(study: Study, trial: Trial, most: int) -> bool:
    """Whether others have asked for the last ones at the same time."""
    before = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
    return sum(is_over(other) or not other.state.is_finished() for other in before) >= most


def _group(sweep: SharedSweep, space: Space, trial: Trial) -> Group:
    """The runs of a trial, under names that no other worker has; one that was begun by a dead worker goes on."""
    point = point_of(space.axes, trial)
    sweep.recipe_of(point)
    if begun := trial.user_attrs.get(MEMBERS):
        members = [read_member(row) for row in begun]
    else:
        named = [(member_name(trial.number, {**point, SEED: seed}), seed) for seed in space.seeds]
        members = [Member(name, point, seed) for name, seed in named]
    sweep.take(members)
    group = Group(point, members)
    trial.set_user_attr(RUN, group.name)
    trial.set_user_attr(MEMBERS, [dataclasses.asdict(member) for member in members])
    return group


def _train(study: Study, sweep: SharedSweep, running: Running, space: Space) -> None:
    def note(running: Running) -> None:
        for trial, group in running.items():
            trial.set_user_attr(MEMBERS, [dataclasses.asdict(member) for member in group.members])
            trial.set_user_attr(METRIC, sweep.metric)

    try:
        train_trials(study, sweep, running, space.shares, note)
    except BaseException:
        for trial in running:
            ask_again(study, trial)
        raise


# The folder


@contextmanager
def _shared(folder: Path, recipe: Recipe, report: Report) -> Iterator[None]:
    """Have the folder of a search in common with other workers, and with nobody else."""

    def check(holds: set[str]) -> None:
        if holds - {FILE} and not is_run(folder):
            raise OutputError(f"output.dir = {str(folder)!r} exists already, and holds no search")

    try:
        make_folder(folder)
    except OSError as err:
        raise cannot_write(folder, err) from err
    with locked(folder, check, "training", "output.dir", report, shared=True):
        with _turn(folder):
            if not (folder / RECIPE).exists():
                atomic_text(folder / RECIPE, recipe.to_toml())
        yield


def _turn(folder: Path) -> AbstractContextManager[None]:
    """Do something that two workers must not do at once."""
    return taking_turns(folder / TURN)
