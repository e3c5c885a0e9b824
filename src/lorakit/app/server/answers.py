"""Requests and responses of text-embeddings-inference's /predict and KServe's protocol v2."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, StrictBool, StrictInt, StrictStr
from pydantic_core import PydanticCustomError, from_json
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

Text = tuple[str, str | None]  # a text, and the second one of a pair
TINY = 1e-38  # a probability of 0 has no logarithm
MOST_CHARACTERS = 500  # of an error message, which may quote the request
ERRORS = {  # by status: text-embeddings-inference's error type, and when it occurs
    400: ("validation", "the body is not JSON, or a text is empty"),
    401: ("unauthorized", "no token, or a wrong one"),
    404: ("validation", "no adapter of this name, or no such route"),
    405: ("validation", "a method that the route does not have"),
    408: ("validation", "a body that takes more than 5 s"),
    413: ("validation", "too much: a body of 2 MB, more than `--inputs` texts, a text longer than its adapter reads"),
    415: ("validation", "a Content-Type that is not application/json"),
    422: ("validation", "anything else that is wrong with a request"),
    424: ("backend", "the model failed on this request, or its adapter cannot be loaded; the log says why"),
    429: ("overloaded", "`--waiting` texts wait; ask again in a second"),
    503: ("unhealthy", "no answer within `--timeout`, or the server is stopping"),
}


class Problem(BaseModel):
    """An error, in the API's description."""

    error: str
    error_type: str


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in the form of text-embeddings-inference; characters without UTF-8 are escaped."""
    text = message if len(message) <= MOST_CHARACTERS else f"{message[:MOST_CHARACTERS]}..."
    content = {
        "error": text.encode("utf-8", "backslashreplace").decode(),
        "error_type": ERRORS.get(status, ERRORS[422])[0],
    }
    return JSONResponse(content, status, headers=headers)


def read_json(content: bytes, most_values: int) -> Any:
    """Parse JSON with at most `most_values` values, counted in the bytes before parsing.

    Two megabytes of `[],` take 0.2 s to parse, and of `1,` 15 s and 2 GB to validate.

    Raises:
        HTTPException: 400, it is not JSON; 413, it has more values.
    """
    plain = content.replace(rb"\\", b"").replace(rb"\"", b"")  # each remaining quote begins or ends a string
    is_large = plain.count(b'"') > 2 * most_values
    if not is_large:
        outside = b"".join(plain.split(b'"')[::2])
        is_large = sum(map(outside.count, (b",", b"[", b"{"))) > most_values
    if is_large:
        raise HTTPException(413, f"the body has more than {most_values} values")
    try:
        return from_json(content, allow_inf_nan=False)
    except ValueError as err:
        raise HTTPException(400, f"the body is not JSON: {err}") from err


def _inputs(value: Any) -> Any:
    """Fail at the first wrong entry, whereas pydantic would make several errors for each."""
    for entry in value if _is_batch(value) else [value]:
        texts = [entry] if isinstance(entry, str) else entry
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise PydanticCustomError(
                "inputs", "a text, a pair [a, b], or a batch of them [[a], [b, c], ...] is needed"
            )
        if len(texts) not in (1, 2) and value:
            form = "a list of {n} strings is neither a text nor a pair; a batch is [[a], [b], ...]"
            raise PydanticCustomError("inputs", form, {"n": len(texts)})
    return value


def _is_batch(inputs: Any) -> bool:
    return isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], list)


class Predict(BaseModel):
    """A request to /predict. `adapter` is our extension; the default is the first one."""

    model_config = ConfigDict(extra="forbid")
    inputs: Annotated[str | list[str] | list[list[str]], BeforeValidator(_inputs)]
    adapter: StrictStr | None = None
    truncate: StrictBool = False
    truncation_direction: Literal["right", "Right"] = "right"
    raw_scores: StrictBool = False

    def texts(self) -> list[Text]:
        """The texts; a single string or pair counts as one."""
        entries: Any = self.inputs if self.is_batch else [self.inputs]
        lists = [[entry] if isinstance(entry, str) else entry for entry in entries]
        return [(texts[0], texts[1] if len(texts) == 2 else None) for texts in lists if texts]

    @property
    def is_batch(self) -> bool:
        """Whether the response is a list."""
        return _is_batch(self.inputs)


class Tensor(BaseModel):
    """A tensor of a KServe request: texts, as strings."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["text", "pair"]
    shape: Annotated[list[StrictInt], FailFast()]
    datatype: Literal["BYTES"]
    data: Annotated[list[StrictStr], FailFast()]
    parameters: dict[str, Any] | None = None


class Infer(BaseModel):
    """A request to /v2/models/MODEL/infer: a tensor `text`, and `pair` beside it for pairs."""

    model_config = ConfigDict(extra="forbid")
    id: StrictStr | None = None
    inputs: Annotated[list[Tensor], FailFast()]
    outputs: list[Any] | None = None  # ignored: all are returned
    parameters: dict[str, Any] | None = None

    def texts(self) -> list[Text]:
        """What is to be answered.

        Raises:
            HTTPException: 422, a tensor is missing, given twice, or of another size than it says.
        """
        tensors = {tensor.name: tensor for tensor in self.inputs}
        if len(tensors) < len(self.inputs) or "text" not in tensors:
            raise HTTPException(422, "`inputs`: one tensor 'text' is needed, and one 'pair' for pairs of texts")
        for tensor in self.inputs:
            if tensor.shape not in ([len(tensor.data)], [len(tensor.data), 1]):
                message = f"`inputs`: {tensor.name} has shape {tensor.shape} but {len(tensor.data)} strings"
                raise HTTPException(422, message)
        texts = tensors["text"].data
        pairs: Sequence[str | None] = tensors["pair"].data if "pair" in tensors else [None] * len(texts)
        if len(pairs) != len(texts):
            raise HTTPException(422, f"`inputs`: {len(texts)} texts but {len(pairs)} second ones")
        return list(zip(texts, pairs, strict=True))


def prediction(answer: Mapping[str, Any], raw: bool = False) -> list[dict[str, Any]]:
    """An answer as text-embeddings-inference gives it: entities in order, or labels and scores, the highest first.

    Raw scores are log-probabilities: the logits up to a common constant.
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
