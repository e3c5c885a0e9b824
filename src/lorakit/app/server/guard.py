"""What stands before every route: the token, the time that a body may take, and the headers of every answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


def overloaded() -> JSONResponse:
    """The answer to who comes while the queue is full."""
    return problem(429, "overloaded", "model is overloaded", Retry_After="1")


class Guard:
    """Refuses who has no token, and everybody while the server is `busy`, before a byte of the body is read.

    Under overload refusals are most of what a server does, so that they must cost little. A body that comes too slowly is
    refused later.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        open_paths: Collection[str],
        body_s: float,
        busy: Callable[[], bool],
        watch: Callable[[Scope, int, float], None],
    ) -> None:
        self.app, self.token, self.open_paths, self.body_s = app, token, open_paths, body_s
        self.busy, self.watch = busy, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
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
        if scope["method"] == "POST" and self.busy():
            return await overloaded()(scope, receive, send_with_headers)
        await self.app(scope, _in_time(receive, self.body_s), send_with_headers)

    def _may(self, scope: Scope) -> bool:
        if self.token is None or scope["path"] in self.open_paths:
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
