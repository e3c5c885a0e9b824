"""Training a classifier with LoRA: lorakit, the Hugging Face Trainer with peft in several settings, and peft in a plain loop.

All see the same texts, have the same adapter, batch size, learning rate and schedule. Times are of the training loop alone,
and of the whole process up to its end.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import Column, Spent, gemm_peak, measured

BUNDLED = Path(__file__).parent.parent / "src" / "lorakit" / "demo"
ALPHA, LR, BATCH, WARMUP, WEIGHT_DECAY, MAX_LENGTH = 16, 1e-3, 32, 0.06, 0.01, 128
PACKED = "no work on padding"  # one of the kernels of a run
Lines = list[dict[str, str]]


@dataclass(frozen=True)
class Training:
    """One comparison."""

    title: str
    systems: tuple[str, ...]
    base: str = "minilm"
    targets: str | tuple[str, ...] = ("query", "value")
    r: int = 4
    examples: int = 256
    epochs: int = 1
    scored: bool = False  # by the held-out part, once trained


RIVALS = ("b0", "b1", "b1-bf16", "b2", "b2-fp32", "peft-loop")
SCENARIOS: dict[str, Training] = {
    "minilm-qv": Training("MiniLM-L6, query and value, r 4", ("lorakit", "lorakit-dropout", *RIVALS)),
    "minilm-all": Training(
        "MiniLM-L6, all linear layers, r 8", ("lorakit", "b1", "b2-fp32", "peft-loop"), targets="all-linear", r=8
    ),
    "bert-base": Training(
        "BERT-base's shape, random weights, query and value, r 4", ("lorakit", "b1", "b2-fp32"), base="bert-base", examples=128
    ),
    "accuracy": Training(
        "MiniLM-L6, query and value, r 4, to the end", ("lorakit", "b1"), examples=1500, epochs=2, scored=True
    ),
    "memory": Training(
        "MiniLM-L6, all linear layers, r 8, three epochs of 2,000 texts",
        ("lorakit", "b1", "b1-bf16"), targets="all-linear", r=8, examples=2000, epochs=3
    ),
}  # fmt: skip


COLUMNS = (
    Column("examples/CPU s", "examples_per_cpu_s", "{:.1f}", spread=True),
    Column("lorakit is", "examples_per_cpu_s", "{:.2f}x", spread=True, ratio=True),
    Column("real tokens/CPU s", "tokens_per_cpu_s"),
    Column("padding", "padding", "{:.2f}"),
    Column("of the bound", "bound", "{:.0%}"),
    Column("examples/s", "examples_per_s", "{:.1f}"),
    Column("CPU s, training", "cpu_s", "{:.1f}"),
    Column("with everything", "whole_cpu_s", "{:.1f}"),
    Column("wall s with everything", "whole_s", "{:.0f}"),
    Column("peak MB", "peak_mb"),
    Column("training adds", "added_mb"),
    Column("accuracy", "accuracy", "{:.3f}", spread=True),
)


@dataclass(frozen=True)
class Way:
    """How the Trainer goes about it."""

    padded: bool = False  # to MAX_LENGTH, else to the longest of a batch
    bf16: bool = False  # autocast
    by_length: bool = False  # texts of similar length share a batch


TRAINERS = {
    "b0": Way(padded=True),
    "b1": Way(),
    "b1-bf16": Way(bf16=True),
    "b2": Way(bf16=True, by_length=True),
    "b2-fp32": Way(by_length=True),
}


@dataclass(frozen=True)
class Job:
    """One run of one system."""

    spec: Any  # Training, or what another family has for it
    system: str
    folder: Path  # with train.jsonl, validation.jsonl, and the bases of random weights
    seed: int

    @property
    def base(self) -> str:
        """minilm, or a folder."""
        return self.spec.base if self.spec.base == "minilm" else str(self.folder / self.spec.base)

    @property
    def steps(self) -> int:
        return self.spec.epochs * -(-self.spec.examples // BATCH)

    def lines(self, part: str) -> Lines:
        """The texts and labels of a part."""
        text = (self.folder / f"{part}.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.split("\n") if line]
        return lines[: self.spec.examples] if part == "train" else lines


def write_answers(job: Job, answers: list[Any]) -> None:
    """Keep lorakit's answers, which those of the others are compared with."""
    answers_file(job).write_text(json.dumps(answers), encoding="utf-8")


def read_answers(job: Job) -> list[Any]:
    """lorakit's answers."""
    answers: list[Any] = json.loads(answers_file(job).read_text(encoding="utf-8"))
    return answers


def answers_file(job: Job) -> Path:
    """Where the answers to these examples are."""
    name = "".join(c if c.isalnum() else "-" for c in job.spec.title)
    return job.folder / f"answers-{name}.json"


def make_files(spec: Training, folder: Path, data: Path | None) -> None:
    """The texts, those of SST-2's sentences where the folder with them is named, and the base of random weights."""
    from lorakit.data.read import read

    sources = {part: BUNDLED / f"reviews-{part}.csv" for part in ("train", "validation")}
    if data is not None:
        sources = {
            "train": data / "sst2_sentence" / "stsa.binary.train",
            "validation": data / "sst2_sentence" / "stsa.binary.dev",
        }
    for part, source in sources.items():
        examples = list(read(str(source)).examples)
        random.Random(0).shuffle(examples)
        lines = [json.dumps({"text": example.text, "label": example.label}) + "\n" for example in examples]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    if spec.base != "minilm" and not (folder / spec.base).exists():
        make_bert_base(folder / spec.base)


def make_bert_base(folder: Path) -> None:
    """Random weights of BERT-base's shape, with MiniLM's tokenizer, whose vocabulary is BERT's."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from lorakit.models import find

    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(find("minilm")).save_pretrained(folder)


def run(job: Job) -> dict[str, float]:
    """What the training took, and what it gave."""
    trained = TRAIN[job.system](job)
    whole_cpu_s = time.process_time()
    spent, lengths = trained.spent, trained.lengths
    n = len(lengths) * job.spec.epochs
    flops = job.spec.epochs * bound_flops(trained.model.config, lengths)
    result = {
        "examples_per_s": n / spent.wall_s,
        "examples_per_cpu_s": n / spent.cpu_s,
        "tokens_per_cpu_s": job.spec.epochs * sum(lengths) / spent.cpu_s,
        "padding": trained.padded / (job.spec.epochs * sum(lengths)),
        "cpu_s": spent.cpu_s,
        "whole_cpu_s": whole_cpu_s,
        "peak_mb": spent.peak_mb,
        "added_mb": spent.added_mb,
        "bound": flops / spent.cpu_s / gemm_peak(),
    }
    if job.spec.scored:
        result["accuracy"] = trained.accuracy()
    return result


def bound_flops(config: Any, lengths: Sequence[int], trained: bool = True) -> float:
    """FLOP of texts of these lengths: forward, and input gradient where it is trained; no padding, no adapter."""
    d, layers = config.hidden_size, config.num_hidden_layers
    linear, attention = layers * (4 * d * d + 2 * d * config.intermediate_size), layers * d
    passes = (2, 3) if trained else (1, 1)  # of the linear layers, whose weights get no gradient, and of attention
    return sum(2 * passes[0] * linear * t + 4 * passes[1] * attention * t * t for t in lengths)


@dataclass
class Trained:
    """A model, what training it took, and how many tokens it had to process."""

    model: Any
    spent: Spent
    lengths: Sequence[int]  # real tokens of each text
    padded: int  # tokens processed over all epochs
    accuracy: Callable[[], float]


# lorakit, as a user calls it


def lorakit_system(job: Job, **model: Any) -> Trained:
    """Whatever lorakit does by default."""
    from lorakit.inference.answer import answer_all
    from lorakit.recipe import make_recipe
    from lorakit.training.loop import train
    from lorakit.training.prepare import prepare
    from lorakit.training.run import Run

    recipe = make_recipe(
        {
            "model": {"base": job.base, "pooling": "cls", **model},  # what the rivals read
            "data": {"train": str(subset(job)), "validation": str(job.folder / "validation.jsonl"), "max_length": MAX_LENGTH},
            "lora": {"r": job.spec.r, "alpha": ALPHA, "target_modules": job.spec.targets},
            "train": {
                "epochs": job.spec.epochs, "batch_size": BATCH, "lr": LR, "seed": job.seed,
                "warmup": WARMUP, "weight_decay": WEIGHT_DECAY,
            },
        }
    )  # fmt: skip
    prepared = prepare(recipe)
    plan = prepared.plan
    member = Run(prepared, job.folder).member
    spent = Spent()
    with measured(spent):
        for _ in train(prepared.model, [member]):
            pass
    held_out = prepared.parts["validation"]

    def accuracy() -> float:
        answers = answer_all(prepared.model, prepared.task, held_out.examples, held_out.items, prepared.device)
        return float(prepared.task.evaluate(held_out.examples, answers).scores["accuracy"])

    batches = [[plan.lengths[i] for i in batch] for batch in plan.batches(0)]
    padded = sum(plan.lengths) if PACKED in prepared.kernels else sum(len(batch) * max(batch) for batch in batches)
    return Trained(prepared.model, spent, plan.lengths, padded * job.spec.epochs, accuracy)


def subset(job: Job) -> Path:
    """The file of the first training examples, which is made if it is not there."""
    path = job.folder / f"train-{job.spec.examples}.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(line) + "\n" for line in job.lines("train")), encoding="utf-8")
    return path


# The rivals


def with_peft(job: Job) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The model with peft's adapter, its tokenizer, and the training rows."""
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    from lorakit.models import find

    set_seed(job.seed)
    folder = find(job.base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
        peft.LoraConfig(
            task_type="SEQ_CLS", r=job.spec.r, lora_alpha=ALPHA, modules_to_save=["classifier"],
            target_modules=job.spec.targets if isinstance(job.spec.targets, str) else list(job.spec.targets),
        ),
    )  # fmt: skip
    padding = TRAINERS.get(job.system, Way()).padded
    return model, tokenizer, encoded(tokenizer, job.lines("train"), padding)


def encoded(tokenizer: Any, lines: Lines, padded: bool = False) -> list[dict[str, Any]]:
    """Rows as transformers' collators take them."""
    labels = sorted({line["label"] for line in lines})
    texts = [line["text"] for line in lines]
    options = {"truncation": True, "max_length": MAX_LENGTH, "padding": "max_length" if padded else False}
    found = tokenizer(texts, **options)
    keys = ("input_ids", "attention_mask")
    return [
        {**{key: found[key][i] for key in keys}, "labels": labels.index(line["label"])} for i, line in enumerate(lines)
    ]


def trainer_system(job: Job) -> Trained:
    """The Trainer of transformers."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    way, spent = TRAINERS[job.system], Spent()
    model, tokenizer, rows = with_peft(job)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=job.spec.epochs,
        learning_rate=LR, weight_decay=WEIGHT_DECAY, warmup_steps=round(WARMUP * job.steps), seed=job.seed, bf16=way.bf16,
        train_sampling_strategy="group_by_length" if way.by_length else "random",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    collator = Counting(DataCollatorWithPadding(tokenizer))
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[timed(spent)]).train()
    return Trained(model, spent, lengths_of(rows), collator.tokens, lambda: rival_accuracy(job, model, tokenizer))


def timed(spent: Spent) -> Any:
    """A callback of the Trainer that measures its steps alone."""
    from transformers import TrainerCallback

    watch = measured(spent)

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.__enter__()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            watch.__exit__(None, None, None)

    return Timed()


def loop_system(job: Job) -> Trained:
    """peft's model in a plain PyTorch loop, as one writes it by hand."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

    model, tokenizer, rows = with_peft(job)
    collator = Counting(DataCollatorWithPadding(tokenizer))
    loader = DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=collator)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * job.steps), job.steps)
    spent = Spent()
    model.train()
    with measured(spent):
        for _ in range(job.spec.epochs):
            for batch in loader:
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return Trained(model, spent, lengths_of(rows), collator.tokens, lambda: rival_accuracy(job, model, tokenizer))


class Counting:
    """A collator that counts the tokens of the batches it makes, of sources and of targets that are written."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate
        self.tokens = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collate(rows)
        self.tokens += batch["input_ids"].numel() + (batch["labels"].numel() if batch["labels"].ndim > 1 else 0)
        return batch


def lengths_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Real tokens of each row."""
    return [sum(row["attention_mask"]) for row in rows]


def rival_accuracy(job: Job, model: Any, tokenizer: Any) -> float:
    """On the held-out part, texts of similar length together."""
    import torch
    from transformers import DataCollatorWithPadding

    rows = sorted(encoded(tokenizer, job.lines("validation")), key=lambda row: len(row["input_ids"]))
    collate, right = DataCollatorWithPadding(tokenizer), 0
    model.eval()
    for i in range(0, len(rows), 64):
        batch = collate(rows[i : i + 64])
        with torch.inference_mode():
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


TRAIN: dict[str, Callable[[Job], Trained]] = {
    "lorakit": lambda job: lorakit_system(job, dropout=0.0),
    "lorakit-dropout": lorakit_system,
    "lorakit-plain": lambda job: lorakit_system(job, dropout=0.0, kernels="plain"),
    "peft-loop": loop_system,
    **dict.fromkeys(TRAINERS, trainer_system),
}
