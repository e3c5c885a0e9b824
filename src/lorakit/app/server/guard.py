"""What stands before every route: the queue's limit, the token, the time that a body may take, the headers of every answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

REST_S = 0.005  # little beside what a full queue keeps a client waiting
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def problem(status: int, kind: str, message: str, **headers: str) -> JSONResponse:
    """An error in the form of text-embeddings-inference; what cannot be written as UTF-8 is escaped."""
    text = message.encode("utf-8", "backslashreplace").decode()
    return JSONResponse(
        {"error": text, "error_type": kind}, status, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def door(is_full: Callable[[int], bool], count: Callable[[], None]) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which answers 429 to every POST while the queue is full, before a byte of the body is read.

    Under overload refusals are most of what a server does: one costs a sixth here of what it costs through the application.
    `is_full` is told how many requests are inside, from the last byte of their bodies to their answers: those that came
    together are not in the queue yet. After refusals the event loop rests, since each time it wakes it takes Python's lock and
    the caches from the thread that computes; who comes meanwhile is refused together with others. Who sent a second request
    before the answer to the first waits in line, and may be refused by the queue.
    """
    refusal = {"keep-alive": _refusal(), "close": _refusal(Connection="close")}
    # what uvicorn looks at of a request that has its answer: the body is dropped as it comes
    answered: Any = SimpleNamespace(response_complete=True, message_event=asyncio.Event())

    inside: set[HttpToolsProtocol] = set()
    is_resting = False

    def rest() -> None:
        nonlocal is_resting
        time.sleep(REST_S)
        is_resting = False

    class Door(HttpToolsProtocol):
        def on_headers_complete(self) -> None:
            is_first = self.cycle is None or self.cycle.response_complete
            if is_first and self.parser.get_method() == b"POST" and is_full(len(inside)):
                self._refuse()
            else:
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            if self.cycle is not answered and self.scope["method"] == "POST":
                inside.add(self)

        def on_response_complete(self) -> None:
            inside.discard(self)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            inside.discard(self)
            super().connection_lost(exc)

        def _refuse(self) -> None:
            nonlocal is_resting
            if not is_resting:
                is_resting = True
                self.loop.call_soon(rest)
            stays = self.parser.should_keep_alive() and not self.expect_100_continue
            self.cycle = answered
            self.transport.write(refusal["keep-alive" if stays else "close"])
            count()
            self.on_response_complete()
            if not stays:
                self.transport.close()

    return Door


def _refusal(**headers: str) -> bytes:
    """The bytes of the answer to who comes while the queue is full."""
    answer = problem(429, "overloaded", "model is overloaded", Retry_After="1", **headers)
    lines = [*answer.raw_headers, *((k.encode(), v.encode()) for k, v in HEADERS.items())]
    return b"".join(
        [STATUS_LINE[429], *(name + b": " + value + b"\r\n" for name, value in lines), b"\r\n", answer.body]
    )


class Guard:
    """Refuses who has no token before a byte of the body is read, and a body that comes too slowly."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        without_token: Collection[tuple[str, str]],
        body_s: float,
        watch: Callable[[Scope, int, float], None],
    ) -> None:
        self.app, self.token, self.without_token, self.body_s, self.watch = app, token, without_token, body_s, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        begin = time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.watch(scope, message["status"], time.perf_counter() - begin)
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if not self._may(scope):
            answer = problem(
                401, "unauthorized", "a token is needed: Authorization: Bearer TOKEN", WWW_Authenticate="Bearer"
            )
            return await answer(scope, receive, send_with_headers)
        await self.app(scope, _in_time(receive, self.body_s), send_with_headers)

    def _may(self, scope: Scope) -> bool:
        if self.token is None or (scope.get("method"), scope["path"]) in self.without_token:
            return True
        given = Headers(scope=scope).get("authorization", "")
        return secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode())


def _in_time(receive: Receive, seconds: float) -> Receive:
    """The same messages, but the whole body must come within some seconds."""
    loop = asyncio.get_running_loop()
    end: float | None = loop.time() + seconds

    async def timed() -> Any:
        nonlocal end
        if end is None:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, end - loop.time()))
        except TimeoutError as err:
            raise HTTPException(408, f"the body did not come within {seconds:g} s", {"Connection": "close"}) from err
        if not message.get("more_body", False):
            end = None
        return message

    return timed
