"""Requests and responses of text-embeddings-inference's /predict, the hub's inference API and KServe's protocol v2."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, StrictBool, StrictInt, StrictStr
from pydantic_core import PydanticCustomError, from_json
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from lorakit.inference.side import Side

Text = tuple[str, str | None]  # a text, and the second one of a pair
TINY = 1e-38  # a probability of 0 has no logarithm
MOST_CHARACTERS = 500  # of an error message, which may quote the request
JSON_BYTES = "Inference-Header-Content-Length"  # KServe's header: after so many bytes of JSON, binary tensors follow
LENGTH = struct.Struct("<I")  # before each string of a binary tensor
PREDICT_EXAMPLES: list[Any] = [
    {"inputs": "I like you."},
    {"inputs": ["I like you.", "Do you?"]},
    {"inputs": [["I like you."], ["I do not."]], "adapter": "reviews", "truncate": True},
    {"inputs": "I like you.", "parameters": {"top_k": 1}},
]
INFER_EXAMPLES: list[Any] = [
    {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["I like you.", "I do not."]}]}
]
ERRORS = {  # by status: text-embeddings-inference's error type, and when it occurs
    400: ("validation", "the body is not JSON, or a text is empty"),
    401: ("unauthorized", "no token, or a wrong one"),
    404: ("validation", "no adapter of this name, or no such route"),
    405: ("validation", "a method that the route does not have"),
    408: ("validation", "a body that takes more than 5 s"),
    413: ("validation", "too much: a body of 2 MB, more than `--inputs` texts, a text longer than its adapter reads"),
    415: ("validation", "a Content-Type that is not application/json, nor one of KServe's clients"),
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


def read_tensors(content: bytes, json_bytes: str, most_values: int) -> Any:
    """Parse a KServe request whose tensors follow its JSON in binary form, into the one with their strings as `data`.

    Raises:
        HTTPException: 400 or 413 as `read_json`; 422, the sizes do not fit, or a string is not UTF-8.
    """
    if not re.fullmatch("[0-9]{1,9}", json_bytes) or (begin := int(json_bytes)) > len(content):
        raise HTTPException(422, f"{JSON_BYTES}: {json_bytes!r} is not a number of bytes of a body of {len(content)}")
    body = read_json(content[:begin], most_values)
    tensors = body.get("inputs") if isinstance(body, dict) else None
    for tensor in tensors if isinstance(tensors, list) else ():
        parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
        size = parameters.pop("binary_data_size", None) if isinstance(parameters, dict) else None
        if size is None:
            continue
        if type(size) is not int or not 0 <= size <= len(content) - begin:
            raise HTTPException(422, f"`inputs`: a binary_data_size of {size!r}; {len(content) - begin} bytes are left")
        tensor["data"] = _strings(content[begin : begin + size], most_values)
        begin += size
        most_values -= len(tensor["data"])
    if begin < len(content):
        raise HTTPException(422, f"`inputs`: {len(content) - begin} bytes of the body belong to no tensor")
    return body


def _strings(data: bytes, most: int) -> list[str]:
    """The strings of a binary tensor, each behind its length in bytes."""
    strings: list[str] = []
    at = 0
    try:
        while at < len(data):
            if len(strings) == most:
                raise HTTPException(413, f"a tensor has more than {most} strings")
            (size,) = LENGTH.unpack_from(data, at)
            at += LENGTH.size + size
            strings.append(data[at - size : at].decode())
    except (struct.error, UnicodeDecodeError) as err:
        raise HTTPException(422, f"`inputs`: string {len(strings)} of a binary tensor: {err}") from err
    if at > len(data):
        raise HTTPException(422, f"`inputs`: string {len(strings) - 1} of a binary tensor ends after it")
    return strings


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


class Parameters(BaseModel):
    """What `huggingface_hub.InferenceClient` sends beside a text; those of labels say nothing of entities, and vice versa."""

    model_config = ConfigDict(extra="forbid")
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    aggregation_strategy: Literal["simple", "first", "average", "max"] | None = None  # entities are whole in any case
    ignore_labels: list[StrictStr] = []


class Predict(BaseModel):
    """A request to /predict. `adapter` is our extension; the default is the first one.

    With `parameters` it is one to the hub's inference API, which answers a text with a list of one list of labels.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": PREDICT_EXAMPLES})
    inputs: Annotated[str | list[str] | list[list[str]], BeforeValidator(_inputs)]
    adapter: StrictStr | None = None
    truncate: StrictBool = False
    truncation_direction: Literal["right", "Right"] = "right"
    raw_scores: StrictBool = False
    parameters: Parameters | None = None

    def texts(self) -> list[Text]:
        """The texts; a single string or pair counts as one."""
        entries: Any = self.inputs if self.is_batch else [self.inputs]
        lists = [[entry] if isinstance(entry, str) else entry for entry in entries]
        return [(texts[0], texts[1] if len(texts) == 2 else None) for texts in lists if texts]

    @property
    def is_batch(self) -> bool:
        """Whether the response is a list."""
        return _is_batch(self.inputs)

    def content(self, answer: Mapping[str, Any]) -> Any:
        """An answer in the form that was asked for.

        Raises:
            HTTPException: 422, scores by another function than the head's.
        """
        parameters = self.parameters or Parameters()
        if "entities" in answer:
            return [entry for entry in prediction(answer) if entry["entity_group"] not in parameters.ignore_labels]
        function = parameters.function_to_apply
        own = "sigmoid" if "labels" in answer else "softmax"
        if function not in (None, "none", own) and "value" not in answer:
            raise HTTPException(422, f"`parameters.function_to_apply`: scores of this adapter are by {own}, or by none")
        entries = prediction(answer, self.raw_scores or function == "none")[: parameters.top_k]
        return entries if self.parameters is None or self.is_batch else [entries]


class Tensor(BaseModel):
    """A tensor of a KServe request: texts, as strings."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["text", "pair"]
    shape: Annotated[list[StrictInt], FailFast()]
    datatype: Literal["BYTES"]
    data: Annotated[list[StrictStr], FailFast()]
    parameters: dict[str, Any] | None = None


class Output(BaseModel):
    """A tensor that a KServe request asks for."""

    model_config = ConfigDict(extra="forbid")
    name: StrictStr
    parameters: dict[str, Any] = {}


class Infer(BaseModel):
    """A request to /v2/models/MODEL/infer: a tensor `text`, and `pair` beside it for pairs."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": INFER_EXAMPLES})
    id: StrictStr | None = None
    inputs: Annotated[list[Tensor], FailFast()]
    outputs: list[Output] = []  # none: all of them
    parameters: dict[str, Any] = {}

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


def outputs(side: Side) -> list[dict[str, Any]]:
    """KServe's metadata of the tensors that an adapter answers with; the columns of `probabilities` are the labels."""
    task, info = side.task, side.task.info

    def tensor(name: str, datatype: str, *more: int) -> dict[str, Any]:
        return {"name": name, "datatype": datatype, "shape": [-1, *more]}

    if "entities" in info.answer_columns:
        return [tensor("entities", "BYTES")]
    if "value" in info.answer_columns:
        return [tensor("value", "FP64")]
    described = [tensor("label", "BYTES"), tensor("score", "FP64")]
    if "labels" in info.answer_columns:
        described.append(tensor("labels", "BYTES"))
    if "generated" not in info.answer_columns or task.constrained:
        labels = {"parameters": {"labels": list(side.labels)}}
        described.append(tensor("probabilities", "FP64", len(side.labels)) | labels)
    return described


def tensors(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers of one adapter as KServe's output tensors, as `outputs` describes them.

    Entities of a text, and its labels where it may have several, are a JSON list in one string.
    """

    def tensor(name: str, datatype: str, data: list[Any], *more: int) -> dict[str, Any]:
        return {"name": name, "datatype": datatype, "shape": [len(answers), *more], "data": data}

    def lists(name: str) -> dict[str, Any]:
        return tensor(name, "BYTES", [json.dumps(answer[name], ensure_ascii=False) for answer in answers])

    if "entities" in answers[0]:
        return [lists("entities")]
    if "value" in answers[0]:
        return [tensor("value", "FP64", [answer["value"] for answer in answers])]
    best = [prediction(answer)[0] for answer in answers]
    named = [
        tensor("label", "BYTES", [entry["label"] or "" for entry in best]),  # written freely, it may be none of them
        tensor("score", "FP64", [entry["score"] for entry in best]),
    ]
    if "labels" in answers[0]:
        named.append(lists("labels"))
    if "probabilities" in answers[0]:
        rows = [p for answer in answers for p in answer["probabilities"].values()]
        named.append(tensor("probabilities", "FP64", rows, len(answers[0]["probabilities"])))
    return named


def infer_response(
    facts: Mapping[str, Any], tensors: Sequence[dict[str, Any]], body: Infer
) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a KServe response: the tensors that were asked for, in JSON or behind it in binary form.

    Raises:
        HTTPException: 422, there is no such tensor.
    """
    named = {tensor["name"]: tensor for tensor in tensors}
    names = [output.name for output in body.outputs]
    if unknown := set(names) - set(named):
        raise HTTPException(422, f"`outputs`: no tensor {min(unknown)!r}; there are {', '.join(named)}")
    if len(set(names)) < len(names):
        raise HTTPException(422, "`outputs`: a tensor is named twice")
    described, binary = [], b""
    for output in body.outputs or [Output(name=name) for name in named]:
        tensor = named[output.name]
        if output.parameters.get("binary_data", body.parameters.get("binary_data_output")) is True:
            data = tensor.pop("data")
            if tensor["datatype"] == "BYTES":
                texts = [text.encode() for text in data]
                part = b"".join(LENGTH.pack(len(text)) + text for text in texts)
            else:
                part = struct.pack(f"<{len(data)}d", *data)
            tensor = {**tensor, "parameters": {"binary_data_size": len(part)}}
            binary += part
        described.append(tensor)
    content = json.dumps({**facts, "outputs": described}, ensure_ascii=False, allow_nan=False).encode()
    if not binary:
        return content, {"Content-Type": "application/json"}
    return content + binary, {"Content-Type": "application/octet-stream", JSON_BYTES: str(len(content))}
