"""Training speed of lorakit against the Hugging Face Trainer with peft, on the same model, data and adapter.

    python benchmarks/training_speed.py                      # bundled reviews, minilm
    python benchmarks/training_speed.py --data train.tsv --repeats 5

Every run is a process of its own; runs are interleaved (A B A B ...), since machines drift; the ratio is taken pair by
pair. Rivals: `padded` pads each text to 128 tokens as most tutorials do, `dynamic` pads to the longest of a random batch
(the Trainer's default). Loading and tokenising are left out of every time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = ("lorakit", "dynamic", "padded")
BUNDLED = Path(__file__).parent.parent / "src" / "lorakit" / "demo" / "reviews-train.csv"
R, ALPHA, LR, BATCH, TARGETS = 4, 16, 1e-3, 32, ("query", "value")
PAD_TO = 128  # tokens


def examples(path: str, most: int) -> tuple[list[str], list[int]]:
    """The first texts of a data set and their labels as numbers."""
    from lorakit.data.read import read

    chosen = read(path).examples[:most]
    names = sorted({example.label or "" for example in chosen})
    return [example.text for example in chosen], [names.index(example.label or "") for example in chosen]


def measure_lorakit(path: str, most: int) -> dict[str, float]:
    """Examples per second of one epoch with lorakit."""
    from lorakit.data.example import Example
    from lorakit.engine.prepare import trained_parameters
    from lorakit.engine.train import Plan, make_optimizer, train
    from lorakit.lora import LoraConfig, add_adapter
    from lorakit.models import load_base
    from lorakit.recipe import TrainSection
    from lorakit.tasks.sequence_classification import SequenceClassification

    texts, labels = examples(path, most)
    base = load_base("minilm", "sequence_classification", labels=("0", "1"))
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=base.saved_modules)
    add_adapter(base.model, config)
    task = SequenceClassification(base.tokenizer, ("0", "1"), PAD_TO)
    items = task.encode([Example(text, str(label)) for text, label in zip(texts, labels, strict=True)])
    settings = TrainSection(epochs=1, batch_size=BATCH, lr=LR)
    plan = Plan([len(item["input_ids"]) for item in items], settings)
    optimizer = make_optimizer(*trained_parameters(base.model), settings)
    start = time.perf_counter()
    steps = list(train(base.model, task, items, optimizer, plan))
    seconds = time.perf_counter() - start
    padded = sum(len(batch) * max(plan.lengths[i] for i in batch) for batch in plan.batches(0))
    seen = sum(step.examples for step in steps)
    return {"examples_per_s": seen / seconds, "padding": padded / sum(plan.lengths)}


def measure_trainer(path: str, most: int, pad: bool) -> dict[str, float]:
    """Examples per second of one epoch with transformers.Trainer and peft."""
    import peft
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from lorakit.models import find

    texts, labels = examples(path, most)
    base = find("minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    padding = "max_length" if pad else False
    encoded = tokenizer(texts, truncation=True, max_length=PAD_TO, padding=padding)["input_ids"]
    rows = [
        {"input_ids": ids, "attention_mask": [int(i != tokenizer.pad_token_id) for i in ids], "labels": label}
        for ids, label in zip(encoded, labels, strict=True)
    ]
    model = peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2),
        peft.LoraConfig(task_type="SEQ_CLS", r=R, lora_alpha=ALPHA, target_modules=list(TARGETS)),
    )
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    start = time.perf_counter()
    trainer.train()
    return {"examples_per_s": len(rows) / (time.perf_counter() - start)}


def one(who: str, path: str, most: int, threads: int) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    return measure_lorakit(path, most) if who == "lorakit" else measure_trainer(path, most, who == "padded")


def in_process(who: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", who, "--data", arguments.data]
    command += ["--examples", str(arguments.examples), "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def about() -> str:
    """Versions, threads and what the processor can do."""
    import peft
    import torch
    import transformers

    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()} {' '.join(units)}"
    )


def main() -> None:
    """Measure in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(BUNDLED))
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.data, arguments.examples, arguments.threads)))
        return
    print(about())
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in MODELS}
    for _ in range(arguments.repeats):
        for who in MODELS:
            runs[who].append(in_process(who, arguments))
    rates = {who: [run["examples_per_s"] for run in found] for who, found in runs.items()}
    print(f"padding: {runs['lorakit'][0]['padding']:.3f} tokens processed a real one (lorakit)")
    for who in MODELS:
        ratios = [ours / theirs for ours, theirs in zip(rates["lorakit"], rates[who], strict=True)]
        spread = f"{min(rates[who]):.1f} to {max(rates[who]):.1f}"
        print(
            f"{who:<8} {statistics.median(rates[who]):7.1f} examples/s ({spread})   "
            f"lorakit is {statistics.median(ratios):.2f}x as fast"
        )


if __name__ == "__main__":
    main()
