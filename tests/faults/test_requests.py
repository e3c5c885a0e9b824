"""Hundreds of kinds of bad requests to a server process: none gets an answer of class 5xx, holds it up or fills its memory."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lorakit.app.server.routes import OPEN
from tests.app.test_server import METHODS, WORST, WRONG, spellings
from tests.shipped import ship

TOKEN = "open-sesame"
MOST_S, MOST_MB = 5.0, 1_000
ROUTES = ("/predict", "/", "/models/mood", "/models/tags")
GET = (
    "/",
    "/info",
    "/adapters",
    "/metrics",
    "/openapi.json",
    "/health",
)
VALUES: list[Any] = [
    None,
    True,
    0,
    0.5,
    10**400,
    "",
    "  ",
    "\0",
    "\x1b[31m\u202e\ufffe",
    [],
    [[[[]]]],
    ["a", 1],
    {"a": {"b": []}},
]


def request(target: str, body: Any = None, method: str = "POST", token: str | None = TOKEN, **headers: str) -> bytes:
    """The bytes of a request that closes its connection."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": "localhost",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        **({} if token is None else {"Authorization": f"Bearer {token}"}),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + content


def short(value: Any) -> str:
    return str(value)[:40]


def bodies() -> Iterator[tuple[str, bytes]]:
    """Bodies that are wrong, and large ones that are right."""
    for path, (name, body) in itertools.product(ROUTES[::2], WORST.items()):
        yield f"{path} {name}", request(path, body)
    for path, (body, *_) in itertools.product(ROUTES[::2], WRONG):
        yield f"{path} {str(body)[:30]}", request(path, body)
    fields = ("inputs", "adapter", "truncate", "truncation_direction", "raw_scores", "more")
    for field, value in itertools.product(fields, VALUES):
        yield f"{field} {short(value)}", request("/predict", {"inputs": "a", field: value})
    long = "a b " * 15_000
    for adapter, truncate in itertools.product(("mood", "tags"), (False, True)):
        for texts in ([long], [[long]] * 32, [[long[:60_000]] * 2] * 16):
            body = {"inputs": texts, "adapter": adapter, "truncate": truncate}
            yield f"{len(texts)} long texts to {adapter}, {truncate}", request("/predict", body)


def protocol() -> Iterator[tuple[str, bytes]]:
    """Bytes that are not quite HTTP."""
    body = b'{"inputs": "a"}'
    auth = f"Host: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    start = b"POST /predict HTTP/1.1\r\n" + auth
    chunked = start + b"Transfer-Encoding: chunked\r\n"
    huge = "9" * 400
    for line in ("-1", "+15", "x", "15\r\nContent-Length: 16", huge, "0xf", "1.5", "15, 15", "99999999999"):
        yield f"length {short(line)}", start + f"Content-Length: {line}\r\n\r\n".encode() + body
    for rest in (
        *(b"zz\r\n", b"f" * 40 + b"\r\n", b"-1\r\na", b"1\r\nabc", b"1;" + b"a" * 200_000 + b"\r\na\r\n0\r\n\r\n"),
        *(
            b"0\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
            b"1\r\na\r\n" * 1_000_000,
            b"ffffff\r\n" + b"a" * 0xFFFFFF + b"\r\n",
        ),
    ):
        yield f"chunks {short(rest[:40])}", chunked + b"\r\n" + rest
    yield "chunks and a length", chunked + b"Content-Length: 4\r\n\r\n0\r\n\r\n"
    for value in ("gzip, chunked", "chunked, chunked", "xchunked", "identity"):
        yield f"transfer {value}", start + f"Transfer-Encoding: {value}\r\nContent-Length: 15\r\n\r\n".encode() + body
    for name, values in {
        "Content-Encoding": ["gzip"],
        "Range": ["bytes=0-1"],
        "Content-Type": [
            *(
                "application/json; charset=utf-16",
                "application/x-www-form-urlencoded",
                "multipart/form-data; boundary=x",
            ),
            *("", "a" * 8_000, ";;=/\xff"),
        ],
        "X-HTTP-Method-Override": ["GET"],
        "X-Forwarded-Prefix": ["/health"],
        "X-Original-URL": ["/health"],
        "Expect": ["100-continue", "200-ok"],
        "Upgrade": ["websocket", "h2c"],
        "Cookie": ["a" * 16_000],
        "Origin": ["null"],
        "Host": ["evil.example", "localhost, evil", "", "localhost:99999999", "a@localhost"],
    }.items():
        for value in values:
            yield f"{name}: {short(value)}", request("/predict", body, **{name: value})
    for name, line in {
        "0.9": b"GET /health\r\n\r\n",
        "1.0": b"POST /predict HTTP/1.0\r\n" + auth + b"\r\n",
        "2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "3": b"GET / HTTP/3\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        "zeros": bytes(1_000),
        "noise": bytes(range(256)) * 40,
        "lines": b"\r\n" * 10_000,
        "a long method": b"A" * 100_000 + b" / HTTP/1.1\r\n\r\n",
        "a long path": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        "spaces": b"GET  /  HTTP/1.1\r\n\r\n",
        "a long query": b"GET /health?" + b"a=b&" * 50_000 + b" HTTP/1.1\r\n" + auth + b"\r\n",
        "a long header": b"GET /health HTTP/1.1\r\na: " + b"a" * 5_000_000,
        "many headers": b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 500_000,
        "folded": start + b"a: b\r\n c\r\nContent-Length: 0\r\n\r\n",
        "a bare colon": start + b": x\r\n\r\n",
        "a space in a name": start + b"a b : c\r\n\r\n",
        "a null in a value": start + b"a: \0\r\n\r\n",
        "a bare newline": b"GET /health HTTP/1.1\nHost: localhost\n\n",
        "two requests": request("/predict", body).replace(b"close", b"keep-alive") + request("/predict", body),
        "a hundred": request("/health", method="GET").replace(b"close", b"keep-alive") * 99
        + request("/health", method="GET"),
    }.items():
        yield f"line {name}", line
    for target in (
        *("*", "//", "/%", "/%zz", "/%00", "/%ff%fe", "/../../etc/passwd", "/predict%2f", "/models/%2e%2e"),
        *("/models//", f"/models/{'a' * 9_000}", f"/models/{'%f0%9f%98%80' * 900}"),
        *("http://localhost/predict", "http://[/", "a:b", "?", "#"),
    ):
        for method in ("GET", "POST"):
            yield f"target {method} {target[:40]}", request(target, body, method)


def strangers() -> Iterator[tuple[str, bytes]]:
    """Whatever is asked without the token, or with another."""
    for path, method in itertools.product((*GET, *ROUTES[::2], "/nowhere"), METHODS):
        yield f"{method} {path}", request(path, {"inputs": "a"}, method, token=None)
    for path, token in itertools.product(GET[1:3], ("", TOKEN[:-1], f"{TOKEN}\xff", TOKEN.upper(), "é" * 4_000)):
        yield f"{path} with {token[:20]!r}", request(path, method="GET", token=token)
    for path in ("/predict", "/info"):
        for target in spellings(path):
            yield f"GET {target}", request(target, method="GET", token=None)


def cpu_seconds(pid: int) -> float:
    """What a process has taken so far: the clock also counts what else a busy machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Seen(NamedTuple):
    """What came of a request: its status (0 for a connection that was closed without an answer), and when it had all come."""

    status: int
    seconds: float
    body: bytes


def send(port: int, content: bytes, most_s: float = 60.0) -> Seen:
    """Send, and read what comes until the connection ends, or nothing has come for `most_s`: of half a request, say."""
    begun = last = time.monotonic()
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(content)
            connection.settimeout(most_s)
            while more := connection.recv(1 << 20):
                answer += more
                last = time.monotonic()
        except (ConnectionError, TimeoutError):
            pass  # or an answer before all was sent
    seconds = (last if answer else time.monotonic()) - begun
    head, _, body = answer.partition(b"\r\n\r\n")
    return Seen(int(head.split()[1]) if head.startswith(b"HTTP/") else 0, seconds, body)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what a process takes is read from /proc")
def test_bad_requests_harm_nothing(bert: Path, tmp_path: Path) -> None:
    ship(tmp_path / "served" / "mood", bert, "sequence_classification", ("bad", "good"))
    ship(tmp_path / "served" / "topic", bert, "sequence_classification", ("one", "two", "three"), r=3)
    ship(tmp_path / "served" / "tags", bert, "multi_label_classification", ("x", "y"))
    words = ("serve", str(tmp_path / "served"), "--port", "0", "--json", "--token", TOKEN)
    command = [sys.executable, "-m", "lorakit", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment) as server,
    ):
        assert server.stdout is not None
        port = int(json.loads(server.stdout.readline())["url"].rstrip("/").rpartition(":")[2])
        found: dict[str, Seen] = {}
        answers: dict[str, Seen] = {}
        used: dict[str, float] = {}
        for group, into, most_s in ((bodies, found, 60.0), (protocol, found, 1.0), (strangers, answers, 60.0)):
            for name, content in group():
                before = cpu_seconds(server.pid)
                into[name] = send(port, content, most_s)
                used[name] = cpu_seconds(server.pid) - before
        right = send(port, request("/predict", {"inputs": "a"}))
        metrics = send(port, request("/metrics", method="GET")).body.decode()
        status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        most_mb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
        server.terminate()
        code = server.wait(90)
    every = found | answers
    slowest, dearest = max(every, key=lambda name: every[name].seconds), max(used, key=used.__getitem__)
    print(
        f"\n{len(every)} kinds of requests, {len(answers)} of them without the token: by status "
        f"{dict(sorted(Counter(seen.status for seen in every.values()).items()))}; the longest, {slowest!r}, "
        f"{every[slowest].seconds:.1f} s; the dearest, {dearest!r}, {used[dearest]:.1f} CPU seconds; at most {most_mb} MB"
    )
    assert len(every) >= 300
    assert {name: seen for name, seen in every.items() if seen.status >= 500} == {}
    assert {name: seconds for name, seconds in used.items() if seconds > MOST_S} == {}
    assert most_mb < MOST_MB
    opened = {name for name, seen in answers.items() if seen.status not in (0, 400, 401)}
    assert opened == {f"{method} {path}" for method, path in OPEN} & answers.keys()
    assert (right.status, code) == (200, 0)
    assert 'status="5' not in metrics
    assert "Traceback" not in log.read_text()
    for name, seen in found.items():
        assert b"function-" not in seen.body and b"Traceback" not in seen.body, name
