"""Models as ONNX files, and ONNX files in the place of models. Names of files, inputs and outputs are optimum's."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError, first_line
from lorakit.models import decoder_cache
from lorakit.tasks.base import Batch

OPSET = 20  # the first with GELU as one operator
READER = "model.onnx"
ENCODER, FIRST, NEXT = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
ONE_FILE = 2**31 - 2**27  # bytes of weights that fit a protobuf file; more go to a second one
HUSHED = (  # what torch's exporter warns of whatever is exported
    r"# The axis name: .* will not be used",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
TEXT = {0: "batch_size", 1: "sequence_length"}
SOURCE = {0: "batch_size", 1: "encoder_sequence_length"}
TARGET = {0: "batch_size", 1: "decoder_sequence_length"}
PAST = {
    "decoder": {0: "batch_size", 2: "past_decoder_sequence_length"},
    "encoder": {0: "batch_size", 2: "encoder_sequence_length"},
}

Tensors = dict[str, Tensor]  # by the name of an input


class Axes(NamedTuple):
    """An input: an example of it, and the names of the axes that may have any size."""

    example: Tensor
    names: Mapping[int, str]


class Function(nn.Module):
    """What a model is asked, as a function of tensors in the order of their names."""

    def __init__(self, model: nn.Module, ask: Callable[[Any, Tensors], Any], names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.ask, self.names = model, ask, names

    def forward(self, *tensors: Tensor) -> Any:
        """What the model says: a tensor, or several."""
        return self.ask(self.model, dict(zip(self.names, tensors, strict=True)))


def write_onnx(
    model: nn.Module, ask: Callable[[Any, Tensors], Any], inputs: Mapping[str, Axes], outputs: Sequence[str], file: Path
) -> None:
    """Write what the model is asked as an ONNX file.

    Raises:
        ConfigError: torch cannot express the model.
    """
    large = sum(p.numel() * p.element_size() for p in model.parameters()) > ONE_FILE
    try:
        with hushed(), torch.no_grad():
            torch.onnx.export(
                Function(model, ask, list(inputs)).eval(),
                tuple(axes.example for axes in inputs.values()),
                file,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(tuple(dict(axes.names) for axes in inputs.values()),),
                input_names=list(inputs),
                output_names=list(outputs),
                external_data=large,
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


def session(file: Path) -> Any:
    """onnxruntime over a file, on as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def named(file: Path, suffix: str) -> Path:
    """The file's name with a suffix before `.onnx`."""
    return file.with_name(file.stem + suffix + file.suffix)


# Models that read


def write_reader(model: nn.Module, batch: Batch, place: Path) -> list[Path]:
    """Write a model that answers texts by logits, as one file."""
    inputs = {name: Axes(values, TEXT) for name, values in batch.items()}
    write_onnx(model, lambda model, inputs: model(**inputs).logits, inputs, ["logits"], place / READER)
    return [place / READER]


class OnnxReader(nn.Module):
    """What `write_reader` wrote, in the place of the model it came from."""

    def __init__(self, place: Path, model: Any, suffix: str = "") -> None:
        super().__init__()
        self.session = session(named(place / READER, suffix))
        self.config = model.config

    def forward(self, **inputs: Tensor) -> Any:
        """Shapes: inputs (B, T); logits (B, C), of tokens (B, T, C)."""
        (logits,) = self.session.run(["logits"], {name: values.numpy() for name, values in inputs.items()})
        return SimpleNamespace(logits=torch.from_numpy(logits))


# Models that write


def write_writer(model: nn.Module, batch: Batch, place: Path) -> list[Path]:
    """Write an encoder and decoder as three files: what reads, what writes the first token, what writes each further one."""
    write_onnx(
        model, _encode, {name: Axes(v, TEXT) for name, v in batch.items()}, ["last_hidden_state"], place / ENCODER
    )
    mask = Axes(batch["attention_mask"], SOURCE)
    tokens = torch.zeros(len(batch["input_ids"]), 3, dtype=torch.long)
    with torch.no_grad():
        hidden = _encode(model, batch)
        begun = {"encoder_attention_mask": mask.example, "input_ids": tokens, "encoder_hidden_states": hidden}
        _, *past = _begin(model, begun)
    names = [f"{i}.{side}.{part}" for i in range(len(past) // 4) for side in PAST for part in ("key", "value")]
    first = {
        "encoder_attention_mask": mask,
        "input_ids": Axes(tokens, TARGET),
        "encoder_hidden_states": Axes(hidden, SOURCE),
    }
    write_onnx(model, _begin, first, ["logits", *(f"present.{name}" for name in names)], place / FIRST)
    cached = {f"past_key_values.{n}": Axes(v, PAST[n.split(".")[1]]) for n, v in zip(names, past, strict=True)}
    following = {"encoder_attention_mask": mask, "input_ids": Axes(tokens[:, :1], {0: "batch_size"}), **cached}
    grown = [f"present.{name}" for name in names if ".decoder." in name]  # what the encoder said stays as it is
    write_onnx(model, _go_on, following, ["logits", *grown], place / NEXT)
    return [place / ENCODER, place / FIRST, place / NEXT]


def _encode(model: Any, inputs: Tensors) -> Tensor:
    hidden: Tensor = model.get_encoder()(**inputs).last_hidden_state
    return hidden


def _begin(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
    """Logits, and for each layer keys and values of the decoder's tokens and of the encoder's."""
    out = _decode(model, inputs, inputs["encoder_hidden_states"], None)
    cache = out.past_key_values
    both = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    return (out.logits, *(tensor for own, cross in both for tensor in (own.keys, own.values, cross.keys, cross.values)))


def _go_on(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
    """Logits, and for each layer keys and values of the decoder's tokens, the new one among them."""
    mask = inputs["encoder_attention_mask"]
    past = [values for name, values in inputs.items() if name.startswith("past_key_values")]
    hidden = past[0].new_zeros(*mask.shape, model.config.hidden_size)  # asked for its shape alone
    out = _decode(model, inputs, hidden, decoder_cache(past))
    layers = out.past_key_values.self_attention_cache.layers
    return (out.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def _decode(model: Any, inputs: Tensors, hidden: Tensor, cache: Any) -> Any:
    ids, mask = inputs["input_ids"], inputs["encoder_attention_mask"]
    read = {"encoder_outputs": (hidden,), "attention_mask": mask}
    return model(**read, decoder_input_ids=ids, past_key_values=cache, use_cache=True)


class Past:
    """Keys and values by name, as the exported decoders take them."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def batch_select_indices(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.values = {name: value[rows.numpy()] for name, value in self.values.items()}


class OnnxWriter(nn.Module):
    """What `write_writer` wrote, in the place of the model it came from, as greedy decoding asks it."""

    def __init__(self, place: Path, model: Any, suffix: str = "") -> None:
        super().__init__()
        self.encoder, self.first, self.next = (session(named(place / file, suffix)) for file in (ENCODER, FIRST, NEXT))
        self.config = model.config

    def get_encoder(self) -> Any:
        """What reads the texts."""

        def encode(**inputs: Tensor) -> Any:
            feeds = {name: values.numpy() for name, values in inputs.items()}
            return SimpleNamespace(last_hidden_state=torch.from_numpy(self.encoder.run(None, feeds)[0]))

        return encode

    def get_output_embeddings(self) -> None:
        """None that could be asked for some rows alone."""

    def forward(
        self,
        encoder_outputs: tuple[Tensor],
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        past_key_values: Past | None = None,
        use_cache: bool = True,
    ) -> Any:
        """Shapes: encoder_outputs (B, T, d), decoder_input_ids (B, steps); logits (B, steps, V)."""
        feeds = {"encoder_attention_mask": attention_mask.numpy(), "input_ids": decoder_input_ids.numpy()}
        if past_key_values is None:
            step, past = self.first, Past({})
            feeds["encoder_hidden_states"] = encoder_outputs[0].numpy()
        else:
            step, past = self.next, past_key_values
        names = [output.name.replace("present", "past_key_values") for output in step.get_outputs()]
        logits, *grown = step.run(None, feeds | past.values)
        past = Past(past.values | dict(zip(names[1:], grown, strict=True)))
        return SimpleNamespace(logits=torch.from_numpy(logits), past_key_values=past)
