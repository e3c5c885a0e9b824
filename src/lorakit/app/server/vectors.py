"""Vectors and comparisons: text-embeddings-inference's /embed, /similarity and /rerank, and OpenAI's /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from starlette.exceptions import HTTPException

from lorakit.app.server.answers import TINY
from lorakit.errors import DataError, LorakitError
from lorakit.task_info import TaskInfo
from lorakit.tasks.embedding import cut_vectors, unit
from lorakit.tasks.metrics.bootstrap import Floats

if TYPE_CHECKING:
    from lorakit.app.server.routes import Service

Texts = Annotated[str | list[StrictStr], Field(union_mode="left_to_right")]
TEI = "text-embeddings-inference"  # as a model, any: its documentation has it in requests for OpenAI's route
Dims = Annotated[StrictInt, Field(ge=1)] | None


class _Body(BaseModel):
    """`adapter` is our extension; the default is the first one that can answer."""

    model_config = ConfigDict(extra="forbid")
    adapter: StrictStr | None = None
    truncate: StrictBool = False
    truncation_direction: Literal["right", "Right"] = "right"


class Embed(_Body):
    """A request to /embed."""

    inputs: Texts
    normalize: StrictBool = True
    prompt_name: Literal["query", "document"] | None = None
    dimensions: Dims = None


class Sentences(BaseModel):
    """A text and those that it is compared with."""

    model_config = ConfigDict(extra="forbid")
    source_sentence: StrictStr
    sentences: list[StrictStr]


class SimilarityParameters(BaseModel):
    """How the texts of /similarity are read."""

    model_config = ConfigDict(extra="forbid")
    truncate: StrictBool = False
    truncation_direction: Literal["right", "Right"] = "right"


class Similarity(BaseModel):
    """A request to /similarity."""

    model_config = ConfigDict(extra="forbid")
    inputs: Sentences
    parameters: SimilarityParameters | None = None
    adapter: StrictStr | None = None


class Rerank(_Body):
    """A request to /rerank. A score is a probability or, with `raw_scores`, its logit; of an embedding model a cosine."""

    query: StrictStr
    texts: list[StrictStr]
    raw_scores: StrictBool = False
    return_text: StrictBool = False


class Embeddings(BaseModel):
    """A request to OpenAI's /v1/embeddings, whose `model` is an adapter."""

    model_config = ConfigDict(extra="forbid")
    input: Texts
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Dims = None
    user: StrictStr | None = None


def add_routes(app: FastAPI, service: Service) -> None:
    """Let the application answer with vectors and comparisons."""
    counter = copy.deepcopy(service.pool.shared.tokenizer)  # the other one is at work in the answering thread

    async def vectors_of(
        request: Request, adapter: str | None, inputs: Texts, dims: int | None, *, truncate: bool, query: bool = False
    ) -> tuple[str, Floats]:
        """The adapter that answered, and the vectors of the texts, (n, d)."""
        name = await _named(service, adapter, lambda info: info.model_kind == "embedding", "gives vectors")
        texts = [inputs] if isinstance(inputs, str) else inputs
        answers = await service.answers(
            request, name, [(text, None) for text in texts], truncate=truncate, is_query=query
        )
        vectors: Any = np.array([answer["embedding"] for answer in answers], np.float32)
        try:
            return name, cut_vectors(vectors, dims, is_unit=bool(service.section_of(name).normalize))
        except DataError as err:
            raise HTTPException(422, f"`dimensions`: {err}") from err

    async def compared(
        request: Request, adapter: str | None, query: str, texts: Sequence[str], *, truncate: bool
    ) -> list[float]:
        name = await _named(service, adapter, lambda info: info.compares, "compares texts")
        if service.section_of(name).info.wants == "choices":
            (answer,) = await service.answers(request, name, [(query, tuple(texts))], truncate=truncate)
            return list(answer["probabilities"].values())
        answers = await service.answers(request, name, [(query, text) for text in texts], truncate=truncate)
        return [answer["score"] for answer in answers]

    async def embed(request: Request, body: Embed) -> Any:
        """A vector for each text."""
        query = body.prompt_name == "query"
        arguments = (request, body.adapter, body.inputs, body.dimensions)
        _, vectors = await vectors_of(*arguments, truncate=body.truncate, query=query)
        return await _written((unit(vectors).astype(np.float32) if body.normalize else vectors).tolist())

    async def embeddings(request: Request, body: Embeddings) -> Any:
        """OpenAI's form of the same."""
        adapter = None if body.model == TEI and TEI not in service.pool.folders else body.model
        name, vectors = await vectors_of(request, adapter, body.input, body.dimensions, truncate=False)
        texts = [body.input] if isinstance(body.input, str) else body.input
        encoded = await asyncio.to_thread(counter, texts)
        tokens = sum(map(len, encoded["input_ids"]))
        forms: list[Any] = vectors.tolist()
        if body.encoding_format == "base64":
            forms = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        data = [{"object": "embedding", "index": i, "embedding": form} for i, form in enumerate(forms)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return await _written({"object": "list", "data": data, "model": name, "usage": usage})

    async def similarity(request: Request, body: Similarity) -> Any:
        """How alike a text is to each of several others: cosines."""
        sentences, truncate = body.inputs, body.parameters is not None and body.parameters.truncate
        arguments = (request, body.adapter, sentences.source_sentence, sentences.sentences)
        return await _written(await compared(*arguments, truncate=truncate))

    async def rerank(request: Request, body: Rerank) -> Any:
        """The texts by how well they answer the query, the best first."""
        scores = await compared(request, body.adapter, body.query, body.texts, truncate=body.truncate)
        if body.raw_scores and all(0 <= score <= 1 for score in scores):
            scores = [math.log(max(score, TINY)) - math.log(max(1 - score, TINY)) for score in scores]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        more = [{"text": text} if body.return_text else {} for text in body.texts]
        return await _written([{"index": i, "score": scores[i], **more[i]} for i in order])

    posted: dict[str, Any] = {
        "/embed": embed,
        "/similarity": similarity,
        "/rerank": rerank,
        "/v1/embeddings": embeddings,
    }
    for path, route in posted.items():
        app.add_api_route(path, route, methods=["POST"], response_model=None)


async def _named(service: Service, name: str | None, fits: Callable[[TaskInfo], bool], does: str) -> str:
    """The adapter of this name, or the first one that fits; the first of all before the others."""
    if name is not None:
        resident = await service.resident_named(name)
        if not fits(resident.side.task.info):
            raise HTTPException(422, f"adapter {name!r} is for {resident.side.task.name} and never {does}")
        return name
    for each in dict.fromkeys((service.default, *service.pool.folders)):
        try:
            if fits((await asyncio.to_thread(service.section_of, each)).info):
                return each
        except (LorakitError, OSError, KeyError):  # the reload says what is wrong
            continue
    raise HTTPException(422, f"no adapter here {does}")


async def _written(content: Any) -> Response:
    """JSON, written in a thread: thousands of numbers would block the event loop."""
    text = await asyncio.to_thread(json.dumps, content, ensure_ascii=False, allow_nan=False)
    return Response(text, media_type="application/json")
