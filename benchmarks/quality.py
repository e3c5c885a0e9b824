"""Quality on real data over `minilm`: lorakit's LoRA beside peft's under the Hugging Face Trainer, and the usual baselines.

    python benchmarks/quality.py run DATA OUT --sets sick banking77 --systems lora rival --lr 5e-4 1e-3 2e-3
    python benchmarks/quality.py table OUT

DATA is a folder with the public files of the sets, none of which is part of this project. Each run is a process of its own
and leaves one JSON file in OUT; a run that is there already is skipped. No run looks at the test part but to be scored: what
the last epoch leaves is scored, whatever it is (of SST-2, whose runs are long, the state that is best on the validation
part), and `table` takes the learning rate that is best on the validation part. `lora` and
`rival` have the same layers, r, alpha, batch size, epochs, schedule, warm-up, weight decay, clipping and dropout (none);
the rival pads each batch to its longest text, the Trainer's default.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

R, ALPHA, WARMUP, WEIGHT_DECAY, MAX_LENGTH = 8, 16, 0.06, 0.01, 128
NEVER = 10**9  # steps
RESAMPLES = 2_000
Row = dict[str, Any]
Parts = Mapping[str, list[Row]]  # train, validation, test


# The sets


def tab_separated(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a file with a header, fields stripped of the spaces that GLUE leaves."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = (line.rstrip("\r\n").split("\t") for line in file.read().splitlines())
        header = next(lines)
        for fields in lines:
            yield {name: field.strip() for name, field in zip(header, fields, strict=True)}


def held_out(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """The rows without a share of them chosen by chance, and that share."""
    order = random.Random(0).sample(range(len(rows)), round(share * len(rows)))
    return [row for i, row in enumerate(rows) if i not in set(order)], [rows[i] for i in sorted(order)]


def sst2(data: Path) -> Parts:
    """GLUE's SST-2. Scores are those of GLUE's 872 development sentences; the 1,821 of the test part choose."""
    names = {"0": "negative", "1": "positive"}
    files = {"train": "train.tsv", "validation": "test-gold.tsv", "test": "dev.tsv"}
    return {
        part: [
            {"text": row["sentence"], "label": names[row["label"]]} for row in tab_separated(data / "sst2_glue" / file)
        ]
        for part, file in files.items()
    }


def banking77(data: Path) -> Parts:
    """77 intents of bank customers; a tenth of the training part chooses."""
    parts = {}
    for part in ("train", "test"):
        with (data / "banking77" / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            parts[part] = [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
    train, validation = held_out(parts["train"], 0.1)
    return {"train": train, "validation": validation, "test": parts["test"]}


def sick(data: Path, column: str = "entailment_judgment", of_text: Callable[[str], Any] = str.lower) -> Parts:
    """Entailment between two sentences, in three classes; or how related they are, from 1 to 5."""
    files = {"train": "SICK_train.txt", "validation": "SICK_trial.txt", "test": "SICK_test_annotated.txt"}
    return {
        part: [
            {"text": row["sentence_A"], "pair": row["sentence_B"], "label": of_text(row[column])}
            for row in tab_separated(data / "sick" / file)
        ]
        for part, file in files.items()
    }


def goemotions(data: Path) -> Parts:
    """28 emotions of short comments, one or several each."""
    names = (data / "goemotions" / "labels.txt").read_text(encoding="utf-8").split()
    parts: dict[str, list[Row]] = {}
    for part, file in {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}.items():
        lines = (data / "goemotions" / file).read_text(encoding="utf-8").strip("\n").split("\n")
        records = (line.split("\t") for line in lines)
        parts[part] = [
            {"text": text, "labels": [names[int(i)] for i in numbers.split(",")]} for text, numbers, _ in records
        ]
    return parts


def conll(data: Path, files: Mapping[str, str]) -> dict[str, list[Row]]:
    """Files of words and tags, whatever their scheme, as words and IOB2 tags."""
    from lorakit.data.read import read

    found = {part: read(str(data / file), "words").examples for part, file in files.items()}
    return {
        part: [{"tokens": list(example.words), "ner_tags": list(example.tags)} for example in examples]
        for part, examples in found.items()
    }


def wnut17(data: Path) -> Parts:
    """Six kinds of rare names in short messages."""
    files = {"train": "wnut17train.conll", "validation": "emerging.dev.conll", "test": "emerging.test.annotated"}
    return conll(data / "wnut17", files)


def wikigold(data: Path) -> Parts:
    """Four kinds of names in Wikipedia; one file, of which a fifth tests and a tenth of the rest chooses."""
    rows, test = held_out(conll(data / "wikigold", {"all": "wikigold.conll.txt"})["all"], 0.2)
    train, validation = held_out(rows, 0.1)
    return {"train": train, "validation": validation, "test": test}


@dataclass(frozen=True)
class Set:
    """A data set and how it is trained, the same for every system."""

    parts: Callable[[Path], Parts]
    task: str
    epochs: int
    batch_size: int = 32
    eval_every: int | None = None  # steps; where set, the state that is best on the validation part is kept


SETS = {
    "sst2": Set(sst2, "sequence_classification", epochs=3, eval_every=1_500),
    "sst2-once": Set(sst2, "sequence_classification", epochs=1),
    "banking77": Set(banking77, "sequence_classification", epochs=5),
    "sick": Set(sick, "sequence_classification", epochs=3),
    "sick-score": Set(partial(sick, column="relatedness_score", of_text=float), "sequence_regression", epochs=3),
    "goemotions": Set(goemotions, "multi_label_classification", epochs=3),
    "wnut17": Set(wnut17, "token_classification", epochs=5, batch_size=16),
    "wikigold": Set(wikigold, "token_classification", epochs=5, batch_size=16),
}


def files_of(name: str, out: Path, data: Path | None = None) -> dict[str, Path]:
    """The parts of a set as JSON lines in OUT, written there once."""
    folder = out / "data" / name
    if data is not None and not folder.exists():
        unfinished = out / "data" / f"{name}.{time.time_ns()}"
        unfinished.mkdir(parents=True)
        for part, rows in SETS[name].parts(data).items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (unfinished / f"{part}.jsonl").write_text(text, encoding="utf-8")
        unfinished.rename(folder)
    return {part: folder / f"{part}.jsonl" for part in ("train", "validation", "test")}


def rows_of(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# The systems: each trains and gives its answers to the validation and test parts, and what the training cost


@dataclass(frozen=True)
class Job:
    """One run."""

    set: str
    system: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.set}-{self.system}-{self.lr:g}-{self.seed}"


@dataclass
class Clock:
    """Time of the training steps alone: no loading, encoding, scoring or saving."""

    begin: tuple[float, float] = (0.0, 0.0)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def start(self) -> None:
        self.begin = (time.process_time(), time.perf_counter())

    def lap(self) -> None:
        self.cpu_s, self.wall_s = time.process_time() - self.begin[0], time.perf_counter() - self.begin[1]

    def skip(self) -> None:
        """Leave out what has passed since the last lap."""
        self.begin = (time.process_time() - self.cpu_s, time.perf_counter() - self.wall_s)


def lorakit_system(job: Job, files: Mapping[str, Path], folder: Path, clock: Clock) -> dict[str, list[Any]]:
    """lorakit with train.method lora, full or head."""
    import lorakit
    from lorakit.runtime.events import Evaluated, Event, Started, Step

    def report(event: Event) -> None:
        if isinstance(event, Started):
            clock.start()
        if isinstance(event, Evaluated):
            clock.skip()
            print(f"  {job.name} step {event.step}: {event.scores}"[:200], flush=True)
        if isinstance(event, Step):
            clock.lap()
            if event.number % 50 == 0:
                print(f"  {job.name} epoch {event.epoch:.2f} loss {event.loss:.4f} cpu {clock.cpu_s:.0f}", flush=True)

    spec = SETS[job.set]
    pair = {"pair": "pair"} if "pair" in rows_of(files["test"])[0] else {}
    lorakit.train(
        report=report,
        model={"base": "minilm", "dtype": "fp32", "dropout": 0.0, "pooling": "cls"},  # what the rivals read
        data={**{part: str(files[part]) for part in ("train", "validation")}, "max_length": MAX_LENGTH, **pair},
        task={"name": spec.task},
        lora={"r": R, "alpha": ALPHA},
        train={
            "method": job.system, "epochs": spec.epochs, "batch_size": spec.batch_size, "lr": job.lr, "seed": job.seed,
            "warmup": WARMUP, "weight_decay": WEIGHT_DECAY, "eval_every": spec.eval_every or NEVER,
        },
        output={"dir": str(folder)},
    )  # fmt: skip
    predictor = lorakit.load(folder)

    def answers(rows: Sequence[Row]) -> list[Row]:
        if "tokens" in rows[0]:
            return predictor.predict_words([row["tokens"] for row in rows])
        return predictor.predict([(row["text"], row["pair"]) if "pair" in row else row["text"] for row in rows])

    key = TASKS[spec.task].ours
    return {part: [answer[key] for answer in answers(rows_of(files[part]))] for part in ("validation", "test")}


def rival_system(job: Job, files: Mapping[str, Path], folder: Path, clock: Clock) -> dict[str, list[Any]]:
    """peft's LoRA on the same layers under transformers.Trainer; the classifier is trained in full, as with lorakit."""
    import peft
    import transformers
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

    from lorakit.models import find

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            clock.lap()
            if state.global_step % 50 == 0:
                print(f"  {job.name} epoch {state.epoch:.2f} cpu {clock.cpu_s:.0f}", flush=True)

        def on_evaluate(self, *_: Any, **__: Any) -> None:
            clock.skip()

    spec, base = SETS[job.set], find("minilm")
    task = TASKS[spec.task]
    rows = {part: rows_of(path) for part, path in files.items()}
    labels = task.labels(rows["train"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    items = {part: task.encode(tokenizer, rows[part], labels) for part in rows}
    set_seed(job.seed)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    auto = getattr(transformers, task.model)
    model = peft.get_peft_model(
        auto.from_pretrained(
            base, num_labels=task.outputs or len(labels), problem_type=task.problem_type, **no_dropout
        ),
        peft.LoraConfig(
            task_type=task.peft_type, r=R, lora_alpha=ALPHA, target_modules="all-linear", modules_to_save=["classifier"]
        ),
    )
    best: Row = {"save_strategy": "no"}
    if spec.eval_every:
        best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": spec.eval_every}
        best |= {"save_steps": spec.eval_every, "load_best_model_at_end": True, "metric_for_best_model": "score"}
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=spec.batch_size, num_train_epochs=spec.epochs,
        learning_rate=job.lr, lr_scheduler_type="linear", weight_decay=WEIGHT_DECAY, max_grad_norm=1.0, seed=job.seed,
        warmup_steps=round(WARMUP * spec.epochs * -(-len(rows["train"]) // spec.batch_size)),
        per_device_eval_batch_size=64, report_to=[], disable_tqdm=True, use_cpu=True,
        **best,
    )  # fmt: skip
    collator = getattr(transformers, task.collator)(tokenizer)

    def score(found: Any) -> dict[str, float]:
        known = task.settle(found.predictions, rows["validation"], labels)
        answers = [task.theirs(*each, known) for each in zip(found.predictions, items["validation"], strict=True)]
        gold = [row[task.gold] for row in rows["validation"]]
        return {"score": float(task.score(task.counts(gold, answers).sum(0), len(gold)))}

    trainer = Trainer(
        model, arguments, train_dataset=items["train"], eval_dataset=items["validation"], data_collator=collator,
        callbacks=[Timed()], compute_metrics=score if spec.eval_every else None,
    )  # fmt: skip
    trainer.train()
    print(f"  {job.name} trains {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    logits = {part: trainer.predict(items[part]).predictions for part in ("validation", "test")}
    known = task.settle(logits["validation"], rows["validation"], labels)
    return {
        part: [task.theirs(row, item, known) for row, item in zip(found, items[part], strict=True)]
        for part, found in logits.items()
    }


SYSTEMS = {"lora": lorakit_system, "full": lorakit_system, "head": lorakit_system, "rival": rival_system}


# Scores: of every metric, a function of sums over examples, so that a bootstrap is a product of matrices


def right(gold: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """For accuracy: (N, 1), whether each is right."""
    return np.array([[float(a == g)] for a, g in zip(answers, gold, strict=True)])


def accuracy(sums: np.ndarray, n: int) -> np.ndarray:
    """Shapes: sums (..., 1); result (...)."""
    return sums[..., 0] / n


def entity_counts(gold: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """For entity F1: (N, 2), the entities that are right, and those of the gold tags and of the answer together."""
    from seqeval.metrics.sequence_labeling import get_entities

    both = [(set(get_entities(list(g))), set(get_entities(list(a)))) for g, a in zip(gold, answers, strict=True)]
    return np.array([[len(g & a), len(g) + len(a)] for g, a in both], float)


def f1(sums: np.ndarray, n: int) -> np.ndarray:
    """Shapes: sums (..., 2); result (...)."""
    return 2 * sums[..., 0] / np.maximum(sums[..., 1], 1)


def label_counts(gold: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """For macro F1: (N, 2 C), of each label whether it is right, and how often it stands in gold and answer together."""
    names = sorted({name for row in gold for name in row})
    g, a = (np.array([[name in row for name in names] for row in rows], float) for rows in (gold, answers))
    return np.hstack([g * a, g + a])


def macro_f1(sums: np.ndarray, n: int) -> np.ndarray:
    """Shapes: sums (..., 2 C); result (...)."""
    both = np.stack(np.split(sums, 2, axis=-1), axis=-1)  # (..., C, 2)
    return f1(both, n).mean(-1)


def moments(gold: Sequence[float], answers: Sequence[float]) -> np.ndarray:
    """For Pearson's correlation: (N, 5), x, y, x^2, y^2 and x y."""
    x, y = (np.array(values, float) for values in (gold, answers))
    return np.stack([x, y, x * x, y * y, x * y], axis=1)


def pearson(sums: np.ndarray, n: int) -> np.ndarray:
    """Shapes: sums (..., 5); result (...)."""
    x, y, xx, yy, xy = np.moveaxis(sums / n, -1, 0)
    return (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y))


# The tasks


def classes(rows: Sequence[Row]) -> list[str]:
    """The labels, by alphabet."""
    return sorted({row["label"] for row in rows})


def class_number(row: Row, labels: Sequence[str]) -> int:
    """The number of the one label."""
    return labels.index(row["label"])


def several(rows: Sequence[Row]) -> list[str]:
    """The labels of rows with several each, by alphabet."""
    return sorted({label for row in rows for label in row["labels"]})


def flags(row: Row, labels: Sequence[str]) -> list[float]:
    """1 for each label that the row has."""
    return [float(label in row["labels"]) for label in labels]


def thresholds(logits: np.ndarray, rows: Sequence[Row], labels: Sequence[str]) -> list[tuple[str, float]]:
    """Each label and the logit above which it is answered, tuned to F1 as lorakit does it. Shapes: logits (N, C)."""
    from lorakit.tasks.metrics.labels import best_threshold

    gold = np.array([flags(row, labels) for row in rows], bool)
    probabilities = 1 / (1 + np.exp(-logits.astype(float)))
    found = [best_threshold(gold[:, i], probabilities[:, i]) for i in range(len(labels))]
    return [(label, float(np.log(p / (1 - p)))) for label, p in zip(labels, found, strict=True)]


def above(logits: np.ndarray, item: Row, limits: Sequence[tuple[str, float]]) -> list[str]:
    """Shapes: logits (C,)."""
    return [label for (label, limit), z in zip(limits, logits, strict=True) if z >= limit]


def scale(rows: Sequence[Row]) -> list[float]:
    """The mean and the spread of the numbers."""
    values = [row["label"] for row in rows]
    return [float(np.mean(values)), float(np.std(values))]


def scaled(row: Row, known: Sequence[float]) -> float:
    """The number as the model learns it, as with lorakit."""
    return (row["label"] - known[0]) / known[1]


def number(logits: np.ndarray, item: Row, known: Sequence[float]) -> float:
    """Shapes: logits (1,)."""
    return known[0] + known[1] * float(logits[0])


def encode_texts(
    tokenizer: Any, rows: Sequence[Row], labels: Sequence[Any], target: Callable[[Row, Sequence[Any]], Any]
) -> list[Row]:
    """Texts or pairs for the Trainer."""
    texts = [[row[key] for row in rows] for key in ("text", "pair") if key in rows[0]]
    found = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
    return [{**{key: found[key][i] for key in found}, "labels": target(row, labels)} for i, row in enumerate(rows)]


def best_class(logits: np.ndarray, item: Row, labels: Sequence[str]) -> str:
    """Shapes: logits (C,)."""
    return labels[int(logits.argmax())]


def tags(rows: Sequence[Row]) -> list[str]:
    """O, and B- and I- of each type."""
    types = sorted({tag[2:] for row in rows for tag in row["ner_tags"]} - {""})
    return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]


def encode_words(tokenizer: Any, rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """Words for the Trainer: the first sub-word of each has its label."""
    found = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
    items = []
    for i, row in enumerate(rows):
        words = found.word_ids(i)
        first = [word is not None and word not in words[:at] for at, word in enumerate(words)]
        marks = [labels.index(row["ner_tags"][w]) if new else -100 for w, new in zip(words, first, strict=True)]
        items.append({**{key: found[key][i] for key in found}, "labels": marks})
    return items


def best_tags(logits: np.ndarray, item: Row, labels: Sequence[str]) -> list[str]:
    """A tag for each word that the length limit leaves. Shapes: logits (T, C)."""
    marks = np.array(item["labels"])
    return [labels[i] for i in logits[: len(marks)][marks != -100].argmax(-1)]


def nothing(logits: np.ndarray, rows: Sequence[Row], labels: Sequence[Any]) -> Sequence[Any]:
    """Where nothing is tuned, the labels are all that an answer needs."""
    return labels


@dataclass(frozen=True)
class Task:
    """What a kind of problem needs of each system, and its score."""

    ours: str  # key of lorakit's answer
    gold: str  # key of a row
    metric: str
    counts: Callable[[Sequence[Any], Sequence[Any]], np.ndarray]  # gold, answers -> (N, K)
    score: Callable[[np.ndarray, int], np.ndarray]  # sums over N examples (..., K), N -> (...)
    labels: Callable[[Sequence[Row]], list[Any]]  # what there is to know of the training rows
    encode: Callable[[Any, Sequence[Row], Sequence[Any]], list[Row]]  # tokenizer, rows, labels -> the Trainer's items
    theirs: Callable[[np.ndarray, Row, Sequence[Any]], Any]  # the Trainer's logits of an example -> its answer
    settle: Callable[[np.ndarray, Sequence[Row], Sequence[Any]], Sequence[Any]] = nothing  # tuned on validation
    model: str = "AutoModelForSequenceClassification"  # transformers' class
    peft_type: str = "SEQ_CLS"
    collator: str = "DataCollatorWithPadding"
    problem_type: str | None = None  # transformers' name of the loss
    outputs: int | None = None  # of the model; unset: one a label


TASKS = {
    "sequence_classification": Task(
        "label", "label", "accuracy", right, accuracy, classes, partial(encode_texts, target=class_number), best_class,
        problem_type="single_label_classification",
    ),
    "multi_label_classification": Task(
        "labels", "labels", "macro F1", label_counts, macro_f1, several, partial(encode_texts, target=flags), above,
        settle=thresholds, problem_type="multi_label_classification",
    ),
    "sequence_regression": Task(
        "value", "label", "Pearson", moments, pearson, scale, partial(encode_texts, target=scaled), number,
        problem_type="regression", outputs=1,
    ),
    "token_classification": Task(
        "tags", "ner_tags", "entity F1", entity_counts, f1, tags, encode_words, best_tags,
        model="AutoModelForTokenClassification", peft_type="TOKEN_CLS", collator="DataCollatorForTokenClassification",
    ),
}  # fmt: skip


def counts_of(name: str, out: Path, answers: Sequence[Any], part: str) -> np.ndarray:
    """What a set's score needs of each example."""
    task = TASKS[SETS[name].task]
    gold = [row[task.gold] for row in rows_of(files_of(name, out)[part])]
    return task.counts(gold, answers)


def score_of(name: str, counts: np.ndarray) -> float:
    """The set's score."""
    return float(TASKS[SETS[name].task].score(counts.sum(0), len(counts)))


# Running


def one(job: Job, data: Path, out: Path) -> None:
    """Train and score, in this process, and leave the JSON file."""
    files, folder, clock = files_of(job.set, out, data), out / "runs" / job.name, Clock()
    shutil.rmtree(folder, ignore_errors=True)
    answers = SYSTEMS[job.system](job, files, folder, clock)
    spec = SETS[job.set]
    result = {
        **vars(job), "commit": commit(), "date": time.strftime("%Y-%m-%d"), "epochs": spec.epochs, "batch_size": spec.batch_size,
        "r": R, "alpha": ALPHA, "metric": TASKS[spec.task].metric,
        **{part: score_of(job.set, counts_of(job.set, out, found, part)) for part, found in answers.items()},
        "cpu_s": clock.cpu_s, "wall_s": clock.wall_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "answers": answers["test"],
    }  # fmt: skip
    (out / f"{job.name}.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    print(f"{job.name}: validation {result['validation']:.4f} test {result['test']:.4f} cpu {clock.cpu_s:.0f} s")


def commit() -> str:
    """The commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()


def run(arguments: argparse.Namespace) -> None:
    """Every run that is asked for and not there yet, each in a process of its own."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        for seed in arguments.seeds:
            for lr in arguments.lr:
                for system in arguments.systems:
                    job = Job(name, system, lr, seed)
                    if not (arguments.out / f"{job.name}.json").exists():
                        places = [str(arguments.data.resolve()), str(arguments.out.resolve())]
                        words = [sys.executable, __file__, "one", *places, name, system, str(lr), str(seed)]
                        subprocess.run(words, check=False)


# Telling


def resampled(name: str, counts: np.ndarray) -> np.ndarray:
    """The score over RESAMPLES bootstrap samples of the examples; the same samples for every run of a set.

    Shapes: counts (..., N, K); result (..., RESAMPLES).
    """
    n = counts.shape[-2]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)  # times each example is drawn
    return TASKS[SETS[name].task].score(draws @ counts, n)


def interval(scores: np.ndarray) -> str:
    """The middle 95 %, in points."""
    low, high = np.quantile(scores, (0.025, 0.975)) * 100
    return f"{low:.2f} to {high:.2f}"


@dataclass(frozen=True)
class Found:
    """The runs of a system on a set at the learning rate that its validation part prefers, a seed each."""

    runs: Sequence[Row]
    tried: Sequence[float]  # learning rates

    @property
    def seeds(self) -> list[int]:
        return [run["seed"] for run in self.runs]

    def mean(self, key: str) -> float:
        return float(np.mean([run[key] for run in self.runs]))

    def counts(self, out: Path) -> np.ndarray:
        """Shapes: (seeds, N, K)."""
        return np.stack([counts_of(run["set"], out, run["answers"], "test") for run in self.runs])


def find(runs: Sequence[Row], name: str, system: str) -> Found | None:
    """What there is of a system on a set; of equally good learning rates the lowest."""
    mine = [run for run in runs if (run["set"], run["system"]) == (name, system)]
    tried = sorted({run["lr"] for run in mine})
    found = [Found([run for run in mine if run["lr"] == lr], tried) for lr in tried]
    return max(found, key=lambda each: each.mean("validation"), default=None)


def row(out: Path, found: Found) -> str:
    """One line of the table of scores."""
    first, name = found.runs[0], found.runs[0]["set"]
    scores = resampled(name, found.counts(out)).mean(0)
    lr = f"{first['lr']:g}" + (f" of {', '.join(f'{lr:g}' for lr in found.tried)}" if len(found.tried) > 1 else "")
    return (
        f"| {name}, {first['metric']} | `{first['system']}` | {lr} | {len(found.runs)} | {100 * found.mean('test'):.2f} "
        f"| {interval(scores)} | {100 * found.mean('validation'):.2f} | {first['epochs']} | {found.mean('cpu_s'):,.0f} "
        f"| {found.mean('wall_s'):,.0f} | {found.mean('peak_mb'):,.0f} |"
    )


def comparison(out: Path, ours: Found, theirs: Found) -> str:
    """One line of the paired table, over the seeds that both have."""
    name, seeds = ours.runs[0]["set"], [seed for seed in ours.seeds if seed in theirs.seeds]
    a, b = (np.stack([each.counts(out)[each.seeds.index(seed)] for seed in seeds]) for each in (ours, theirs))
    difference = (resampled(name, a) - resampled(name, b)).mean(0)
    points = 100 * np.mean([score_of(name, x) - score_of(name, y) for x, y in zip(a, b, strict=True)])
    seconds = ours.mean("cpu_s") / theirs.mean("cpu_s")
    return f"| {name} | {points:+.2f} | {interval(difference)} | {mcnemar(name, a[0], b[0])} | {seconds:.2f} |"


def mcnemar(name: str, a: np.ndarray, b: np.ndarray) -> str:
    """McNemar's exact test of two runs' right answers; none for scores that are no share of right answers."""
    if TASKS[SETS[name].task].counts is not right:
        return "-"
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return f"{only_a} against {only_b}, p = {p:.2f}"


def table(out: Path) -> None:
    """Print both tables in Markdown."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    found = {(name, system): find(runs, name, system) for name in SETS for system in SYSTEMS}
    print(
        "| set, score | system | lr | seeds | test | 95 % | validation | epochs | training, CPU s | wall s | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(row(out, each) for each in found.values() if each))
    print(
        "\n| set | `lora` - `rival`, points | 95 % | right where the other is wrong (McNemar, exact) | CPU time ratio |"
    )
    print("|---|---|---|---|---|")
    for name in SETS:
        ours, theirs = found[name, "lora"], found[name, "rival"]
        if ours and theirs and set(ours.seeds) & set(theirs.seeds):
            print(comparison(out, ours, theirs))
    print(
        f"\nCommits {', '.join(sorted({run['commit'] for run in runs}))}; {', '.join(sorted({run['date'] for run in runs}))}."
    )


def main() -> None:
    """Run or tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("data", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    verb.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["lora", "rival"])
    verb.add_argument("--lr", nargs="+", type=float, default=[1e-3])
    verb.add_argument("--seeds", nargs="+", type=int, default=[0])
    verbs.add_parser("table").add_argument("out", type=Path)
    verb = verbs.add_parser("one")  # what `run` starts
    for name, kind in (("data", Path), ("out", Path), ("set", str), ("system", str), ("lr", float), ("seed", int)):
        verb.add_argument(name, type=kind)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        run(arguments)
    elif arguments.verb == "table":
        table(arguments.out)
    else:
        one(Job(arguments.set, arguments.system, arguments.lr, arguments.seed), arguments.data, arguments.out)


if __name__ == "__main__":
    main()
