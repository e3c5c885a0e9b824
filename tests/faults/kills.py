"""Kill training runs with SIGKILL at random moments until so many kills are done; each run must end as if never killed.

One run, or three together in one pass over one base.

A program: `python -m tests.faults.kills --kills 200`. It forks its runs, which saves them the seconds of importing; the
parent itself computes nothing with torch, which would not survive a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.app import api
from lorakit.engine.events import Event, Started
from lorakit.engine.train import Step
from lorakit.errors import LorakitError
from lorakit.recipe import Recipe
from tests.faults.outcome import differences, outcome
from tests.runs import Sections, changed, save_bert, save_t5, sections, write_entities, write_reviews

EPOCHS, STEPS_PER_EPOCH = 3, 5
WORDS = (f"train.epochs={EPOCHS}", "train.eval_every=4", "train.checkpoint_every=2")
TOGETHER = (["lora.r=2"], ["train.seed=3", "train.lr=1e-3"], ["lora.use_dora=true"])  # the words of each member
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other run after so many")
    given = parser.parse_args()
    chance, where, kills, runs, lost, begun = random.Random(given.seed), Counter[str](), 0, 0, [], time.time()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        child = forked(bases, place)  # by a child, since it computes with torch
        assert finish(child) == 0
        bert, t5 = sections(place / "bert", place), sections(place / "t5", place, "text2text_ner")
        kinds = {"BERT": (bert, ([],)), "T5": (t5, ([],)), "three BERTs together": (bert, TOGETHER)}
        expected = {}
        for kind, (raw, ways) in kinds.items():
            recipes = recipes_of(raw, ways, place / kind)
            assert finish(forked(straight, recipes, place / "modules")) == 0
            import_all((place / "modules").read_text().splitlines())
            expected[kind] = outcomes(place / kind)
        while kills < given.kills and (not runs or time.time() - begun < given.seconds):
            kind = list(kinds)[runs % len(kinds)]
            folder = place / f"run-{runs}"
            recipes = recipes_of(*kinds[kind], folder)
            here = 0
            while killed(recipes, chance):
                here += 1
                where[left(folder)] += 1
            kills, runs = kills + here, runs + 1
            if found := differences(outcomes(folder), expected[kind]):
                lost.append(f"{folder.name} ({kind}, {here} kills): {', '.join(found)}")
            print(f"{folder.name} {kind}: {here} kills, {found or 'equal'}", flush=True)
    print(
        f"{kills} kills in {runs} runs of {EPOCHS} epochs ({kills / runs / EPOCHS:.1f} an epoch; "
        f"{', '.join(f'{n} {what}' for what, n in sorted(where.items()))}): "
        f"{runs - len(lost)}/{runs} runs end bit for bit as the one never killed, {len(lost)} lost, {time.time() - begun:.0f} s"
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
