"""Middleware before every route: token, room in the queue, size and time of a body, security headers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.app.server.answers import problem

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


UNAUTHORIZED = problem(
    401, "missing or wrong token; send Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer", **HEADERS}
)
OVERLOADED = problem(429, "model is overloaded", {"Retry-After": "1", **HEADERS})
OVERLOADED_AND_CLOSE = problem(429, "model is overloaded", {"Retry-After": "1", "Connection": "close", **HEADERS})
AMBIGUOUS = problem(400, "a body cannot have both a length and a transfer encoding", {"Connection": "close", **HEADERS})
TOO_LARGE = problem(413, "the body is too large", HEADERS)


class Guard:
    """Refuses requests without a token or while the queue is full, and bodies that are too large or too slow.

    `is_full` gets the number of requests between the last byte of their bodies and their responses, since simultaneous
    requests are not in the queue yet. `watch` gets each response's scope, status and seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        without_token: Collection[tuple[str, str]],
        body_bytes: int,
        body_s: float,
        is_full: Callable[[int], bool],
        watch: Callable[[Scope, int, float], None],
    ) -> None:
        self.app, self.token, self.without_token = app, token, without_token
        self.body_bytes, self.body_s, self.is_full, self.watch = body_bytes, body_s, is_full, watch
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        headers = Headers(scope=scope)
        if not self._may(scope, headers):
            return await self._refuse(UNAUTHORIZED, scope, receive, send)
        if scope["method"] == "POST" and self.is_full(self.inside):
            # a client that waits for '100 Continue' would wait for ever on an open connection
            answer = OVERLOADED_AND_CLOSE if "expect" in headers else OVERLOADED
            return await self._refuse(answer, scope, receive, send)
        if (
            "transfer-encoding" in headers and "content-length" in headers
        ):  # a proxy may read a different body than we do
            return await self._refuse(AMBIGUOUS, scope, receive, send)
        if int(headers.get("content-length", 0)) > self.body_bytes:
            return await self._refuse(TOO_LARGE, scope, receive, send)

        begin = time.perf_counter()
        is_inside = False
        left = self.body_bytes

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.watch(scope, message["status"], time.perf_counter() - begin)
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
            await send(message)

        async def receive_in_time() -> Message:
            nonlocal is_inside, left
            if is_inside:
                return await receive()
            try:
                async with asyncio.timeout(begin + self.body_s - time.perf_counter()):
                    message = await receive()
            except TimeoutError as err:
                late = f"the body did not arrive within {self.body_s:g} s"
                raise HTTPException(408, late, {"Connection": "close"}) from err
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, "the body is too large")
            if not message.get("more_body", False):
                is_inside = True
                self.inside += 1
            return message

        try:
            await self.app(scope, receive_in_time, send_with_headers)
        finally:
            self.inside -= is_inside

    async def _refuse(self, answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a prepared response, since under overload this is most of the work."""
        self.watch(scope, answer.status_code, 0.0)
        await answer(scope, receive, send)

    def _may(self, scope: Scope, headers: Headers) -> bool:
        if self.token is None or (scope.get("method"), scope["path"]) in self.without_token:
            return True
        credentials = headers.get("authorization", "")
        return secrets.compare_digest(credentials.encode(), f"Bearer {self.token}".encode())
