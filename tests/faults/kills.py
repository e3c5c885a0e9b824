"""Kill training runs with SIGKILL at random moments until so many kills are done; each run must end as if never killed.

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
from pathlib import Path
from typing import Any

from lorakit.app import api
from lorakit.engine.events import Event, Started
from lorakit.engine.train import Step
from lorakit.recipe import Recipe
from tests.faults.outcome import differences, outcome
from tests.runs import changed, save_bert, save_t5, sections, write_entities, write_reviews

EPOCHS, STEPS_PER_EPOCH = 3, 5
WORDS = (f"train.epochs={EPOCHS}", "train.eval_every=4", "train.checkpoint_every=2")
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


def train(recipe: Recipe, resume: str | None, pipe: int) -> None:
    """Train, and write a byte into the pipe at the start and for each step."""

    def tell(event: Event) -> None:
        if isinstance(event, (Started, Step)):
            os.write(pipe, b".")

    api.write_figures = lambda *_: None  # they take longer than the training
    api.train_recipe(recipe, report=tell, resume=resume)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(recipe: Recipe, chance: random.Random) -> bool:
    """Start or resume a run and kill it after some steps; False where it came to its end before."""
    reader, writer = os.pipe()
    child = forked(train, recipe, "auto", writer)
    os.close(writer)
    ended, clock = False, time.monotonic()
    for _ in range(2 + chance.randint(0, MOST_STEPS)):
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
    if any(folder.glob("checkpoints/.*")):
        return "inside a save"
    return "inside another write" if any(folder.glob(".tmp-*")) or any(folder.glob(".old-*")) else "elsewhere"


def bases(folder: Path) -> dict[str, dict[str, Any]]:
    for name, seed in (("train", 1), ("validation", 2)):
        write_reviews(folder / f"{name}.csv", 36 if name == "train" else 12, seed)
        write_entities(folder / f"{name}.conll", 36 if name == "train" else 12, seed)
    return {
        "BERT": sections(save_bert(folder / "bert"), folder),
        "T5": sections(save_t5(folder / "t5"), folder, "text2text_ner"),
    }


def straight(recipe: Recipe, place: Path) -> None:
    """A run that is never killed, which leaves the list of all that it imported."""
    train(recipe, None, os.open(os.devnull, os.O_WRONLY))
    place.write_text("\n".join(sys.modules))


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
        raws = {
            "BERT": sections(place / "bert", place),
            "T5": sections(place / "t5", place, "text2text_ner"),
        }
        expected = {}
        for base, raw in raws.items():
            recipe = changed(raw, *WORDS, f"output.dir={place / base}")
            assert finish(forked(straight, recipe, place / "modules")) == 0
            import_all((place / "modules").read_text().splitlines())
            expected[base] = outcome(place / base)
        while kills < given.kills and (not runs or time.time() - begun < given.seconds):
            base = list(raws)[runs % len(raws)]
            folder = place / f"run-{runs}"
            recipe = changed(raws[base], *WORDS, f"output.dir={folder}")
            here = 0
            while killed(recipe, chance):
                here += 1
                where[left(folder)] += 1
            kills, runs = kills + here, runs + 1
            if found := differences({**outcome(folder)}, expected[base]):
                lost.append(f"{folder.name} ({base}, {here} kills): {', '.join(found)}")
            print(f"{folder.name} {base}: {here} kills, {found or 'equal'}", flush=True)
    print(
        f"{kills} kills in {runs} runs of {EPOCHS} epochs ({kills / runs / EPOCHS:.1f} an epoch; "
        f"{', '.join(f'{n} {what}' for what, n in sorted(where.items()))}): "
        f"{runs - len(lost)}/{runs} runs end bit for bit as the one never killed, {len(lost)} lost, {time.time() - begun:.0f} s"
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
