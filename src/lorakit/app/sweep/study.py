"""A sweep and its table: Optuna's study has the books, and the trials that are asked for together are trained together.

A trial is a point with its seeds. Its user attribute `members` has the runs, from which sweep.json and the tables are made.
Optuna maximises the goodness of the score: the mean over seeds, its sign turned where less is better.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lorakit.app.api import group_folder, train_recipes, with_seed
from lorakit.app.printing import Output
from lorakit.app.report.comparison import compare_runs
from lorakit.app.sweep.plan import Plan, Point, Setting, point_of, run_name
from lorakit.errors import ConfigError, LorakitError, OutputError, first_line
from lorakit.runtime.events import Note, Report, ignore
from lorakit.runtime.files import atomic_file, atomic_text
from lorakit.tasks.metrics.bootstrap import goodness, quantiles
from lorakit.training.joint import END_ALL
from lorakit.training.results import Result
from lorakit.training.run_files import read_resamples

STATE, JOURNAL, FORMAT = "sweep.json", "optuna.log", 2
MEMBERS, METRIC, HOW = "members", "metric", "how"  # user attributes: of a trial, and of the study
# What is asked for together must not be the same point; a rung of a sweep is a step to Optuna, the first of them 1.
SAMPLERS: Mapping[str, Callable[..., BaseSampler]] = {
    "tpe": partial(optuna.samplers.TPESampler, constant_liar=True),
    "random": optuna.samplers.RandomSampler,
    "qmc": optuna.samplers.QMCSampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
}
PRUNERS: Mapping[str, Callable[..., BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": partial(optuna.pruners.SuccessiveHalvingPruner, min_resource=1, reduction_factor=3),
    "hyperband": partial(optuna.pruners.HyperbandPruner, min_resource=1),
}
WIDTH = 200  # letters of the table where there is no terminal


@dataclass
class Member:
    """One run of a sweep: a point with one seed."""

    name: str  # of its folder
    point: Point  # the seed left out
    seed: int
    status: Literal["waiting", "paused", "done", "failed"] = "waiting"
    scores: dict[str, float] = field(default_factory=dict)  # of its last evaluation; of the best one once it is done
    interval: list[float] | None = None  # 95 %, of the metric
    error: str | None = None


@dataclass
class Group:
    """The members of a trial, which differ in the seed alone."""

    members: list[Member]
    values: dict[int, float]  # goodness at each rung

    @property
    def point(self) -> Point:
        """What they have in common."""
        return self.members[0].point

    @property
    def name(self) -> str:
        """Of the first member, without its seed."""
        return re.sub(r"-seed\d+$", "", self.members[0].name)

    @property
    def status(self) -> str:
        """What is true of the whole group: it is as far as the member that is behind."""
        every = {member.status for member in self.members}
        return next(status for status in ("failed", "waiting", "paused", "done") if status in every)

    def goodness(self, metric: str | None) -> float:
        """The mean of the metric over the seeds, its sign turned where less is better; -inf where there is none."""
        if metric is None or self.status in ("failed", "waiting"):
            return -math.inf
        return statistics.fmean(goodness(member.scores, metric) for member in self.members)


class Sweep:
    """A study, and the folder of its runs."""

    def __init__(self, plan: Plan, report: Report = ignore) -> None:
        self.plan, self.folder, self.report = plan, plan.folder, report
        self.study = _open_study(plan)
        self.groups = self._read()

    # The books

    @property
    def metric(self) -> str | None:
        """The score that chooses, once one is known."""
        return self.study.user_attrs.get(METRIC)

    def _trials(self) -> list[FrozenTrial]:
        """The trials in order, without those of which nothing was begun."""
        every = self.study.get_trials(deepcopy=False)
        return [trial for trial in every if trial.state != TrialState.FAIL or MEMBERS in trial.user_attrs]

    def _read(self) -> list[Group]:
        begun = [trial for trial in self._trials() if MEMBERS in trial.user_attrs]
        return [
            Group([Member(**row) for row in trial.user_attrs[MEMBERS]], dict(trial.intermediate_values))
            for trial in begun
        ]

    @property
    def members(self) -> list[Member]:
        """The runs, in order."""
        return [member for group in self.groups for member in group.members]

    def save(self) -> None:
        """Write sweep.json, as the study is now."""
        self.groups = self._read()
        content = {"format": FORMAT, "metric": self.metric, "members": [asdict(member) for member in self.members]}
        atomic_text(self.folder / STATE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def ranked(self) -> list[Group]:
        """The groups from the best to the worst: those that are done, then those stopped on the way, later ones first."""
        order = ("waiting", "failed", "paused", "done")

        def key(group: Group) -> tuple[int, int, float]:
            rungs = 0 if group.status == "done" else len(group.values)
            return order.index(group.status), rungs, group.goodness(self.metric)

        return sorted(self.groups, key=key, reverse=True)

    def best(self) -> Member:
        """The run with the best score in the best group.

        Raises:
            LorakitError: every member failed; the error of the first.
        """
        first, metric = self.ranked()[0], self.metric
        if metric is None or first.status != "done":
            failed = next(member for member in self.members if member.status == "failed")
            raise LorakitError(f"all {len(self.members)} runs of the sweep failed; {failed.name}: {failed.error}")
        return max(first.members, key=lambda member: goodness(member.scores, metric))

    # Training

    def run(self) -> None:
        """Train until every trial is over."""
        most = self.plan.options.trials
        while trials := self._claim():
            for rung, share in enumerate(self.plan.shares, start=1):
                self._train({trial: group for trial, group in trials.items() if rung not in group.values}, share)
                self._thin_out(trials, rung, share)
            self._train(trials)
            for trial, group in trials.items():
                self._tell(trial, group.goodness(self.metric))
            if most is not None:
                over = sum(trial.state.is_finished() for trial in self._trials())
                self.report(Note(f"{over} of {most} trials are done"))
        self.save()

    def _claim(self) -> dict[Trial, Group]:
        """Trials to train together: what a killed process left, and all points that are given, or some of Optuna's."""
        options, plan, claimed = self.plan.options, self.plan, dict[Trial, Group]()

        def begin(trial: Trial, setting: Setting | None = None) -> None:
            frozen = self.study.get_trials(deepcopy=False)[trial.number]
            if setting is not None:
                point = setting.point
                members = [Member(run_name(trial.number, point, seed), point, seed) for seed in setting.seeds]
                trial.set_user_attr(MEMBERS, list(map(asdict, members)))
            members = [Member(**row) for row in trial.user_attrs[MEMBERS]]
            claimed[trial] = Group(members, dict(frozen.intermediate_values))

        for left in self._trials():
            if left.state == TrialState.RUNNING and MEMBERS in left.user_attrs:
                begin(Trial(self.study, left._trial_id))
            elif left.state == TrialState.RUNNING:
                self.study.tell(left.number, state=TrialState.FAIL)
        if options.trials is None:
            begun = [Setting(group.point, [member.seed for member in group.members]) for group in self._read()]
            for setting in (setting for setting in plan.settings if setting not in begun):
                begin(self.study.ask(), setting)
            return claimed
        space = {axis.key: axis.distribution for axis in plan.axes}
        while len(claimed) < options.at_once:
            every = self._trials()
            if len(every) >= options.trials:
                break
            trial = self.study.ask(space)
            same = [other for other in every if other.state == TrialState.COMPLETE and other.params == trial.params]
            if same:  # its score is known
                self._tell(trial, float(same[0].value or 0.0))
                continue
            begin(trial, Setting(point_of(plan.axes, trial), list(plan.seeds)))
        return claimed

    def _tell(self, trial: Trial, value: float, state: TrialState | None = None) -> None:
        if state is None and not math.isfinite(value):
            state = TrialState.FAIL
        self.study.tell(trial, None if state else value, state, skip_if_finished=True)

    def _train(self, trials: Mapping[Trial, Group], until: float | None = None) -> None:
        """Train the runs to the end, or to their first evaluation after a share of the steps, and note what they gave."""
        members = [m for group in trials.values() for m in group.members if m.status in ("waiting", "paused")]
        if not members:
            return
        folders = [self.folder / member.name for member in members]
        recipes = [
            with_seed(self.plan.recipe_of(member.point, member.seed), member.seed, folder)
            for member, folder in zip(members, folders, strict=True)
        ]
        self.save()
        results: Sequence[Result | LorakitError]
        try:
            resume = "auto" if any(folder.is_dir() for folder in folders) else None
            results = train_recipes(recipes, report=self.report, resume=resume, until=until)
        except LorakitError as err:  # of the last few alike, where others have got by
            if err.exit_code in END_ALL or all(member.status in ("waiting", "failed") for member in self.members):
                raise
            results = [err] * len(members)
        for member, result in zip(members, results, strict=True):
            if isinstance(result, LorakitError):
                member.status, member.error = "failed", str(result)
                self.report(Note(f"{member.name} failed: {result}"))
                continue
            scores, metric = result.scores, str(result.scores["metric"])
            if self.metric is None:
                self.study.set_user_attr(METRIC, metric)
            member.status = "done" if "best_step" in scores else "paused"
            member.scores = {name: value for name, value in scores.items() if isinstance(value, (float, int))}
            member.interval = scores.get("intervals", {}).get(metric)
        for trial, group in trials.items():
            trial.set_user_attr(MEMBERS, list(map(asdict, group.members)))
        self.save()

    def _thin_out(self, trials: dict[Trial, Group], rung: int, share: float) -> None:
        """Report what the trials are worth at a rung, and take those out that are not to go on.

        --halving goes on with the best 1 / eta of all (Karnin et al. 2013, ICML; Jamieson & Talwalkar 2016,
        arXiv:1502.07943), with the learning rate of a run's full length, so that the last ones are runs like any other.
        """
        for trial, group in trials.items():
            if rung not in group.values and math.isfinite(value := group.goodness(self.metric)):
                trial.report(value, rung)
                group.values[rung] = value
        eta, alive = self.plan.options.halving, self._trials()
        for r in range(1, rung + 1) if eta else ():  # from the first rung on: before a kill some may have been pruned
            there = sorted((t for t in alive if r in t.intermediate_values), key=lambda t: -t.intermediate_values[r])
            alive = there[: max(1, len(alive) // (eta or 1))]
        numbers = [trial.number for trial in alive]
        for trial, group in list(trials.items()):
            is_pruned = trial.number not in numbers if eta else rung in group.values and trial.should_prune()
            if group.status == "failed" or is_pruned:
                self._tell(trial, -math.inf, None if group.status == "failed" else TrialState.PRUNED)
                del trials[trial]
        if eta and trials:
            names = ", ".join(group.name for group in sorted(trials.values(), key=lambda group: -group.values[rung]))
            self.report(Note(f"after {share:.0%} of the steps {len(trials)} continue: {names}"))


def run_sweep(plan: Plan, report: Report = ignore) -> Sweep:
    """Train every point and leave sweep.json and sweep.csv beside the runs.

    Raises:
        LorakitError: a mistake that all points share; an Interrupted after a signal.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    resume = "auto" if plan.options.resume else None
    with group_folder(plan.folder, plan.base, resume, report), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sweep = Sweep(plan, report)
        sweep.run()
        sweep.best()
        write_csv(sweep)
    return sweep


def _open_study(plan: Plan) -> optuna.Study:
    """The study, begun or continued; its books are a file in the folder.

    Raises:
        ConfigError: it is of another sweep, or a sampler needs a package that is not there.
        OutputError: the file is damaged.
    """
    options, path = plan.options, plan.folder / JOURNAL
    Path(f"{path}.lock").unlink(missing_ok=True)  # of a killed process; the folder is locked for this one
    try:
        storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
    except (ValueError, KeyError) as err:
        raise OutputError(f"{path}: damaged: {first_line(err)}") from err
    study = optuna.create_study(storage=storage, study_name=plan.folder.name, direction="maximize", load_if_exists=True)
    sampler = options.sampler if options.optuna else "random"
    # a resumed search draws other numbers; but those of qmc are one sequence in the storage
    seed = options.draw_seed if sampler == "qmc" else options.draw_seed + len(study.trials)
    try:
        study.sampler, study.pruner = SAMPLERS[sampler](seed=seed), PRUNERS[options.pruner]()
    except ImportError as err:
        raise ConfigError(f"--sampler {sampler}: {first_line(err)}") from err
    sections = plan.base.model_dump(mode="json", exclude={"output"})
    keys = {f"{section}.{key}": value for section, table in sections.items() for key, value in table.items()}
    how = {**keys, "seeds": list(plan.seeds), "rungs": list(plan.shares)}
    if not (before := study.user_attrs.get(HOW, {})):
        if (plan.folder / STATE).exists():
            raise ConfigError(
                f"--resume: {plan.folder} has no {JOURNAL}, so there is no sweep to continue; choose another output.dir"
            )
        study.set_user_attr(HOW, how)
    for key in {**before, **how} if before else ():
        if before.get(key) != how.get(key):
            was, now = before.get(key), how.get(key)
            raise ConfigError(
                f"--resume: {plan.folder} contains another sweep: its {key} was {was!r}, now it is {now!r}"
            )
    return study


# What a sweep shows


def show_sweep(sweep: Sweep) -> Output:
    """The best run, and every point, best first."""
    facts = _facts(sweep)
    return Output(_lines(sweep, facts), facts)


def _facts(sweep: Sweep) -> dict[str, Any]:
    best, metric = sweep.best(), str(sweep.metric)
    points = []
    for group in sweep.ranked():
        values = [member.scores.get(metric) for member in group.members]
        known = [float(value) for value in values if value is not None and group.status in ("paused", "done")]
        is_scored, note = len(known) == len(values), ""
        if group.status in ("failed", "waiting"):
            errors = [member.error for member in group.members if member.error]
            note = f"failed: {errors[0].partition(';')[0]}" if errors else "not trained"
        elif not is_scored:
            note = f"{metric} is undefined"
        elif group.status == "paused":
            steps = sorted({int(member.scores["step"]) for member in group.members if "step" in member.scores})
            note = f"stopped after step {', '.join(map(str, steps))}"
        points.append(
            {
                "name": group.name,
                "point": dict(group.point),
                "status": group.status,
                "score": statistics.fmean(known) if is_scored else None,
                "deviation": statistics.stdev(known) if is_scored and len(known) > 1 else None,
                "interval": _interval(sweep, group) if is_scored else None,
                "seeds": [member.seed for member in group.members],
                "runs": [str(sweep.folder / member.name) for member in group.members],
                "scores": values,
                "note": note,
            }
        )
    run = {"run": str(sweep.folder / best.name), "point": dict(best.point), "seed": best.seed}
    return {
        "folder": str(sweep.folder),
        "metric": metric,
        "best": {**run, "score": best.scores[metric]},
        "points": points,
    }


def _interval(sweep: Sweep, group: Group) -> tuple[float, float] | None:
    """95 %: of one run its own; of several that of their mean, over resamples of examples and of seeds."""
    members = group.members
    if group.status != "done":
        return None
    if len(members) == 1:
        return None if members[0].interval is None else (members[0].interval[0], members[0].interval[1])
    try:
        runs = [read_resamples(sweep.folder / member.name) for member in members]
        values = np.stack([run.scores[str(sweep.metric)].values for run in runs])  # (seeds, RESAMPLES)
    except (LorakitError, KeyError):  # average precision, say, cannot be resampled
        return None
    drawn = np.random.RandomState(1).randint(0, len(values), values.shape)
    return tuple(quantiles(np.take_along_axis(values, drawn, 0).mean(0)))  # type: ignore[return-value]


def _lines(sweep: Sweep, facts: dict[str, Any]) -> list[str]:
    """A table of the points, the best run, how far it can be told from the next, and its use."""
    keys, points = _keys(sweep), facts["points"]
    with_seeds = any(len(point["seeds"]) > 1 for point in points)
    table = Table(box=SIMPLE, pad_edge=False)
    for head in [*keys, facts["metric"], *(["± seeds"] if with_seeds else []), "95 % interval", "run", ""]:
        table.add_column(head, justify="left" if head in ("run", "") else "right", overflow="fold")
    for point in points:
        values = [_cell(point["point"][key]) if key in point["point"] else "" for key in keys]
        numbers = [point["score"], *([point["deviation"]] if with_seeds else [])]
        between = "" if point["interval"] is None else "[{:.3f}, {:.3f}]".format(*point["interval"])
        scores = ["" if number is None else f"{number:.4f}" for number in numbers]
        table.add_row(*values, *scores, between, point["name"], point["note"])
    width = None if Console().is_terminal else WIDTH
    console = Console(highlight=False, markup=False, color_system=None, width=width)
    with console.capture() as captured:
        console.print(table)
    text = [line for row in captured.get().split("\n") if (line := row.rstrip())]
    run, done = facts["best"]["run"], [point for point in points if point["status"] == "done"]
    text.append(f"best: {run}")
    if len(done) > 1:
        text.append(f"this is the best of {len(points)} points on the same examples, so it is slightly optimistic")
        with suppress(LorakitError, IndexError):  # of other examples: each seed holds out its own
            runs = [Path(path) for point in (done[1], done[0]) for path in point["runs"]]
            comparison = compare_runs(runs).facts["comparisons"][0]
            text.append(f"against {done[1]['name']} (A), {done[0]['name']} is B: {comparison['verdict']}")
    return [*text, f'to try it: lorakit predict {shlex.quote(run)} "a text"']


def _keys(sweep: Sweep) -> list[str]:
    """The keys of the points, in the order in which they come."""
    return list(dict.fromkeys(key for member in sweep.members for key in member.point))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write_csv(sweep: Sweep) -> None:
    """sweep.csv: a row for each run, in the order of the table."""
    keys = _keys(sweep)
    scores = list(dict.fromkeys(name for member in sweep.members for name in member.scores if name != "seed"))
    with (
        atomic_file(sweep.folder / "sweep.csv") as unfinished,
        unfinished.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["run", *keys, "seed", "status", "low", "high", *scores, "error"])
        for member in (member for group in sweep.ranked() for member in group.members):
            point = [member.point.get(key, "") for key in keys]
            numbers = [member.scores.get(name, "") for name in scores]
            ends = member.interval or ("", "")
            writer.writerow([member.name, *point, member.seed, member.status, *ends, *numbers, member.error or ""])
