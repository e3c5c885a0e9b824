"""The server's log: a JSON object a line on stderr. What people send is not in it, unless the server was told to."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("lorakit.serve")


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
