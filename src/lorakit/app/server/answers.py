"""Requests and responses of text-embeddings-inference's /predict and of the hub's inference API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from pydantic_core import PydanticCustomError, from_json
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

Text = tuple[str, str | tuple[str, ...] | None]  # a text, and the second one of a pair or its choices
TINY = 1e-38  # a probability of 0 has no logarithm
MOST_CHARACTERS = 500  # of an error message, which may quote the request
PREDICT_EXAMPLES: list[Any] = [
    {"inputs": "I like you."},
    {"inputs": ["I like you.", "Do you?"]},
    {"inputs": [["I like you."], ["I do not."]], "adapter": "reviews", "truncate": True},
    {"inputs": "I like you.", "parameters": {"top_k": 1}},
]
ERRORS = {  # by status: text-embeddings-inference's error type, and when it occurs
    400: ("validation", "the body is not JSON, or a text is empty"),
    401: ("unauthorized", "the token is missing or wrong"),
    404: ("validation", "there is no such adapter or route"),
    405: ("validation", "the route does not support this method"),
    408: ("validation", "sending the body took more than 5 s"),
    413: (
        "validation",
        "the body is over 2 MB, there are more than `--inputs` texts, or a text is too long for its adapter",
    ),
    415: ("validation", "the Content-Type is not application/json"),
    422: ("validation", "anything else is wrong with the request"),
    424: ("backend", "the model failed on this request, or its adapter cannot be loaded; the log says why"),
    429: ("overloaded", "`--waiting` texts are already waiting; try again in a second"),
    503: ("unhealthy", "there was no answer within `--timeout`, or the server is stopping"),
}


class Problem(BaseModel):
    """An error, in the API's description."""

    error: str
    error_type: str


def problem(status: int, message: str, headers: Mapping[str, str] | None = None, path: str = "") -> JSONResponse:
    """An error in the form that text-embeddings-inference has for a path; characters without UTF-8 are escaped."""
    text = message if len(message) <= MOST_CHARACTERS else f"{message[:MOST_CHARACTERS]}..."
    text, kind = text.encode("utf-8", "backslashreplace").decode(), ERRORS.get(status, ERRORS[422])[0]
    content: dict[str, Any] = {"error": text, "error_type": kind}
    if path.startswith("/v1/"):  # OpenAI's client shows what it finds as `message`
        content = {"message": text, "code": status, "type": kind}
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
            raise PydanticCustomError("inputs", "expected a text, a pair [a, b], or a batch [[a], [b, c], ...]")
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
        if "embedding" in answer:
            raise HTTPException(422, "this adapter returns vectors, not labels; use /embed")
        parameters = self.parameters or Parameters()
        if "entities" in answer:
            return [entry for entry in prediction(answer) if entry["entity_group"] not in parameters.ignore_labels]
        function = parameters.function_to_apply
        own = "sigmoid" if "labels" in answer else "softmax"
        if function not in (None, "none", own) and "value" not in answer and "label" in answer:
            raise HTTPException(422, f"`parameters.function_to_apply`: this adapter supports {own} and none")
        entries = prediction(answer, self.raw_scores or function == "none")[: parameters.top_k]
        return entries if self.parameters is None or self.is_batch else [entries]


def prediction(answer: Mapping[str, Any], raw: bool = False) -> list[dict[str, Any]]:
    """An answer as text-embeddings-inference gives it: entities in order, or labels and scores, the highest first.

    Raw scores are log-probabilities: the logits up to a common constant.
    """
    if "entities" in answer:
        return list(answer["entities"])
    if "labels" not in answer and "label" not in answer and "score" in answer:  # of a pair, how well it matches
        return [{"score": answer["score"], "label": "score"}]
    if "value" in answer:
        return [{"score": answer["value"], "label": "value"}]
    probabilities = answer.get("probabilities") or {answer["label"]: answer["score"]}
    scores = {label: math.log(max(p, TINY)) if raw else p for label, p in probabilities.items()}
    return [{"score": scores[label], "label": label} for label in sorted(scores, key=lambda label: -scores[label])]
