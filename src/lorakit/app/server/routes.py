"""Answers over HTTP: text-embeddings-inference's /predict, the hub's API, metrics, and a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Scope

import lorakit
from lorakit.app.server.answers import ERRORS, Predict, Problem, Text, problem, read_json
from lorakit.app.server.guard import Guard
from lorakit.app.server.queue import Batcher, Closed, Overloaded, TooLong
from lorakit.app.server.vectors import add_routes
from lorakit.data.example import Example
from lorakit.errors import DataError, LorakitError, did_you_mean
from lorakit.inference.adapter_folder import shipped_folder
from lorakit.inference.adapter_pool import AdapterPool, Query, find_adapters
from lorakit.inference.answer import check_input
from lorakit.inference.shared_base import Resident
from lorakit.inference.side import Side, read_facts
from lorakit.recipe import TaskSection

log = logging.getLogger("lorakit.serve")

PAGE = Path(__file__).parent / "page" / "index.html"
HEALTH = ("/health", "/ping")
OPEN = {("GET", path) for path in ("/", *HEALTH)}  # all routes without a token
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # as a Host header names them
MORE_VALUES = 1_000  # of a body, in addition to its texts
FACTS = "lorakit"  # in the scope of a request: what the log says of it


@dataclass(frozen=True)
class Limits:
    """The limits of a server; beyond them the client gets a 4xx status."""

    body_bytes: int = 2_000_000
    body_s: float = 5.0
    inputs: int = 32  # of one request
    characters: int = 100_000  # of one text
    waiting: int = 512  # texts, of all requests
    answer_s: float = 60.0
    reload_s: float = 2.0  # between two scans of the folders


class Metrics:
    """The content of /metrics, in Prometheus' format."""

    def __init__(self, pool: AdapterPool, waiting: Any) -> None:
        self.registry = CollectorRegistry()
        made: Any = {"registry": self.registry, "namespace": "lorakit"}
        self.requests = Counter("requests", "Requests answered", ["route", "status"], **made)
        self.seconds = Histogram("request_seconds", "Time to the answer", ["route"], **made)
        self.texts = Counter("texts", "Texts answered", ["adapter"], **made)
        self.batch = Histogram("batch_texts", "Texts of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), **made)
        self.reloads = Counter("reloads", "New versions of adapters", ["outcome"], **made)
        Gauge("waiting_texts", "Texts in the queue", **made).set_function(waiting)
        Gauge("adapters_resident", "Adapters in memory", **made).set_function(lambda: len(pool.resident))
        Gauge("adapters_bytes", "Memory that they take", **made).set_function(lambda: pool.size)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count one response, by the pattern of its route."""
        route = getattr(scope.get("route"), "path", "none")
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)


class Service:
    """The routes of a server over a pool; `roots` are the paths whose adapters it serves, scanned periodically."""

    def __init__(
        self, pool: AdapterPool, roots: Sequence[Path] = (), limits: Limits = Limits(), *, log_texts: bool = False
    ) -> None:
        self.pool, self.roots, self.limits, self.log_texts = pool, roots, limits, log_texts
        self.folders: dict[Path, Mapping[str, Path]] = {}  # by root, at the last successful scan
        self.refused: dict[str, str] = {}  # the last error, by name
        self.default = next(iter(pool.folders))
        self.batcher = Batcher(pool, limits.waiting, lambda texts: self.metrics.batch.observe(texts))
        self.metrics = Metrics(pool, lambda: self.batcher.waiting)

    # Answers

    async def answers(
        self, request: Request, name: str, texts: Sequence[Text], *, truncate: bool, is_query: bool = False
    ) -> list[dict[str, Any]]:
        """The answers of one adapter; any failure is an HTTPException."""
        limits = self.limits
        if not texts:
            raise HTTPException(400, "`inputs` cannot be empty")
        if len(texts) > limits.inputs:
            raise HTTPException(413, f"batch size {len(texts)} > maximum allowed batch size {limits.inputs}")
        resident = await self.resident_named(name)
        request.scope[FACTS] = {"adapter": name, "texts": len(texts), **({"inputs": texts} if self.log_texts else {})}
        queries = [Query(name, self._example(text, resident, is_query)) for text in texts]
        try:
            future = self.batcher.submit(queries, truncate=truncate)
        except Overloaded as err:
            raise HTTPException(
                429,
                f"the queue has no room for {len(texts)} more texts",
                {"Retry-After": "1"},
            ) from err
        except Closed as err:
            raise HTTPException(503, "the server is stopping", {"Retry-After": "5"}) from err
        answers = await self._waited(request, asyncio.wrap_future(future), resident)
        self.metrics.texts.labels(name).inc(len(texts))
        return answers

    async def resident_named(self, name: str) -> Resident:
        """The adapter of a name, loaded if needed."""
        if name not in self.pool.folders:
            raise HTTPException(404, f"no adapter {name!r}; {did_you_mean(name, self.pool.folders)}")
        if resident := self.pool.in_memory(name):
            return resident
        try:
            return await self._loaded(self.pool.load(name))
        except TimeoutError as err:
            message = f"adapter {name!r} was not loaded within {self.limits.answer_s:g} s"
            raise HTTPException(503, message, {"Retry-After": "5"}) from err
        except Exception as err:  # nothing in a folder may end the server
            self._refuse(f"adapter {name!r}", err)
            raise HTTPException(424, f"adapter {name!r} cannot be loaded; see the server's log") from err

    async def _loaded(self, future: Future[Resident]) -> Resident:
        return await asyncio.wait_for(asyncio.wrap_future(future), self.limits.answer_s)

    def section_of(self, name: str) -> TaskSection:
        """The task of an adapter, in memory or not. Raises a LorakitError or an OSError where it cannot be read."""
        resident = self.pool.in_memory(name)
        side = resident.side if resident else read_facts(shipped_folder(self.pool.folders[name]))
        return side.task

    def _example(self, text: Text, resident: Resident, is_query: bool) -> Example:
        first, second = text
        pair, choices = (None, second) if isinstance(second, tuple) else (second, ())
        texts = [some for some in (first, pair, *choices) if some is not None]
        for some in texts:
            if len(some) > self.limits.characters:
                most = self.limits.characters
                raise HTTPException(413, f"a text has {len(some)} characters; at most {most} are allowed")
            if "\0" in some:
                raise HTTPException(422, "a text contains a NUL character")
        if not all(some.strip() for some in texts):
            raise HTTPException(400, "`inputs` cannot be empty")
        example = Example(first, pair=pair, is_query=is_query, choices=choices)
        try:
            check_input(example, resident.side, "`inputs`")
        except DataError as err:
            raise HTTPException(422, str(err)) from err
        return example

    async def _waited(
        self, request: Request, future: asyncio.Future[list[dict[str, Any]]], resident: Resident
    ) -> list[dict[str, Any]]:
        """The answers, unless they take too long or the client disconnects."""
        leaving = asyncio.create_task(_left(request))
        try:
            either: list[asyncio.Future[Any]] = [future, leaving]
            await asyncio.wait(either, timeout=self.limits.answer_s, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                raise HTTPException(499, "the client disconnected")
            if not future.done():
                raise HTTPException(503, f"no answer within {self.limits.answer_s:g} s", {"Retry-After": "5"})
            return future.result()
        except TooLong as err:
            most = resident.side.max_length
            message = f"`inputs` must have less than {most} tokens; set `truncate` to true to cut them"
            raise HTTPException(413, message) from err
        except HTTPException:
            raise
        except Exception as err:  # an error in one request must not affect others
            log.exception("a request failed")
            raise HTTPException(424, "inference failed; see the server's log") from err
        finally:
            leaving.cancel()
            future.cancel()

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log one response."""
        self.metrics.observe(scope, status, seconds)
        level = logging.ERROR if status >= 500 else logging.DEBUG if scope["path"] in HEALTH else logging.INFO
        if log.isEnabledFor(level):
            facts = {
                "method": scope["method"],
                "route": getattr(scope.get("route"), "path", None),
                "status": status,
                "ms": round(1000 * seconds, 1),
                **scope.get(FACTS, {}),
            }
            log.log(level, "request", extra={"facts": facts})

    # Routes

    async def predict(self, request: Request, body: Predict) -> Any:
        """Labels with scores, or entities, for a text, a pair, or a batch of them."""
        return await self._predicted(request, body, body.adapter or self.default)

    async def predict_by(self, request: Request, model: str, body: Predict) -> Any:
        """The same by the adapter that the path names, for clients of the hub's inference API, which know a URL alone."""
        if body.adapter not in (None, model):
            raise HTTPException(422, f"`adapter`: the path already names {model!r}")
        return await self._predicted(request, body, model)

    async def _predicted(self, request: Request, body: Predict, name: str) -> Response:
        answers = await self.answers(request, name, body.texts(), truncate=body.truncate)

        def write() -> str:
            forms = [json.dumps(body.content(answer), ensure_ascii=False, allow_nan=False) for answer in answers]
            return f"[{','.join(forms)}]" if body.is_batch else forms[0]

        # in a thread: a long text has thousands of entities, whose encoding would block the event loop for a second
        return Response(await asyncio.to_thread(write), media_type="application/json")

    async def adapters(self) -> Any:
        """The adapters served, with facts about those in memory."""
        return [{"name": name, **self._described(name)} for name in self.pool.folders]

    async def adapter(self, name: str) -> Any:
        """The facts about one adapter, which is loaded for them."""
        await self.resident_named(name)
        return {"name": name, **self._described(name)}

    def _described(self, name: str) -> dict[str, Any]:
        resident = self.pool.in_memory(name)
        if resident is None:
            return {"resident": False}
        side = resident.side
        return {
            "resident": True,
            "task": side.task.name,
            "labels": list(side.labels),
            "pairs": side.columns.pair is not None,
            "max_length": side.max_length,
        }

    async def info(self) -> Any:
        """text-embeddings-inference's facts about a model, as far as they apply."""
        shared = self.pool.shared
        return {
            "model_id": shared.side.base.name,
            "model_sha": shared.fingerprint.weights,
            "model_dtype": shared.side.dtype,
            "model_type": _model_type(shared.side),
            "max_input_length": shared.side.max_length,
            "max_client_batch_size": self.limits.inputs,
            "max_concurrent_requests": self.limits.waiting,
            "version": lorakit.__version__,
            "default_adapter": self.default,
            "adapters": list(self.pool.folders),
        }

    async def metrics_page(self) -> Response:
        """Metrics in Prometheus' format."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    # Reloading

    async def reload(self) -> None:
        """Scan the folders once, for adapters added or removed and new versions of those in memory.

        An error in one of them is logged and counted, and does not affect the others.
        """
        try:
            if self.roots:
                self.pool.rename(await asyncio.to_thread(self._look))
            loading = await asyncio.to_thread(self.pool.refresh)
        except Exception as err:
            return self._refuse("the folders", err)
        for name, future in loading.items():
            try:
                await self._loaded(future)
            except Exception as err:
                self._refuse(f"adapter {name!r}: the old version keeps serving", err)
            else:
                self.metrics.reloads.labels("served").inc()
                log.info("adapter %r: now serving a new version", name)

    def _look(self) -> dict[str, Path]:
        """The adapters of all roots. An unreadable root keeps its earlier adapters; a name keeps its first folder."""
        for root in self.roots:
            try:
                self.folders[root] = find_adapters(root)
            except (LorakitError, OSError) as err:
                self._refuse(str(root), err)
        names: dict[str, Path] = {}
        for name, folder in chain.from_iterable(adapters.items() for adapters in self.folders.values()):
            known = names.setdefault(name, folder)
            if known != folder:
                self._refuse(f"adapter {name!r}", DataError(f"{known} and {folder} have the same name; rename one"))
                if self.pool.folders.get(name) == folder:
                    names[name] = folder
        return names

    def _refuse(self, what: str, err: Exception) -> None:
        """Count a refused adapter, and log the error unless it is the same as in the last scan."""
        self.metrics.reloads.labels("refused").inc()
        if self.refused.get(what) != str(err):
            self.refused[what] = str(err)
            is_ours = isinstance(err, (LorakitError, OSError))
            log.warning("%s: %s: %s", what, type(err).__name__, err, exc_info=None if is_ours else err)

    async def reload_for_ever(self) -> None:
        """Scan the folders again and again."""
        while True:
            await asyncio.sleep(self.limits.reload_s)
            await self.reload()


async def _left(request: Request) -> None:
    """Return when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def find_all(roots: Iterable[Path]) -> dict[str, Path]:
    """The adapters of several paths by name; names must differ.

    Raises:
        DataError: two paths have an adapter of one name.
    """
    adapters: dict[str, Path] = {}
    for root in roots:
        for name, folder in find_adapters(root).items():
            if name in adapters:
                raise DataError(f"two adapters are called {name!r}: {adapters[name]} and {folder}; rename one")
            adapters[name] = folder
    return adapters


def create_app(service: Service, token: str | None = None, hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """The application; `hosts` are the permitted Host headers."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        reloading = asyncio.create_task(service.reload_for_ever())
        yield
        reloading.cancel()
        await asyncio.to_thread(service.batcher.close, service.limits.answer_s)

    app = FastAPI(
        title="lorakit",
        version=lorakit.__version__,
        docs_url=None,  # these pages load scripts from other sites
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        responses={status: {"model": Problem, "description": when} for status, (_, when) in ERRORS.items()},
    )
    app.router.route_class = _json_route(4 * service.limits.inputs + MORE_VALUES)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    for path in ("/predict", "/"):
        app.add_api_route(path, service.predict, methods=["POST"], response_model=None)
    app.add_api_route("/models/{model}", service.predict_by, methods=["POST"], response_model=None)
    add_routes(app, service)
    got: dict[str, Any] = {
        "/adapters": service.adapters,
        "/adapters/{name}": service.adapter,
        "/info": service.info,
        "/metrics": service.metrics_page,
        "/": _page(),
        **dict.fromkeys(HEALTH, _healthy),
    }
    for path, route in got.items():
        app.add_api_route(path, route, methods=["GET"], response_model=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(
        Guard,
        token=token,
        without_token=OPEN,
        body_bytes=service.limits.body_bytes,
        body_s=service.limits.body_s,
        is_full=service.batcher.is_full,
        watch=service.observe,
    )
    return app


def _json_route(most_values: int) -> type[APIRoute]:
    """Routes whose bodies are JSON with at most `most_values` values."""

    class JsonRequest(Request):
        async def json(self) -> Any:
            return read_json(await self.body(), most_values)

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                # other kinds a page of another origin could have a browser send, without asking us first
                if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                    raise HTTPException(415, "the Content-Type must be application/json")
                request = JsonRequest(request.scope, request.receive)
                try:
                    if not await request.body():
                        raise HTTPException(400, "the body is empty")
                except ClientDisconnect as err:
                    raise HTTPException(499, "the client disconnected") from err
                return await answer(request)

            return handle if self.body_field else answer

    return JsonRoute


def _model_type(side: Side) -> dict[str, Any]:
    if not side.task.info.compares:
        return {"classifier": {"id2label": dict(enumerate(side.labels))}}
    return (
        {"reranker": {"id2label": {"0": "score"}}}
        if side.task.info.has_head
        else {"embedding": {"pooling": side.pooling}}
    )


async def _healthy() -> Any:
    """An empty answer of status 200."""
    return {}


def _page() -> Any:
    """The route of the page to try the server; its content policy allows only its own script and style."""
    html = PAGE.read_text(encoding="utf-8")
    policy = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("script", "style"):
        for inner in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
            policy.append(f"{tag}-src 'sha256-{digest}'")
    headers = {"Content-Security-Policy": "; ".join([*policy, "frame-ancestors 'none'"])}

    async def page() -> HTMLResponse:
        """The page to try the server."""
        return HTMLResponse(html, headers=headers)

    return page


def _invalid(request: Request, err: Exception) -> Response:
    """The first error in a body; the message does not repeat what was sent."""
    assert isinstance(err, RequestValidationError)
    first: Mapping[str, Any] = err.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:4])
    what = "no such field in this request" if first["type"] == "extra_forbidden" else str(first["msg"])
    return problem(422, f"`{place}`: {what}" if place else what, path=request.url.path)


def _http_error(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    text = str(err.detail)
    if text in ("Not Found", "Method Not Allowed"):  # which the framework says where no route fits
        text = f"there is no {request.method} on this path; the routes are in /openapi.json, and GET / is a page to try them"
    return problem(err.status_code, text, err.headers, request.url.path)
