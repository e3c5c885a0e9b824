"""`lorakit export --to onnx`: a model that answers without torch, in fp32 and int8, asked beside the model it came from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakit.app.console import digits
from lorakit.app.export.adapters import NO_CRF
from lorakit.app.export.check import Texts, agree, bare, check_exact, texts_of
from lorakit.app.export.graphs import OPSET, OnnxReader, OnnxWriter, hushed, named, write_reader, write_writer
from lorakit.app.printing import Output
from lorakit.errors import ConfigError
from lorakit.inference.adapter_folder import load_shipped, read_side, shipped_folder
from lorakit.inference.side import SIDE_FILE, Side
from lorakit.lora import merge_and_unload
from lorakit.models import BaseModel, save_plain
from lorakit.runtime.files import atomic_folder
from lorakit.tasks.base import Batch, Task, inputs_of
from lorakit.tasks.registry import make_task

ONNX = "onnx"
QUANTIZED = "_quantized"  # what transformers.js and optimum put behind a name
ENOUGH = 0.99  # share of answers that int8 should leave as they are
TIMED, REPEATS = 32, 5  # texts of a batch that is timed, and how often


class Form(NamedTuple):
    """How a kind of model is written, and what takes its place when it is read back."""

    write: Callable[[nn.Module, Batch, Path], list[Path]]
    read: Callable[..., nn.Module]  # from a folder, beside the model, and the suffix of the files' names


READER, WRITER = Form(write_reader, OnnxReader), Form(write_writer, OnnxWriter)


class Trial(NamedTuple):
    """A model, and what it is asked to prove an export of it."""

    side: Side
    task: Task
    texts: Texts
    model: nn.Module


def export_onnx(path: Path, out: Path, *, int8: bool = False, allow_base_mismatch: bool = False) -> Output:
    """Write a run's or an adapter's model, merged and in fp32, as ONNX files; the lines say how it was checked.

    Raises:
        ConfigError: a package is missing, or torch cannot express the model.
        RuntimeError: the export's logits are not the model's; nothing is written.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise ConfigError(f"--to onnx needs {err.name}: pip install 'lorakit[onnx]'") from err
    folder = shipped_folder(path)
    side = read_side(folder)
    base = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch)
    task = _free(side, base)
    texts = texts_of(path, side)
    form = WRITER if task.info.model_kind == "text2text" else READER
    with atomic_folder(out) as place:
        if side.method != "full":
            merge_and_unload(base.model)
        two = task.encode([bare(task, text) for text in texts.examples[texts.n_own :][:2]])
        batch = inputs_of(task.collate([item for own in two for item in own]))
        files = form.write(base.model.eval(), batch, place)
        _write_beside(base, task, side, place)
        del base  # the model it is compared with is another one, whose adapter is not merged
        model = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch).model.eval()
        trial = Trial(side, task, texts, model)
        output = Output([NO_CRF] * side.task.crf, {}).plus(_prove(trial, form.read(place, model), files))
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            with hushed():  # a scale for each output channel; activations are rounded as they come
                for file in files:
                    to = named(file, QUANTIZED)
                    quantize_dynamic(file, to, weight_type=QuantType.QInt8, per_channel=True)
            output = output.plus(_prove_int8(trial, form.read(place, model, QUANTIZED), files))
    return output


def _free(side: Side, base: BaseModel) -> Task:
    """The run's task as any client can do it: what is written is not held to a form, and a CRF is left out."""
    changes = {key: False for key in ("constrained", "crf") if getattr(side.task, key)}
    return make_task(side.task.model_copy(update=changes), base.tokenizer, side.labels, side.max_length, side.tuned)


def _write_beside(base: BaseModel, task: Task, side: Side, place: Path) -> None:
    """Write the tokenizer, config.json, and lorakit.json: what a client needs to make answers of logits."""
    save_plain(base, place)
    tuned = {key: value for key, value in side.tuned.items() if key != "temperature" or side.task.calibrate}
    facts = {
        "export": ONNX,
        "opset": OPSET,
        "task": task.info.name,
        "labels": side.labels,
        "outputs": () if task.info.model_kind == "text2text" else task.info.outputs(side.labels),
        "pairs": side.columns.pair is not None,
        "max_length": side.max_length,
        **{key: getattr(task, key) for key in ("prefix", "max_target_length") if hasattr(task, key)},
        **tuned,
        "base": side.base.model_dump(),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (place / SIDE_FILE).write_text(text + "\n", encoding="utf-8")


def _prove(trial: Trial, export: nn.Module, files: Sequence[Path]) -> Output:
    agreement = agree(trial.task, trial.side, trial.texts, trial.model, export)
    check_exact(agreement)
    ms, torch_ms = _batch_ms(trial, export), _batch_ms(trial, trial.model)
    size = _size_mb(files)
    line = (
        f"{', '.join(file.name for file in files)}: {size:.1f} MB, opset {OPSET}; {TIMED} texts take {ms:.0f} ms, "
        f"in PyTorch {torch_ms:.0f} ms ({torch.get_num_threads()} threads)"
    )
    facts = {"check": agreement.facts(), "size_mb": size, "batch_ms": ms, "pytorch_batch_ms": torch_ms}
    return Output([agreement.line(), line], facts)


def _prove_int8(trial: Trial, export: nn.Module, files: Sequence[Path]) -> Output:
    agreement = agree(trial.task, trial.side, trial.texts, trial.model, export)
    ms, size = _batch_ms(trial, export), _size_mb([named(file, QUANTIZED) for file in files])
    line = (
        f"int8 ({QUANTIZED}): {size:.1f} MB, {TIMED} texts take {ms:.0f} ms; logits differ by at most "
        f"{agreement.logits:.2g} (largest {agreement.largest_logit:.3g}), {agreement.same:.1%} of the answers are the same"
    )
    facts: dict[str, Any] = {"check": agreement.facts(), "size_mb": size, "batch_ms": ms}
    lines = [line]
    if agreement.before:
        metric = trial.side.task.selection_metric
        before, after = (scores[metric] for scores in (agreement.before, agreement.after))
        shown = f"{digits(before)}, of int8 {digits(after)}"
        lines.append(f"{metric} on {agreement.texts.n_gold:,} validation texts: {shown}")
        facts["scores"] = {metric: [before, after]}
    if agreement.same < ENOUGH:
        lines.append(
            f"warning: int8 answers {1 - agreement.same:.1%} of the texts otherwise; the other files are exact"
        )
    return Output(lines, {"int8": facts})


def _size_mb(files: Sequence[Path]) -> float:
    """The size of ONNX files, with that of the weights beside them."""
    both = [path for file in files for path in (file, file.with_name(file.name + ".data")) if path.is_file()]
    return sum(path.stat().st_size for path in both) / 1e6


@torch.inference_mode()
def _batch_ms(trial: Trial, model: nn.Module) -> float:
    """The time that one batch takes, tokenizing left out, in milliseconds: the best of several."""
    encoded = trial.task.encode([bare(trial.task, example) for example in trial.texts.examples[:TIMED]])
    batch = trial.task.collate([item for own in encoded for item in own])
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        trial.task.predict(model, batch)
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)
