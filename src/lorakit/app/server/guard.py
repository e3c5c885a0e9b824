"""What stands before every route: the token, room in the queue, the time a body may take; and the headers of every answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.app.server.answers import problem

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses who has no token, and who comes while the queue is full, before a byte of the body is read; then slow bodies.

    `is_full` gets how many requests are inside, from the last byte of their bodies to their answers: those that came
    together are not in the queue yet. `watch` gets each answer's scope, status and seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        without_token: Collection[tuple[str, str]],
        body_s: float,
        is_full: Callable[[int], bool],
        watch: Callable[[Scope, int, float], None],
    ) -> None:
        self.app, self.token, self.without_token = app, token, without_token
        self.body_s, self.is_full, self.watch = body_s, is_full, watch
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        begin = time.perf_counter()
        is_inside = False

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.watch(scope, message["status"], time.perf_counter() - begin)
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        async def receive_in_time() -> Message:
            nonlocal is_inside
            if is_inside:
                return await receive()
            try:
                async with asyncio.timeout(begin + self.body_s - time.perf_counter()):
                    message = await receive()
            except TimeoutError as err:
                late = f"the body did not come within {self.body_s:g} s"
                raise HTTPException(408, late, {"Connection": "close"}) from err
            if not message.get("more_body", False):
                is_inside = True
                self.inside += 1
            return message

        if not self._may(scope):
            needed = "a token is needed: Authorization: Bearer TOKEN"
            return await problem(401, needed, {"WWW-Authenticate": "Bearer"})(scope, receive, send_with_headers)
        if scope["method"] == "POST" and self.is_full(self.inside):
            # who waits for a word before the body is sent would wait for ever on a connection that stays
            more = {"Connection": "close"} if "expect" in Headers(scope=scope) else {}
            answer = problem(429, "model is overloaded", {"Retry-After": "1", **more})
            return await answer(scope, receive, send_with_headers)
        try:
            await self.app(scope, receive_in_time, send_with_headers)
        finally:
            self.inside -= is_inside

    def _may(self, scope: Scope) -> bool:
        if self.token is None or (scope.get("method"), scope["path"]) in self.without_token:
            return True
        given = Headers(scope=scope).get("authorization", "")
        return secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode())
