"""A sweep: many points of one recipe trained into one folder, what is known of each in sweep.json, resumable at any time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit.app.api import is_done, train_recipes
from lorakit.app.seeds import with_seed
from lorakit.app.sweep.points import SEED, SEEDS, Point, word
from lorakit.errors import ConfigError, LorakitError, OutputError
from lorakit.recipe import Recipe, read_recipe
from lorakit.runtime.events import Note, Report, ignore
from lorakit.runtime.files import atomic_text
from lorakit.tasks.metrics.bootstrap import goodness
from lorakit.training.joint import END_ALL
from lorakit.training.results import Result

STATE, FORMAT = "sweep.json", 1
NAME_LENGTH, WORD_LENGTH = 60, 20  # letters of a member's name, and of a value in it


@dataclass
class Member:
    """One run of a sweep: a point with one seed."""

    name: str  # of its folder
    point: Point  # the seed left out
    seed: int
    status: Literal["waiting", "paused", "done", "failed"] = "waiting"
    scores: dict[str, float] = field(default_factory=dict)  # of its last evaluation; of the best one once it is done
    interval: list[float] | None = None  # 95 %, of the metric
    rungs: list[tuple[float, float]] = field(default_factory=list)  # (share of its steps, goodness there)
    error: str | None = None
    ended: float | None = None  # goodness at the end

    def goodness_at(self, share: float) -> list[float]:
        """What it was worth there; nothing where it has not been there."""
        at = dict(self.rungs).get(share, self.ended)
        return [] if at is None else [at]


def read_member(row: Mapping[str, Any]) -> Member:
    """A member as JSON has it."""
    member = Member(**row)
    member.rungs = [(float(share), float(value)) for share, value in member.rungs]
    return member


@dataclass
class Group:
    """The members of one point, which differ in the seed alone."""

    point: Point
    members: list[Member]

    @property
    def name(self) -> str:
        """Of the first member, without its seed."""
        return re.sub(r"-seed\d+$", "", self.members[0].name)

    @property
    def status(self) -> str:
        """What is true of the whole group: it is as far as the member that is behind."""
        found = {member.status for member in self.members}
        return next(status for status in ("failed", "waiting", "paused", "done") if status in found)

    def goodness(self, metric: str) -> float:
        """The mean of the metric over the seeds, its sign turned where less is better; -inf where there is none."""
        if self.status in ("failed", "waiting"):
            return float("-inf")
        value = statistics.fmean(goodness(member.scores, metric) for member in self.members)
        return value if math.isfinite(value) else float("-inf")

    def goodness_at(self, share: float) -> float:
        """The same where each had done this share of its steps, or was done before."""
        found = [value for member in self.members for value in member.goodness_at(share)]
        is_whole = len(found) == len(self.members) and self.status != "failed"
        return statistics.fmean(found) if is_whole and all(map(math.isfinite, found)) else float("-inf")


class Sweep:
    """The members of a sweep and their folder.

    `how` says what the sweep is besides its members (the recipe, the method): one that is resumed must be the same.
    """

    def __init__(
        self, folder: Path, recipe_of: Callable[[Point], Recipe], how: dict[str, Any], report: Report = ignore
    ) -> None:
        self.folder, self.recipe_of, self.how, self.report = folder, recipe_of, how, report
        self.members: list[Member] = []
        self.metric: str | None = None
        self.is_resumed = False

    def restore(self) -> None:
        """Take up what an earlier process has left.

        Raises:
            ConfigError: it was another sweep. OutputError: sweep.json is damaged.
        """
        path = self.folder / STATE
        self.is_resumed = True
        if not path.is_file():
            return
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            how, self.metric = dict(raw["how"]), raw["metric"]
            self.members = [read_member(row) for row in raw["members"]]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise OutputError(f"{path}: damaged: {type(err).__name__} {err}") from err
        self.check_how(how, "--resume")
        self._look_at_folders()
        again = [m for m in self.members if m.status == "done" and self._lacks_something(m)]
        for member in again:
            member.status = "waiting"
        self.save()
        self.train([Group(member.point, [member]) for member in again])

    def check_how(self, how: Mapping[str, Any], option: str) -> None:
        """Raise a ConfigError where what was begun is another sweep than this."""
        now = json.loads(json.dumps(self.how))
        for key in {**how, **now}:
            if how.get(key) != now.get(key):
                raise ConfigError(
                    f"{option}: {self.folder} is another sweep: its {key} was {how.get(key)!r}, now {now.get(key)!r}"
                )

    def _look_at_folders(self) -> None:
        """A run that ended between two writings of sweep.json is not trained again, if nothing of it is missing."""
        for member in self.members:
            folder = self.folder / member.name
            if member.status in ("waiting", "paused") and is_done(folder):
                scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
                self._note(member, Result(folder, scores), None)

    def _lacks_something(self, member: Member) -> bool:
        """Whether a part of its folder is not there; a user may have removed the whole."""
        folder = self.folder / member.name
        return folder.is_dir() and not is_done(folder)

    def save(self) -> None:
        """Write sweep.json as one unit."""
        members = [dataclasses.asdict(member) for member in self.members]
        found = {"format": FORMAT, "how": self.how, "metric": self.metric, "members": members}
        atomic_text(self.folder / STATE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def add(self, points: Iterable[Point]) -> list[Group]:
        """The groups of these points, in order; what is not yet in the sweep is put into it. Each has its train.seed.

        Raises:
            ConfigError: a point is no recipe.
        """
        mine: dict[str, Group] = {}
        for point in points:
            member = next((m for m in self.members if {**m.point, SEED: m.seed} == point), None)
            if member is None:
                self.recipe_of(point)
                rest = {key: value for key, value in point.items() if key != SEED}
                member = Member(member_name(len(self.members), point), rest, point[SEED])
                self.members.append(member)
            mine.setdefault(json.dumps(member.point, sort_keys=True), Group(member.point, [])).members.append(member)
        return list(mine.values())

    @property
    def groups(self) -> list[Group]:
        """All of them, in order."""
        return self.add([{**member.point, SEED: member.seed} for member in self.members])

    def train(self, groups: Sequence[Group], until: float | None = None) -> None:
        """Train the members to the end, or to their first evaluation after a share of the steps; who is there stays.

        Raises:
            LorakitError: a mistake that all of them share, a full disk, a signal.
        """
        open_ = [member for group in groups for member in group.members if member.status in ("waiting", "paused")]
        members = [member for member in open_ if until is None or all(share < until for share, _ in member.rungs)]
        if not members:
            return
        recipes = [self._recipe(member) for member in members]
        resume = "auto" if any((self.folder / member.name).is_dir() for member in members) else None
        self.save()
        results: Sequence[Result | LorakitError]
        try:
            results = train_recipes(recipes, report=self.report, resume=resume, until=until)
        except LorakitError as err:  # of the last few alike, where others have got by
            if err.exit_code in END_ALL or all(m.status in ("waiting", "failed") for m in self.members):
                raise
            results = [err] * len(members)
        for member, result in zip(members, results, strict=True):
            self._note(member, result, until)
        self.save()

    def _recipe(self, member: Member) -> Recipe:
        recipe = self.recipe_of({**member.point, SEED: member.seed})
        return with_seed(recipe, member.seed, self.folder / member.name)

    def _note(self, member: Member, result: Result | LorakitError, until: float | None) -> None:
        if isinstance(result, LorakitError):
            member.status, member.error = "failed", str(result)
            self.report(Note(f"{member.name} failed: {result}"))
            return
        scores = result.scores
        self.metric = str(scores["metric"])
        member.status = "done" if "best_step" in scores else "paused"
        member.scores = {name: value for name, value in scores.items() if isinstance(value, (float, int))}
        member.interval = scores.get("intervals", {}).get(self.metric)
        if until is not None:
            member.rungs.append((until, goodness(scores, self.metric)))
        if member.status == "done":
            member.ended = goodness(scores, self.metric)

    def ranked(self) -> list[Group]:
        """The groups from the best to the worst: those that are done, then those stopped on the way, later ones first."""
        order = ("waiting", "failed", "paused", "done")

        def key(group: Group) -> tuple[int, int, float]:
            rungs = 0 if group.status == "done" else min(len(member.rungs) for member in group.members)
            return order.index(group.status), rungs, group.goodness(self.metric or "")

        return sorted(self.groups, key=key, reverse=True)

    def best(self) -> Member:
        """The run with the best score in the best group.

        Raises:
            LorakitError: every member failed; the error of the first.
        """
        first = self.ranked()[0]
        if self.metric is None or first.status != "done":
            failed = next(member for member in self.members if member.status == "failed")
            raise LorakitError(f"all {len(self.members)} runs of the sweep failed; {failed.name}: {failed.error}")
        metric = self.metric
        return max(first.members, key=lambda member: goodness(member.scores, metric))


def member_name(number: int, point: Point) -> str:
    """003-lr0.001-r8-seed0: its number, and what tells it from the others."""
    words = []
    for key, value in point.items():
        said = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words.append(key.rpartition(".")[2] + re.sub(r"[^\w.,+-]", "_", said)[:WORD_LENGTH])
    tail = words.pop() if SEED in point and list(point)[-1] == SEED else ""
    return "-".join([f"{number:03d}", *filter(None, ["-".join(words)[:NAME_LENGTH].rstrip("-"), tail])])


def recipe_maker(path: Path, fixed: Sequence[str]) -> Callable[[Point], Recipe]:
    """What makes the recipe of a point: the file, changed by some words and by the point's own."""

    def recipe_of(point: Point) -> Recipe:
        seeds = [word(SEEDS, [])] if SEED in point else []
        return read_recipe(path, [*fixed, *seeds, *(word(key, value) for key, value in point.items())])

    return recipe_of


def halve(sweep: Sweep, points: Sequence[Point], eta: int, shares: Sequence[float]) -> None:
    """Train all to the first share of their steps, the best 1 / eta of them to the next, and so on to the end.

    Successive halving (Karnin et al. 2013, ICML; Jamieson & Talwalkar 2016, arXiv:1502.07943), with the learning rate of
    a run's full length at each of them, so that the last ones are runs like any other.
    """
    groups = sweep.add(points)
    for share in shares:
        sweep.train(groups, until=share)
        alive = [group for group in groups if group.goodness_at(share) > float("-inf")]
        alive.sort(key=lambda group: group.goodness_at(share), reverse=True)  # a tie keeps the earlier one
        groups = alive[: max(1, len(groups) // eta)]
        if groups:
            sweep.report(
                Note(f"after {share:.0%} of the steps {len(groups)} go on: {', '.join(g.name for g in groups)}")
            )
    sweep.train(groups)


def halving_shares(n: int, eta: int, recipe: Recipe) -> list[float]:
    """The shares of a run's steps after which n points are thinned out; each of them is an evaluation of the recipe.

    Raises:
        ConfigError: there is no evaluation before a run's end.
    """
    depth = math.floor(math.log(n, eta) + 1e-9)
    train = recipe.train
    if train.eval_every is None and train.max_steps is None:
        depth = min(depth, math.floor(math.log(train.epochs, eta) + 1e-9))
        if n >= eta and not depth:
            raise ConfigError(
                f"--halving {eta}: train.epochs = {train.epochs} has no evaluation after a part of 1/{eta}; "
                f"say train.epochs={eta} or more, train.max_steps or train.eval_every"
            )
    return [eta**-level for level in range(depth, 0, -1)]


def halving_words(recipe: Recipe, shares: Sequence[float]) -> list[str]:
    """What a recipe with max_steps must be told so that it is evaluated after these shares of its steps."""
    train = recipe.train
    if not shares or train.max_steps is None or train.eval_every is not None:
        return []
    return [word("train.eval_every", math.ceil(train.max_steps * shares[0]))]
