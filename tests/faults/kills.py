"""Kill processes with SIGKILL at random moments until so many kills are done; each must end as if never killed.

`runs`: training, one run or three together in one pass over one base. `commands`: sweeps, merges and exports as a user starts
them, after which nothing may lie there that an undisturbed one does not leave.

A program: `python -m tests.faults.kills runs --kills 200`. It forks what it kills, which saves the seconds of importing; the
parent itself computes nothing with torch, which would not survive a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.app import api, cli
from lorakit.errors import LorakitError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Event, Started, Step
from tests.faults.outcome import TIMINGS, differences, outcome
from tests.runs import Sections, changed, save_bert, save_t5, sections, write_entities, write_reviews

EPOCHS, STEPS_PER_EPOCH = 3, 5
WORDS = (f"train.epochs={EPOCHS}", "train.eval_every=4", "train.checkpoint_every=2")
TOGETHER = (["lora.r=2"], ["train.seed=3", "train.lr=1e-3"], ["lora.use_dora=true"])  # the words of each member
MOST_KILLS = 4  # of one command, which is then left alone
MOST_STEPS = 2  # besides the first, between a start and the kill


def forked(function: Any, *args: Any) -> int:
    """Run a function in a child process; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr)
    finally:
        os._exit(code)


def train(recipes: Sequence[Recipe], resume: str | None, pipe: int) -> None:
    """Train, and write a byte into the pipe at each start and for each step."""

    def tell(event: Event) -> None:
        if isinstance(event, (Started, Step)):
            os.write(pipe, b".")

    api.write_figures = lambda *_: None  # they take longer than the training
    failed = [r for r in api.train_recipes(recipes, report=tell, resume=resume) if isinstance(r, LorakitError)]
    if failed:
        raise failed[0]


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(recipes: Sequence[Recipe], chance: random.Random) -> bool:
    """Start or resume runs and kill them after some steps; False where they came to their end before."""
    reader, writer = os.pipe()
    child = forked(train, recipes, "auto", writer)
    os.close(writer)
    ended, clock = False, time.monotonic()
    for _ in range(len(recipes) * (2 + chance.randint(0, MOST_STEPS))):
        clock = time.monotonic()
        ended = ended or not os.read(reader, 1)  # end of file: the child has ended
    if not ended:
        time.sleep(chance.uniform(0, 2) * (time.monotonic() - clock))  # some part of the next two steps
    os.kill(child, signal.SIGKILL)
    code = finish(child)
    os.close(reader)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with {code}")
    return code != 0


def left(folder: Path) -> str:
    """Where in the run's work the kill struck, by what it left."""
    if any(folder.glob("*/checkpoints/.*")):
        return "inside a save"
    return "inside another write" if any(folder.glob("*/.tmp-*")) or any(folder.glob("*/.old-*")) else "elsewhere"


def bases(folder: Path) -> dict[str, dict[str, Any]]:
    for name, seed in (("train", 1), ("validation", 2)):
        write_reviews(folder / f"{name}.csv", 36 if name == "train" else 12, seed)
        write_entities(folder / f"{name}.conll", 36 if name == "train" else 12, seed)
    return {
        "BERT": sections(save_bert(folder / "bert"), folder),
        "T5": sections(save_t5(folder / "t5"), folder, "text2text_ner"),
    }


def straight(recipes: Sequence[Recipe], place: Path) -> None:
    """Runs that are never killed, which leave the list of all that they imported."""
    train(recipes, None, os.open(os.devnull, os.O_WRONLY))
    place.write_text("\n".join(sys.modules))


def recipes_of(raw: Sections, ways: Sequence[Sequence[str]], folder: Path) -> list[Recipe]:
    """The recipes of the runs that are trained together into one folder."""
    return [changed(raw, *WORDS, *words, f"output.dir={folder / str(i)}") for i, words in enumerate(ways)]


def outcomes(folder: Path) -> dict[str, Any]:
    """What the runs of one folder have computed."""
    return {f"{run.name} {key}": value for run in sorted(folder.iterdir()) for key, value in outcome(run).items()}


def import_all(names: list[str]) -> None:
    """Import here what every child would import again."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


class Tally:
    """What was killed, where that struck, and what came of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.begun = given, time.time()
        self.where, self.lost, self.kills, self.ended = Counter[str](), list[str](), 0, 0

    def goes_on(self) -> bool:
        """Whether there are kills to come, and time for them."""
        return self.kills < self.given.kills and (not self.ended or time.time() - self.begun < self.given.seconds)

    def add(self, name: str, struck: Sequence[str], found: Sequence[str]) -> None:
        """One that was killed so often and brought to its end, and what differs from one that never was."""
        self.where.update(struck)
        self.lost += [f"{name} {self.ended} ({len(struck)} kills): {', '.join(found)}"] if found else []
        self.kills, self.ended = self.kills + len(struck), self.ended + 1
        print(f"{name} {self.ended}: {len(struck)} kills, {', '.join(found) or 'equal'}", flush=True)

    def __str__(self) -> str:
        where = ", ".join(f"{n} {what}" for what, n in sorted(self.where.items()))
        return (
            f"{self.kills} kills ({where}): {self.ended - len(self.lost)}/{self.ended} end bit for bit as those never "
            f"killed, {len(self.lost)} lost, {time.time() - self.begun:.0f} s"
        )


def kill_runs(tally: Tally, chance: random.Random, place: Path) -> None:
    """Kill training runs after some of their steps."""
    bert, t5 = sections(place / "bert", place), sections(place / "t5", place, "text2text_ner")
    kinds = {"BERT": (bert, ([],)), "T5": (t5, ([],)), "three BERTs together": (bert, TOGETHER)}
    expected = {}
    for kind, (raw, ways) in kinds.items():
        recipes = recipes_of(raw, ways, place / kind)
        assert finish(forked(straight, recipes, place / "modules")) == 0
        import_all((place / "modules").read_text().splitlines())
        expected[kind] = outcomes(place / kind)
    while tally.goes_on():
        kind = list(kinds)[tally.ended % len(kinds)]
        folder = place / f"run-{tally.ended}"
        recipes, struck = recipes_of(*kinds[kind], folder), list[str]()
        while killed(recipes, chance):
            struck.append(left(folder))
        tally.add(kind, struck, differences(outcomes(folder), expected[kind]))


# Commands


@dataclass
class Command:
    """Words of the command line that write `out`, and those that go on after a kill."""

    words: Sequence[str]
    out: Path
    again: Sequence[str] = ()
    seconds: float = 0.0  # of one that is not disturbed
    left: dict[str, Any] = field(default_factory=dict)  # by one that is not disturbed


def command(words: Sequence[str], modules: Path | None = None) -> None:
    """What a user types, its output thrown away; `modules` gets the list of all that it imported."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            cli.main(list(words))
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"lorakit {' '.join(words)} ended with {end.code}") from None
    if modules is not None:
        modules.write_text("\n".join(sys.modules))


def facts_of(folder: Path) -> dict[str, Any]:
    """What a command has written: of runs all that they have computed and the names of their files, else every byte."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    runs = [path.parent for path in folder.rglob("scores.json") if (path.parent / "metrics.jsonl").is_file()]
    if not runs:
        return {name: path.read_bytes() for name, path in files.items()}
    members = json.loads(files["sweep.json"].read_text())["members"] if "sweep.json" in files else []
    scores = [{key: value for key, value in member["scores"].items() if key not in TIMINGS} for member in members]
    return {
        "files": list(files),
        "members": [{**member, "scores": own} for member, own in zip(members, scores, strict=True)],
        **{f"{run.name} {key}": value for run in runs for key, value in outcome(run).items()},
    }


def commands_in(place: Path, run: Path, folder: Path) -> dict[str, Command]:
    """Each command, with its own place to write below `folder`; `place` has a recipe."""
    recipe = str(place / "recipe.toml")
    trained = {
        "sweep": (("sweep", recipe, "lora.r=2,4"), ("--resume",)),
        "halving": (("sweep", recipe, "train.lr=1e-3,2e-3,4e-3,8e-3", "--halving", "2"), ("--resume",)),
        "seeds": (("train", recipe, "train.seeds=0,1"), ("--resume", "auto")),
    }
    written = {"merge": ("merge", str(run)), "export": ("export", str(run), "--to", "vllm")}
    outs = {name: folder / name / "out" for name in (*trained, *written)}
    return {
        **{
            name: Command((*words, f"output.dir={outs[name]}"), outs[name], on) for name, (words, on) in trained.items()
        },
        **{name: Command((*words, "--out", str(outs[name])), outs[name]) for name, words in written.items()},
    }


def killed_command(one: Command, seconds: float | None, chance: random.Random) -> bool:
    """Start a command, or go on with it, and kill it within the seconds; False where it comes to its end before."""
    child = forked(command, (*one.words, *(one.again if one.out.exists() else ())))
    if seconds is not None:
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    code = finish(child)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{one.words} ended with {code}")
    return code != 0


def kill_commands(tally: Tally, chance: random.Random, place: Path) -> None:
    """Kill commands at random moments of the time that they take."""
    (place / "recipe.toml").write_text(changed(sections(place / "bert", place), *WORDS).to_toml())
    run, modules = place / "run", place / "modules"
    assert finish(forked(command, ("train", str(place / "recipe.toml"), f"output.dir={run}"), modules)) == 0
    undisturbed = commands_in(place, run, place / "undisturbed")
    for one in list(undisturbed.values()) * 2:  # what the first one imports is there for the second
        import_all(modules.read_text().splitlines())
        shutil.rmtree(one.out, ignore_errors=True)
        clock = time.monotonic()
        assert finish(forked(command, one.words, modules)) == 0
        one.seconds, one.left = time.monotonic() - clock, facts_of(one.out)
    while tally.goes_on():
        name = list(undisturbed)[tally.ended % len(undisturbed)]
        one = commands_in(place, run, place / f"commands-{tally.ended}")[name]
        one.out.parent.mkdir(parents=True)
        struck, done = list[str](), False
        while not done:
            seconds = undisturbed[name].seconds if len(struck) < MOST_KILLS else None
            if killed_command(one, seconds, chance):
                there = any(one.out.parent.rglob(".*"))
                struck.append(f"{name} {'with' if there else 'without'} leftovers")
                done = not one.again and one.out.exists()  # it had written all before the kill
            else:
                done = True
        found = differences(facts_of(one.out), undisturbed[name].left)
        beside = [path.name for path in one.out.parent.rglob("*") if path.name.startswith(".")]
        tally.add(name, struck, [*found, *beside])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("runs", "commands"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other one after so many")
    given = parser.parse_args()
    tally = Tally(given)
    with tempfile.TemporaryDirectory() as name:
        assert finish(forked(bases, Path(name))) == 0  # by a child, since it computes with torch
        kill = kill_runs if given.what == "runs" else kill_commands
        kill(tally, random.Random(given.seed), Path(name))
    print(tally)
    sys.exit(bool(tally.lost))


if __name__ == "__main__":
    main()
