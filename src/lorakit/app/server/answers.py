"""What requests say and what answers look like: text-embeddings-inference's /predict and KServe's protocol v2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr

Text = tuple[str, str | None]  # and the second one of a pair
TINY = 1e-38  # a probability of 0 has no logarithm


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair, which nothing else can."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ValueError("half of a surrogate pair is no text") from err
    return text


String = Annotated[StrictStr, AfterValidator(_whole)]


class Predict(BaseModel):
    """A request to /predict. `adapter` is ours; without it the first one answers."""

    model_config = ConfigDict(extra="forbid")
    inputs: String | list[String] | list[list[String]]
    adapter: String | None = None
    truncate: StrictBool = False
    truncation_direction: Literal["right", "Right"] = "right"
    raw_scores: StrictBool = False

    def texts(self) -> list[Text]:
        """What is to be answered: of one string or pair, one.

        Raises:
            ValueError: an entry is neither a text nor a pair.
        """
        if isinstance(self.inputs, str):
            return [(self.inputs, None)]
        is_batch = bool(self.inputs) and isinstance(self.inputs[0], list)
        return [_text(entry) for entry in (self.inputs if is_batch else [self.inputs])]

    @property
    def is_batch(self) -> bool:
        """Whether a list of answers is wanted."""
        return isinstance(self.inputs, list) and bool(self.inputs) and isinstance(self.inputs[0], list)


def _text(entry: Any) -> Text:
    if len(entry) not in (1, 2):
        raise ValueError(
            f"`inputs`: a list of {len(entry)} strings is neither a text nor a pair; a batch is [[a], [b], ...]"
        )
    return entry[0], entry[1] if len(entry) == 2 else None


class Tensor(BaseModel):
    """A tensor of a KServe request: texts, as strings."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["text", "pair"]
    shape: list[StrictInt]
    datatype: Literal["BYTES"]
    data: list[String]
    parameters: dict[str, Any] | None = None


class Infer(BaseModel):
    """A request to /v2/models/MODEL/infer: a tensor `text`, and `pair` beside it for pairs."""

    model_config = ConfigDict(extra="forbid")
    id: String | None = None
    inputs: list[Tensor]
    outputs: list[dict[str, Any]] | None = None  # all are given
    parameters: dict[str, Any] | None = None

    def texts(self) -> list[Text]:
        """What is to be answered.

        Raises:
            ValueError: a tensor is missing, given twice, or of another size than it says.
        """
        tensors = {tensor.name: tensor for tensor in self.inputs}
        if len(tensors) < len(self.inputs) or "text" not in tensors:
            raise ValueError("`inputs`: one tensor 'text' is needed, and one 'pair' for pairs of texts")
        for tensor in self.inputs:
            if tensor.shape not in ([len(tensor.data)], [len(tensor.data), 1]):
                raise ValueError(f"`inputs`: {tensor.name} has shape {tensor.shape} but {len(tensor.data)} strings")
        texts = tensors["text"].data
        pairs: Sequence[str | None] = tensors["pair"].data if "pair" in tensors else [None] * len(texts)
        if len(pairs) != len(texts):
            raise ValueError(f"`inputs`: {len(texts)} texts but {len(pairs)} second ones")
        return list(zip(texts, pairs, strict=True))


def prediction(answer: Mapping[str, Any], raw: bool = False) -> list[dict[str, Any]]:
    """An answer as text-embeddings-inference gives it: entities in order, or labels and scores, the highest first.

    Raw scores are logarithms of probabilities: the logits but for a number that all of them share.
    """
    if "entities" in answer:
        return list(answer["entities"])
    if "value" in answer:
        return [{"score": answer["value"], "label": "value"}]
    probabilities = answer.get("probabilities") or {answer["label"]: answer["score"]}
    scores = {label: math.log(max(p, TINY)) if raw else p for label, p in probabilities.items()}
    return [{"score": scores[label], "label": label} for label in sorted(scores, key=lambda label: -scores[label])]


def tensors(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers of one adapter as KServe's output tensors; entities are a JSON text each."""

    def tensor(name: str, datatype: str, data: list[Any], *more: int) -> dict[str, Any]:
        return {"name": name, "datatype": datatype, "shape": [len(answers), *more], "data": data}

    if "entities" in answers[0]:
        texts = [json.dumps(answer["entities"], ensure_ascii=False) for answer in answers]
        return [tensor("entities", "BYTES", texts)]
    if "value" in answers[0]:
        return [tensor("value", "FP64", [answer["value"] for answer in answers])]
    best = [prediction(answer)[0] for answer in answers]
    named = [
        tensor("label", "BYTES", [entry["label"] for entry in best]),
        tensor("score", "FP64", [entry["score"] for entry in best]),
    ]
    if "probabilities" not in answers[0]:
        return named
    rows = [p for answer in answers for p in answer["probabilities"].values()]
    return [*named, tensor("probabilities", "FP64", rows, len(answers[0]["probabilities"]))]
