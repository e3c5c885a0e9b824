"""`lorakit export --to onnx`: a model that answers without torch, in fp32 and int8, asked beside the model it came from.

Names of files, inputs and outputs are optimum's.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.app.console import digits
from lorakit.app.export.adapters import NO_CRF
from lorakit.app.export.check import Agreement, agree, bare, check_exact, texts_of
from lorakit.app.printing import Output
from lorakit.data.example import Example
from lorakit.errors import ConfigError, first_line
from lorakit.inference.adapter_folder import load_shipped, read_side, shipped_folder
from lorakit.inference.side import SIDE_FILE, Side
from lorakit.lora import merge_and_unload
from lorakit.models import save_plain
from lorakit.runtime.files import atomic_folder
from lorakit.tasks.base import Batch, Task, inputs_of
from lorakit.tasks.registry import make_task

ONNX, QUANTIZED = "model.onnx", "model_quantized.onnx"
OPSET = 20  # the first with GELU as one operator
ONE_FILE = 2**31 - 2**27  # bytes of weights that fit a protobuf file; more go to a second one
AXES = {0: "batch_size", 1: "sequence_length"}  # of every input, of any size
HUSHED = (  # what torch's exporter warns of whatever is exported
    r"# The axis name: .* will not be used",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
ENOUGH = 0.99  # share of answers that int8 should leave as they are
TIMED, REPEATS = 32, 5  # texts of a batch that is timed, and how often


def export_onnx(path: Path, out: Path, *, int8: bool = False, allow_base_mismatch: bool = False) -> Output:
    """Write a run's or an adapter's model, merged and in fp32, as an ONNX file; the lines say how it was checked.

    Raises:
        ConfigError: a package is missing, the model writes its answers, or torch cannot express it.
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
    if side.task.info.model_kind == "text2text":
        raise ConfigError(
            f"--to onnx: {path} generates text; export it with --to merged, then use optimum "
            "(optimum-cli export onnx --model FOLDER OUT)"
        )
    base = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch)
    section = side.task.model_copy(update={"crf": False}) if side.task.crf else side.task
    task = make_task(section, base.tokenizer, side.labels, side.max_length, side.tuned)
    texts = texts_of(path, side)
    of_length_1 = "vectors: not normalised; divide each by its length (task.normalize)"
    output = Output([NO_CRF] * side.task.crf + [of_length_1] * bool(side.task.normalize), {})
    with atomic_folder(out) as place:
        if side.method != "full":
            merge_and_unload(base.model)
        _write(base.model.eval(), inputs_of(_batch(task, texts.examples[texts.n_own :][:2])), place / ONNX)
        save_plain(base, place)
        _write_side(task, side, place)
        del base  # the model it is compared with is another one, whose adapter is not merged
        model = load_shipped(folder, side, allow_base_mismatch=allow_base_mismatch).model.eval()
        timed = _batch(task, texts.examples[:TIMED])

        def measure(file: Path) -> tuple[Agreement, dict[str, Any]]:
            export = OnnxModel(file, model)
            agreement = agree(task, side, texts, model, export)
            facts = {"check": agreement.facts(), "size_mb": _size_mb(file), "batch_ms": _batch_ms(task, export, timed)}
            return agreement, facts

        agreement, facts = measure(place / ONNX)
        check_exact(agreement)
        facts["pytorch_batch_ms"] = torch_ms = _batch_ms(task, model, timed)
        line = (
            f"{ONNX}: {facts['size_mb']:.1f} MB, opset {OPSET}; {TIMED} texts take {facts['batch_ms']:.0f} ms, "
            f"in PyTorch {torch_ms:.0f} ms (threads: {torch.get_num_threads()})"
        )
        output = output.plus(Output([agreement.line(), line], facts))
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            with hushed():  # a scale for each output channel; activations are rounded as they come
                quantize_dynamic(place / ONNX, place / QUANTIZED, weight_type=QuantType.QInt8, per_channel=True)
            output = output.plus(_cost_of_int8(*measure(place / QUANTIZED), side.task.selection_metric))
    return output


def _batch(task: Task, examples: Sequence[Example]) -> Batch:
    """A batch of some texts."""
    encoded = task.encode([bare(task, example) for example in examples])
    return task.collate([item for own in encoded for item in own])


class Logits(nn.Module):
    """A model's logits, as a function of tensors in the order of their names."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Shapes: tensors (B, T); logits (B, C), of tokens (B, T, C)."""
        logits: Tensor = self.model(**dict(zip(self.names, tensors, strict=True))).logits
        return logits


def _write(model: nn.Module, batch: Batch, file: Path) -> None:
    """Write the model as an ONNX file. Raises a ConfigError where torch cannot express it."""
    try:
        with hushed(), torch.no_grad():
            torch.onnx.export(
                Logits(model, list(batch)).eval(),
                tuple(batch.values()),
                file,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(tuple(dict(AXES) for _ in batch),),
                input_names=list(batch),
                output_names=["logits"],
                external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > ONE_FILE,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as err:
        raise ConfigError(
            f"torch cannot write this model as ONNX ({first_line(err)}); --to merged keeps it in PyTorch"
        ) from err


@contextmanager
def hushed() -> Iterator[None]:
    """Without what the exporting libraries say of every model."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in HUSHED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logging.disable(disabled)


class OnnxModel(nn.Module):
    """An ONNX file in the place of the model it came from, on as many threads as torch uses."""

    def __init__(self, file: Path, model: Any) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.config = model.config

    def forward(self, **inputs: Tensor) -> Any:
        """Shapes: inputs (B, T); logits (B, C), of tokens (B, T, C)."""
        (logits,) = self.session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})
        return SimpleNamespace(logits=torch.from_numpy(logits))


def _write_side(task: Task, side: Side, place: Path) -> None:
    """Write lorakit.json: what a client needs to make answers of logits."""
    tuned = {key: value for key, value in side.tuned.items() if key != "temperature" or side.task.calibrate}
    facts = {
        "export": "onnx",
        "opset": OPSET,
        "task": task.info.name,
        "labels": side.labels,
        "outputs": task.info.outputs(side.labels),
        "pairs": side.columns.pair is not None,
        "max_length": side.max_length,
        **tuned,
        "base": side.base.model_dump(),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (place / SIDE_FILE).write_text(text + "\n", encoding="utf-8")


def _cost_of_int8(agreement: Agreement, facts: dict[str, Any], metric: str) -> Output:
    lines = [
        f"int8 ({QUANTIZED}): {facts['size_mb']:.1f} MB, {TIMED} texts take {facts['batch_ms']:.0f} ms; logits differ by at most "
        f"{agreement.logits:.2g} (largest {agreement.largest_logit:.3g}), {agreement.same:.1%} of the answers are the same"
    ]
    if agreement.before:
        before, after = (scores[metric] for scores in (agreement.before, agreement.after))
        shown = f"{digits(before)}, of int8 {digits(after)}"
        lines.append(f"{metric} on {agreement.texts.n_gold:,} validation texts: {shown}")
        facts["scores"] = {metric: [before, after]}
    if agreement.same < ENOUGH:
        lines.append(f"warning: int8 changes {1 - agreement.same:.1%} of the answers; {ONNX} is exact")
    return Output(lines, {"int8": facts})


def _size_mb(file: Path) -> float:
    """The size of an ONNX file, with that of the weights beside it."""
    both = (file, file.with_name(file.name + ".data"))
    return sum(path.stat().st_size for path in both if path.is_file()) / 1e6


@torch.inference_mode()
def _batch_ms(task: Task, model: nn.Module, batch: Batch) -> float:
    """The time that one batch takes, tokenizing left out, in milliseconds: the best of several."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        task.predict(model, batch)
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)
