"""The server process, from loading adapters to a graceful stop, and its log.

The log is a JSON object a line on stderr. What people send is not in it, unless the server was told to.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from lorakit.app.server.routes import LOOPBACK, Limits, Service, create_app, find_all, log
from lorakit.errors import AdapterError, ConfigError
from lorakit.inference.adapter_pool import AdapterPool


class JsonLines(logging.Formatter):
    """A record as a line of JSON, with the facts that it was given as `extra={"facts": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, all of it ASCII, so that no text reaches a terminal as more than letters."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        facts: dict[str, Any] = getattr(record, "facts", {})
        entry = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **facts,
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


@contextmanager
def json_log(level: str) -> Iterator[None]:
    """Within this block, write what is of this level or graver to stderr; of uvicorn, warnings and errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    loggers = {log: level, logging.getLogger("uvicorn.error"): "warning"}
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger, least in loggers.items():
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(least.upper())
    try:
        yield
    finally:
        for logger, number, propagate in before:
            logger.removeHandler(handler)
            logger.propagate = propagate
            logger.setLevel(number)


EVERYWHERE = ("0.0.0.0", "::")
RECEIVE_BYTES = 16_384  # per read of a connection: 256 KB in one-byte chunks would block the event loop for 0.3 s
END_S = 10  # after which a graceful stop becomes a hard one


class Server(uvicorn.Server):
    """uvicorn's server, but after a signal and a graceful stop it returns instead of dying of the signal.

    If something does not stop (for example a thread reading from a hanging disk), the process exits anyway.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()
        last = threading.Timer(2 * (self.config.timeout_graceful_shutdown or 0) + END_S, os._exit, (1,))
        last.daemon = True
        last.start()


def make_server(service: Service, token: str | None, hosts: Sequence[str] = LOOPBACK) -> Server:
    """A server that answers all accepted requests before it stops, but waits for no client."""
    limits = service.limits
    return Server(
        uvicorn.Config(
            create_app(service, token, hosts),
            http="h11",  # limits headers to 64 KB; httptools has no limit
            ws="none",
            log_config=None,
            access_log=False,  # ours is the guard's, with the time to the answer
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(limits.answer_s) + 1,
        )
    )


def run(
    roots: Sequence[Path],
    address: tuple[str, int],
    token: str | None,
    *,
    limits: Mapping[str, Any],
    say: Callable[[dict[str, Any]], None],
    dry_run: bool = False,
    log_level: str = "info",
    log_texts: bool = False,
    device: str = "auto",
) -> None:
    """Load all adapters (as many as fit into memory), serve them until a signal comes, and answer accepted requests.

    Raises:
        LorakitError: an adapter cannot be served beside the others, or the address cannot be used.
    """
    with (
        json_log(log_level),
        AdapterPool(find_all(roots), device=device, limit_bytes=limits["memory"], load_s=limits["timeout"]) as pool,
    ):
        for name, folder in pool.folders.items():
            try:
                pool.load(name).result(limits["timeout"])
            except TimeoutError as err:
                raise AdapterError(f"{folder}: not loaded within {limits['timeout']:g} s (--timeout)") from err
        gc.freeze()  # so that garbage collection skips the adapters, which would stop every thread for 0.2 s
        facts = {"adapters": list(pool.folders), "base": pool.shared.side.base.name, "bytes": pool.size}
        if dry_run:
            return say({**facts, "url": "not started: --dry-run"})
        with listen(*address) as listener:
            host, port = listener.getsockname()[:2]
            say({**facts, "url": f"http://{_bracketed(host)}:{port}/"})
            service_limits = Limits(waiting=limits["waiting"], inputs=limits["inputs"], answer_s=limits["timeout"])
            hosts = ["*"] if address[0] in EVERYWHERE else [*LOOPBACK, *map(_bracketed, (address[0], host))]
            service = Service(pool, roots, service_limits, log_texts=log_texts)
            make_server(service, token, hosts).run([listener])


def _bracketed(host: str) -> str:
    """An address as in URLs and Host headers."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises a ConfigError if the address cannot be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        return listener
    except (OSError, OverflowError) as err:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {err}") from err
