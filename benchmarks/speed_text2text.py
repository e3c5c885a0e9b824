"""Entities written by a T5: training and generation with lorakit, with the Trainer, and as notebooks do it.

Training follows recipes/conll-t5.toml (q and v of encoder blocks 1 and 2, batches of 8). All systems get the same token ids.
The weights are random but for `t5-demo-generate`; a random model never ends an output by itself: each runs to the limit.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from machine import Column, Spent, gemm_peak, measured
from speed_classification import BUNDLED, PACKED, Counting, Job, read_answers, timed, write_answers

R, ALPHA, LR, BATCH = 4, 16, 2e-4, 8
TARGETS = r"encoder\.block\.[12]\.layer\.0\.SelfAttention\.(q|v)"
INPUT_TOKENS, TARGET_TOKENS = 256, 64  # to which the notebook pads
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Text2Text:
    """One comparison."""

    title: str
    systems: tuple[str, ...]
    examples: int
    base: str = "t5-small"  # its shape


WRITERS = ("lorakit", "generate-8", "generate-64", "generate-256", "generate-notebook")
SCENARIOS = {
    "t5-train": Text2Text(
        "T5-small's shape, training to write entities",
        ("lorakit", "lorakit-dropout", "notebook", "b1", "peft-loop", "peft-sorted"),
        64,
    ),
    "t5-generate": Text2Text("T5-small's shape, writing 64 tokens a sentence", WRITERS, 256),
    "t5-demo-generate": Text2Text("t5-demo, writing entities of the bundled sentences", WRITERS, 128, "t5-demo"),
}
COLUMNS = (
    Column("examples/CPU s", "examples_per_cpu_s", "{:.2f}", spread=True),
    Column("lorakit is", "examples_per_cpu_s", "{:.2f}x", spread=True, ratio=True),
    Column("real tokens/CPU s", "tokens_per_cpu_s"),
    Column("padding", "padding", "{:.2f}"),
    Column("of the bound", "bound", "{:.0%}"),
    Column("examples/s", "examples_per_s", "{:.2f}"),
    Column("CPU s", "cpu_s", "{:.1f}"),
    Column("with everything", "whole_cpu_s", "{:.1f}"),
    Column("peak MB", "peak_mb"),
    Column("work adds", "added_mb"),
    Column("same outputs", "same", "{:.1%}"),
)


def make_files(spec: Text2Text, folder: Path, data: Path | None) -> None:
    """A file of sentences, the base, and the token ids of both."""
    part = "validation" if spec.base == "t5-demo" else "train"
    source = BUNDLED / f"entities-{part}.conll"
    if data is not None and spec.base != "t5-demo":
        source = data / "wnut17" / "wnut17train.conll"
    sentences = [s for s in source.read_text(encoding="utf-8").replace("\n\t\n", "\n\n").split("\n\n") if s.strip()]
    chosen = "\n\n".join(sentences[: spec.examples]) + "\n\n"
    (folder / f"{spec.base}-{spec.examples}.conll").write_text(chosen, encoding="utf-8")
    if spec.base == "t5-small" and not (folder / spec.base).exists():
        make_t5_small(folder / spec.base, data)
    _, items = prepared(Job(spec, "lorakit", folder, 0))
    ids = [{"input_ids": item["input_ids"], "labels": item["labels"]} for item in items]
    (folder / f"{spec.base}-{spec.examples}-items.json").write_text(json.dumps(ids), encoding="utf-8")


def make_t5_small(folder: Path, data: Path | None) -> None:
    """Random weights of T5-small's shape, with T5's tokenizer where DATA has it, else with the bytes of t5-demo."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from lorakit.models import find

    if data is not None:
        folder.mkdir()
        for file in (data / "t5_tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)
    else:
        AutoTokenizer.from_pretrained(find("t5-demo")).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def base_of(job: Job) -> str:
    """A built-in name, or a folder."""
    return job.spec.base if job.spec.base == "t5-demo" else str(job.folder / job.spec.base)


def recipe_of(job: Job) -> Any:
    """What a user writes."""
    from lorakit.recipe import make_recipe

    source = str(job.folder / f"{job.spec.base}-{job.spec.examples}.conll")
    return make_recipe(
        {
            "model": {"base": base_of(job), **({} if job.system == "lorakit-dropout" else {"dropout": 0.0})},
            "data": {"train": source, "validation": source},
            "task": {"name": "text2text_ner", "max_target_length": TARGET_TOKENS},
            "lora": {"r": R, "alpha": ALPHA, "target_modules": TARGETS},
            "train": {"epochs": 1, "batch_size": BATCH, "lr": LR, "seed": job.seed, "schedule": "constant", "warmup": 0.0},
        }
    )  # fmt: skip


def prepared(job: Job) -> tuple[Any, Sequence[Any]]:
    """What `prepare` makes of the recipe, and the items of its training part."""
    from lorakit.training.prepare import prepare

    found = prepare(recipe_of(job))
    return found, found.parts["train"].flat


def rows_of(job: Job) -> list[Row]:
    """The same items as lists of token ids."""
    rows: list[Row] = json.loads(
        (job.folder / f"{job.spec.base}-{job.spec.examples}-items.json").read_text(encoding="utf-8")
    )
    return rows


def run(job: Job) -> dict[str, float]:
    """What training, or writing, took."""
    work = TRAIN.get(job.system) if "train" in job.spec.title else None
    return run_training(job, work) if work else run_writing(job)


# Training


@dataclass
class Trained:
    """What training took, and how many tokens were processed."""

    config: Any
    spent: Spent
    padded: int


def run_training(job: Job, work: Callable[[Job], Trained]) -> dict[str, float]:
    """Rates over real tokens, of sources and targets."""
    rows = rows_of(job)
    trained = work(job)
    whole_cpu_s = time.process_time()
    spent, real = trained.spent, sum(len(row["input_ids"]) + len(row["labels"]) for row in rows)
    return {
        "examples_per_s": len(rows) / spent.wall_s,
        "examples_per_cpu_s": len(rows) / spent.cpu_s,
        "tokens_per_cpu_s": real / spent.cpu_s,
        "padding": trained.padded / real,
        "bound": bound_flops(trained.config, rows) / spent.cpu_s / gemm_peak(),
        "cpu_s": spent.cpu_s,
        "whole_cpu_s": whole_cpu_s,
        "peak_mb": spent.peak_mb,
        "added_mb": spent.added_mb,
    }


def bound_flops(config: Any, rows: Sequence[Row]) -> float:
    """FLOP that LoRA needs: forward and input gradient of encoder, decoder and output layer; no padding, no attention."""
    d, inner, ff = config.d_model, config.num_heads * config.d_kv, config.d_ff
    read = config.num_layers * (4 * d * inner + 2 * d * ff) + config.num_decoder_layers * 2 * d * inner
    written = config.num_decoder_layers * (6 * d * inner + 2 * d * ff) + d * config.vocab_size
    return sum(4 * (read * len(row["input_ids"]) + written * len(row["labels"])) for row in rows)


def lorakit_training(job: Job) -> Trained:
    """Whatever lorakit does by default."""
    from lorakit.training.loop import train
    from lorakit.training.run import Run

    ready, items = prepared(job)
    member = Run(ready, job.folder).member
    spent = Spent()
    with measured(spent):
        for _ in train(ready.model, [member]):
            pass
    batches = [[items[i] for i in batch] for batch in ready.plan.batches(0)]
    counts = [[len(item[key]) for item in batch] for batch in batches for key in ("input_ids", "labels")]
    padded = sum(sum(each) if PACKED in ready.kernels else len(each) * max(each) for each in counts)
    return Trained(ready.model.config, spent, padded)


def with_peft(job: Job, dtype: Any = None) -> Any:
    """The model with peft's adapter, over a base in fp32 unless another type is named."""
    import peft
    import torch
    from transformers import AutoModelForSeq2SeqLM, set_seed

    from lorakit.models import find

    set_seed(job.seed)
    return peft.get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(find(base_of(job))).to(dtype or torch.float32),
        peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=R, lora_alpha=ALPHA, target_modules=rf".*{TARGETS}"),
    )


def notebook_training(job: Job) -> Trained:
    """A plain loop over batches of 8 in random order, padded to 256 and 64 tokens."""
    import torch

    model, rows = with_peft(job), rows_of(job)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    spent, padded = Spent(), 0
    model.train()
    with measured(spent):
        for positions in torch.randperm(len(rows)).split(BATCH):
            chosen = [rows[i] for i in positions.tolist()]
            ids = filled([row["input_ids"] for row in chosen], INPUT_TOKENS, 0)
            labels = filled([row["labels"] for row in chosen], TARGET_TOKENS, -100)
            padded += ids.numel() + labels.numel()
            model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return Trained(model.config, spent, padded)


def filled(rows: Sequence[list[int]], size: int, value: int) -> Any:
    """Rows cut or filled up to a size. Shapes: (B, size)."""
    import torch

    return torch.tensor([[*row[:size], *[value] * (size - len(row))] for row in rows])


def trainer_training(job: Job) -> Trained:
    """Seq2SeqTrainer, each batch padded to its longest."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    from lorakit.models import find

    model, tokenizer = with_peft(job), AutoTokenizer.from_pretrained(find(base_of(job)))
    arguments = Seq2SeqTrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR,
        lr_scheduler_type="constant", seed=job.seed, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    collator, spent = Counting(DataCollatorForSeq2Seq(tokenizer, model)), Spent()
    callbacks = [timed(spent)]
    Seq2SeqTrainer(model, arguments, train_dataset=rows_of(job), data_collator=collator, callbacks=callbacks).train()
    return Trained(model.config, spent, collator.tokens)


def loop_training(job: Job, by_length: bool) -> Trained:
    """A plain loop in the type that lorakit takes, each batch padded to its longest, in random order or by length."""
    import torch

    model, rows = with_peft(job, best_dtype()), rows_of(job)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    spent, padded = Spent(), 0
    model.train()
    order = torch.randperm(len(rows))
    if by_length:
        order = torch.tensor([len(row["input_ids"]) for row in rows]).argsort()
    with measured(spent):
        for positions in order.split(BATCH):
            chosen = [rows[i] for i in positions.tolist()]
            columns = [[row[key] for row in chosen] for key in ("input_ids", "labels")]
            pairs = zip(columns, (0, -100), strict=True)
            ids, labels = (filled(column, max(map(len, column)), value) for column, value in pairs)
            padded += ids.numel() + labels.numel()
            model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return Trained(model.config, spent, padded)


def best_dtype() -> Any:
    """What `model.dtype = "auto"` takes on this machine."""
    import torch

    from lorakit.runtime.device import pick_dtype

    return pick_dtype("auto", "lora", torch.device("cpu"))


TRAIN: dict[str, Callable[[Job], Trained]] = {
    "lorakit": lorakit_training,
    "lorakit-dropout": lorakit_training,
    "peft-loop": lambda job: loop_training(job, by_length=False),
    "peft-sorted": lambda job: loop_training(job, by_length=True),
    "notebook": notebook_training,
    "b1": trainer_training,
}


# Generation


def run_writing(job: Job) -> dict[str, float]:
    """What writing took, and whether the outputs are lorakit's."""
    write, spent = WRITE[job.system](job), Spent()
    with measured(spent):
        outputs = write()
    whole_cpu_s = time.process_time()
    result = {
        "examples_per_s": len(outputs) / spent.wall_s,
        "examples_per_cpu_s": len(outputs) / spent.cpu_s,
        "tokens_per_cpu_s": sum(map(len, outputs)) / spent.cpu_s,
        "cpu_s": spent.cpu_s,
        "whole_cpu_s": whole_cpu_s,
        "peak_mb": spent.peak_mb,
        "added_mb": spent.added_mb,
    }
    if job.system == "lorakit":
        write_answers(job, outputs)
        return result
    same = [a == b for a, b in zip(outputs, read_answers(job), strict=True)]
    return {**result, "same": sum(same) / len(same)}


def lorakit_writing(job: Job) -> Callable[[], list[list[int]]]:
    """What evaluation and prediction call, over an adapter that changes nothing yet."""
    from lorakit.inference.answer import predict_all

    ready, _ = prepared(job)
    items = ready.parts["validation"].items

    def write() -> list[list[int]]:
        raws = predict_all(ready.model, ready.task, items, ready.device)
        return [list(raw.ids) for (raw,) in raws]

    return write


def generating(job: Job, size: int, pad_to: int | None) -> Callable[[], list[list[int]]]:
    """`generate` of transformers without an adapter: as a notebook has it, or at its best, in lorakit's type and by length."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from lorakit.models import find

    model = (
        AutoModelForSeq2SeqLM.from_pretrained(find(base_of(job))).to(torch.float32 if pad_to else best_dtype()).eval()
    )
    rows = [row["input_ids"] for row in rows_of(job)]
    order = sorted(range(len(rows)), key=lambda i: 0 if pad_to else len(rows[i]))

    def write() -> list[list[int]]:
        outputs: dict[int, list[int]] = {}
        for start in range(0, len(rows), size):
            places = order[start : start + size]
            some = [rows[i] for i in places]
            ids = filled(some, pad_to or max(map(len, some)), 0)
            with torch.no_grad():
                found = model.generate(
                    input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=TARGET_TOKENS, do_sample=False, num_beams=1
                )  # fmt: skip
            outputs |= {
                i: ended(row[1:], model.config.eos_token_id) for i, row in zip(places, found.tolist(), strict=True)
            }
        return [outputs[i] for i in range(len(rows))]

    return write


def ended(ids: list[int], eos: int) -> list[int]:
    """The ids to their end token."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids


WRITE: dict[str, Callable[[Job], Callable[[], list[list[int]]]]] = {
    "lorakit": lorakit_writing,
    **{f"generate-{size}": partial(generating, size=size, pad_to=None) for size in (8, 64, 256)},
    "generate-notebook": partial(generating, size=8, pad_to=INPUT_TOKENS),
}
