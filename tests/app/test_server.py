"""The server over real sockets, with tiny adapters: answers are each adapter's own Predictor's, and nothing ends it."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.app.server import process, routes
from lorakit.app.server.answers import ERRORS, prediction
from lorakit.app.server.process import Server, json_log, make_server
from lorakit.app.server.queue import Batcher, Closed, Overloaded
from lorakit.app.server.routes import OPEN, Limits, Service, find_all
from lorakit.data.example import Example
from lorakit.inference.adapter_pool import AdapterPool, Query, find_adapters
from lorakit.inference.predictor import load
from lorakit.inference.shared_base import SharedModel
from tests.app.conftest import Cli
from tests.runs import reviews, until
from tests.shipped import ship

TOKEN = "open-sesame"
JSON = {"Content-Type": "application/json"}
LIMITS = Limits(body_bytes=20_000, body_s=0.4, characters=2_000, inputs=4)
TEXTS = [text for text, _ in reviews(24)]


def head(*lines: str) -> bytes:
    """The first bytes of a request to /predict."""
    return "\r\n".join(
        ("POST /predict HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", "")
    ).encode()


class Reply(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running(NamedTuple):
    """A server in a thread of this process."""

    server: Server
    service: Service
    port: int
    root: Path

    def ask(self, path: str, body: Any = None, headers: Mapping[str, str] = JSON, method: str | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, content, dict(headers))
        answer = connection.getresponse()
        reply = Reply(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})
        connection.close()
        return reply

    def predict(self, inputs: Any, **more: Any) -> Reply:
        return self.ask("/predict", {"inputs": inputs, **more})

    def raw(self, content: bytes, wait_s: float = 5.0) -> bytes:
        """What the server says to some bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as connection:
            connection.sendall(content)
            return connection.recv(65536)


@contextmanager
def serve(
    root: Path, token: str | None = None, limits: Limits = LIMITS, *, log_texts: bool = False
) -> Iterator[Running]:
    with AdapterPool(find_adapters(root)) as pool:
        service = Service(pool, [root], limits, log_texts=log_texts)
        server = make_server(service, token)
        with process.listen("127.0.0.1", 0) as listener:
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            while not server.started:
                time.sleep(0.01)
            try:
                yield Running(server, service, listener.getsockname()[1], root)
            finally:
                server.should_exit = True
                thread.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    folder, task = tmp_path_factory.mktemp("served"), "sequence_classification"
    ship(folder / "mood", bert, task, ("bad", "good"), seed=1)
    ship(folder / "topic", bert, task, ("<b>one</b>", "two", "three"), seed=2, r=3, use_dora=True)
    ship(folder / "tags", bert, "multi_label_classification", ("x", "y"), seed=3)
    return folder


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Running]:
    with serve(root) as server:
        yield server


def alone(folder: Path, text: str) -> dict[str, float]:
    return load(folder).predict([text])[0]["probabilities"]


def scores(entries: list[dict[str, Any]]) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in entries}


# Answers


def test_documented_requests_of_text_embeddings_inference_are_answered(running: Running) -> None:
    single = running.ask("/predict", b'{"inputs":"I like you."}').json
    assert [list(entry) for entry in single] == [["score", "label"]] * 2
    assert single == sorted(single, key=lambda entry: -entry["score"])
    assert scores(single) == pytest.approx(alone(running.root / "mood", "I like you."), abs=1e-5)
    batch = running.ask("/predict", b'{"inputs":[["I like you."], ["I hate pineapples"]]}').json
    assert [len(entries) for entries in batch] == [2, 2]
    assert scores(batch[0]) == pytest.approx(scores(single), abs=1e-5)
    assert scores(running.predict(["I like you."]).json) == pytest.approx(scores(single), abs=1e-5)


def test_requests_together_get_the_answers_that_each_gets_alone(running: Running) -> None:
    names = ("mood", "topic", "tags")
    requests = [(text, names[i % 3]) for i, text in enumerate(TEXTS)]
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda each: running.predict(each[0], adapter=each[1]).json, requests))
    loaded = {name: load(running.root / name) for name in names}
    for (text, name), entries in zip(requests, together, strict=True):
        (answer,) = loaded[name].predict([text])
        assert scores(entries) == pytest.approx(answer["probabilities"], abs=1e-5)


FORMS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (
        {"label": "b", "score": 0.75, "probabilities": {"a": 0.25, "b": 0.75}},
        [{"score": 0.75, "label": "b"}, {"score": 0.25, "label": "a"}],
    ),
    (
        {"labels": ["a"], "probabilities": {"a": 0.9, "b": 0.2}},
        [{"score": 0.9, "label": "a"}, {"score": 0.2, "label": "b"}],
    ),
    ({"label": "a", "score": 0.5}, [{"score": 0.5, "label": "a"}]),
    ({"value": 2.5}, [{"score": 2.5, "label": "value"}]),
    ({"entities": [{"entity_group": "PER"}]}, [{"entity_group": "PER"}]),
    ({"entities": []}, []),
]


@pytest.mark.parametrize(("answer", "entries"), FORMS)
def test_answers_of_every_task_have_a_form(answer: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    assert prediction(answer) == entries
    assert [math.exp(e["score"]) for e in prediction(answer, raw=True) if "probabilities" in answer] == pytest.approx(
        [entry["score"] for entry in entries if "probabilities" in answer]
    )


def test_metrics_and_info_name_the_adapters(running: Running) -> None:
    running.predict("a film", adapter="mood")
    metrics = running.ask("/metrics").body.decode()
    assert 'lorakit_requests_total{route="/predict",status="200"}' in metrics
    assert 'lorakit_texts_total{adapter="mood"}' in metrics
    info = running.ask("/info").json
    assert (info["default_adapter"], info["adapters"]) == ("mood", ["mood", "tags", "topic"])
    assert {entry["name"] for entry in running.ask("/adapters").json} == set(info["adapters"])


@pytest.mark.parametrize("log_texts", [False, True])
def test_requests_are_logged_with_their_latency_and_without_their_texts(
    root: Path, log_texts: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "my \x1b[31m diagnosis"
    with json_log("info"), serve(root, TOKEN, log_texts=log_texts) as logged:
        right = {"Authorization": f"Bearer {TOKEN}", **JSON}
        logged.ask("/predict", {"inputs": secret, "adapter": "topic"}, right)
        logged.ask("/predict", {"inputs": secret, "adapter": "nowhere"}, right)
        logged.ask(f"/predict?text={secret.encode().hex()}", {"inputs": secret}, JSON)
        logged.ask("/health")
    err = capsys.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert all(list(line)[:3] == ["time", "level", "message"] for line in lines)
    requests = [line for line in lines if line["message"] == "request"]
    assert [(line["route"], line["status"]) for line in requests] == [("/predict", 200), ("/predict", 404), (None, 401)]
    assert (requests[0]["adapter"], requests[0]["texts"], 0 < requests[0]["ms"] < 20_000) == ("topic", 1, True)
    assert "\x1b" not in err and secret.encode().hex() not in err
    assert [line.get("inputs") for line in requests] == ([[[secret, None]], None, None] if log_texts else [None] * 3)
    assert ("diagnosis" in err) == log_texts


# Refusals

WRONG: list[tuple[Any, int, str]] = [
    ({"inputs": ""}, 400, "cannot be empty"),
    ({"inputs": []}, 400, "cannot be empty"),
    ({"inputs": [[]]}, 422, "a list of 0 strings"),
    ({"inputs": [["a"], ["b", "c", "d"]]}, 422, "a list of 3 strings"),
    ({"inputs": [["a"]] * 5}, 413, "batch size 5 > maximum allowed batch size 4"),
    ({"inputs": "a" * 2001}, 413, "2001 characters; at most 2000"),
    ({"inputs": "a film " * 60}, 413, "must have less than 32 tokens"),
    ({"inputs": ["a", "b"]}, 422, "trained on single texts"),
    ({"inputs": "a\0b"}, 422, "NUL"),
    ({"inputs": "a", "adapter": "mod"}, 404, "did you mean 'mood'?"),
    ({"inputs": "a", "adapter": "../mood"}, 404, "no adapter"),
    ({"inputs": "a", "trunkate": True}, 422, "`trunkate`: no such field in this request"),
    ({"inputs": "a", "truncate": "yes"}, 422, "truncate"),
    ({"inputs": 7}, 422, "`inputs`: expected a text, a pair [a, b], or a batch"),
    ({"inputs": ["a", 7]}, 422, "`inputs`: expected a text, a pair [a, b], or a batch"),
    ({"inputs": [["a"], 7]}, 422, "`inputs`: expected a text, a pair [a, b], or a batch"),
    ({"inputs": "a", "adapter": "m" * 9000}, 404, "no adapter 'mmm"),
    ({"inputs": "a", "m" * 9000: 1}, 422, "mmm..."),
    ([{"inputs": "a"}], 422, "dictionary"),
    (b'{"inputs": NaN}', 400, "not JSON"),
    (b'{"inputs": "\\ud800"}', 400, "hex escape"),
    (b'{"inputs": "\xff"}', 400, "not JSON"),
    (b'{"inputs": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    (b"[" * 10_000, 413, "more than 1016 values"),
    (b"[" * 900, 400, "not JSON"),
    (b"{", 400, "not JSON"),
    (b"", 400, "the body is empty"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_wrong_requests_are_refused_in_words(running: Running, body: Any, status: int, message: str) -> None:
    reply = running.ask("/predict", body)
    assert (reply.status, sorted(reply.json)) == (status, ["error", "error_type"])
    assert message in reply.json["error"]
    assert len(reply.body) < 1_000 and "function" not in reply.json["error"]


@pytest.mark.parametrize(("path", "body", "status"), [("/docs", None, 404), ("/classify", {}, 404), ("/info", {}, 405)])
def test_a_path_that_is_not_there_names_where_the_routes_are(
    running: Running, path: str, body: Any, status: int
) -> None:
    reply = running.ask(path, body)
    method = "GET" if body is None else "POST"
    assert reply.status == status
    assert reply.json["error"].startswith(f"there is no {method} on this path; the routes are in /openapi.json")


def test_documents_say_which_errors_there_are(running: Running) -> None:
    described = running.ask("/openapi.json").json
    for path in ("/predict", "/models/{model}"):
        assert set(described["paths"][path]["post"]["responses"]) == {"200", *map(str, ERRORS)}
    assert "HTTPValidationError" not in described["components"]["schemas"]
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for status, (_, when) in ERRORS.items():
        assert f"| {status} | {when} |" in page


@pytest.mark.parametrize(
    ("content", "reply"),
    [
        (head("Content-Length: 300000000") + b"{", [b" 413 "]),
        (head("Transfer-Encoding: chunked") + b"ffff\r\n" + b"a" * 65535 + b"\r\n", [b" 413 "]),
        (head("Content-Length: 90") + b"{", [b" 408 ", b"connection: close"]),  # and no more
        (head("Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n", [b" 400 "]),  # smuggled
    ],
)
def test_bodies_that_are_too_long_too_slow_or_of_two_lengths_are_refused(
    running: Running, content: bytes, reply: list[bytes]
) -> None:
    begun = time.monotonic()
    received = running.raw(content).lower()
    assert time.monotonic() - begun < LIMITS.body_s + 2
    assert all(part in received for part in reply)


def test_headers_without_end_are_not_collected(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as connection, pytest.raises(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(1_000):
            connection.sendall(b"a: " + b"b" * 10_000 + b"\r\n")


def test_client_that_leaves_within_its_body_is_no_failure_of_the_server(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port)) as leaving:
        leaving.sendall(head("Content-Length: 90") + b"{")
        time.sleep(0.1)
    until(lambda: 'status="499"' in running.ask("/metrics").body.decode(), "an end")
    assert 'status="5' not in running.ask("/metrics").body.decode()


def test_request_for_another_host_is_refused(running: Running) -> None:
    assert running.ask("/info", headers={"Host": "evil.example"}).status == 400


METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "get", "PROPFIND")


def spellings(path: str) -> list[str]:
    """A path as a client may write it that hopes to pass by whoever compares paths."""
    encoded = "/" + "".join(f"%{ord(c):02x}" for c in path[1:])
    odd = [
        f"{path}/",
        f"/{path}",
        path.upper(),
        encoded,
        f"/x/..{path}",
        f"{path}%00",
        f"{path};x",
        f"{path}?a=/health",
    ]
    return [path, *odd, f"/health/..{path}", f"http://localhost{path}", f"http://localhost/health/..{path}"]


def test_nothing_but_the_open_routes_answers_without_the_token(root: Path) -> None:
    with serve(root, TOKEN) as guarded:
        app = guarded.server.config.app
        routes = {route.path for route in app.routes}
        assert {
            "/predict",
            "/metrics",
            "/adapters",
            "/openapi.json",
            *(path for _, path in OPEN),
        } <= routes
        answered = set()
        connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=20)
        for path in sorted(routes | {"/nowhere"}):
            plain, *others = spellings(path.replace("{model}", "mood"))
            requests = [
                *((method, plain) for method in METHODS),
                *((m, other) for m in METHODS[:2] for other in others),
            ]
            for method, target in requests:
                connection.request(method, target, b'{"inputs": "a"}', JSON)
                answer = connection.getresponse()
                answer.read()
                if answer.status not in (400, 401):
                    answered.add((method, unquote(urlsplit(target).path)))
        connection.close()
        assert answered == OPEN
        for wrong in ("", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", f"bearer{TOKEN}"):
            assert guarded.ask("/predict", {"inputs": "a"}, {"Authorization": wrong, **JSON}).status == 401
        right = {"Authorization": f"Bearer {TOKEN}", **JSON}
        assert guarded.ask("/predict", {"inputs": "a"}, right).status == 200


NUMBERS = b'{"inputs": [' + b"1," * 900_000 + b"1]}"
WORST = {
    "numbers": NUMBERS,
    "lists": b'{"inputs": [' + b"[]," * 600_000 + b"[]]}",
    "objects": b'{"inputs": [' + b"{}," * 600_000 + b"{}]}",
    "strings": b'{"inputs": [' + b'"",' * 600_000 + b'""]}',
    "batch": b'{"inputs": [' + b'["a"],' * 300_000 + b'["a"]]}',
    "depth": b'{"inputs": ' + b"[" * 1_900_000,
    "keys": b"{" + b",".join(b'"%x": 1' % i for i in range(180_000)) + b"}",
    "same keys": b"{" + b'"inputs": 1,' * 150_000 + b'"inputs": 1}',
    "long key": b'{"' + b"a" * 1_900_000 + b'": 1}',
    "long name": b'{"inputs": "a", "adapter": "' + b"a" * 1_900_000 + b'"}',
    "huge integer": b'{"inputs": ' + b"9" * 1_900_000 + b"}",
    "huge fraction": b'{"inputs": 0.' + b"9" * 1_900_000 + b"}",
    "escapes": b'{"inputs": "' + b"\\u00e9" * 300_000 + b'"}',
    "quotes": b'{"inputs": "' + b'\\"' * 900_000 + b'"}',
    "backslashes": b'{"inputs": "' + b"\\\\" * 900_000 + b'"}',
    "surrogates": b'{"inputs": "' + b"\\ud800" * 300_000 + b'"}',
    "bytes": b'{"inputs": "' + b"\xff" * 1_900_000 + b'"}',
    "spaces": b" " * 1_900_000,
    "wrong entries at the limit": b'{"inputs": [' + b"1," * 1_000 + b"1]}",
    "unknown keys at the limit": b"{" + b",".join(b'"%x": 1' % i for i in range(1_000)) + b"}",
    "objects at the limit": b'{"inputs": [' + b"{}," * 500 + b"{}]}",
}


async def longest_hold(root: Path, bodies: Mapping[str, bytes]) -> dict[str, float]:
    """For each body the most CPU seconds for which the event loop of a server did nothing else."""
    held: dict[str, float] = {}
    name = ""

    async def tick() -> None:
        while True:
            begun = time.thread_time()
            await asyncio.sleep(0.001)
            held[name] = max(held.get(name, 0.0), time.thread_time() - begun)

    def ask_all(running: Running) -> None:
        nonlocal name
        until(lambda: running.server.started, "a server")
        for name, body in bodies.items():
            status = running.ask("/predict", body).status
            assert 400 <= status < 500, (name, status)
        name = "an answer of 96,000 entities"
        entity = {"entity_group": "PER", "word": "a", "start": 0, "end": 1, "score": 0.123456789}
        future: Future[Any] = Future()
        future.set_result([{"entities": [entity] * 3_000}] * 32)
        running.service.batcher.submit = lambda *requests, **options: future  # type: ignore[method-assign]
        assert len(running.predict([["a"]] * 32).json) == 32
        name = "chunks of a byte"
        chunks = b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n"
        assert b" 400 " in running.raw(head("Transfer-Encoding: chunked") + chunks, 60)

    with AdapterPool(find_adapters(root)) as pool, process.listen("127.0.0.1", 0) as listener:
        service = Service(pool, [root], Limits(body_s=60))
        server = make_server(service, None)
        serving, ticking = asyncio.create_task(server.serve([listener])), asyncio.create_task(tick())
        try:
            await asyncio.to_thread(ask_all, Running(server, service, listener.getsockname()[1], root))
        finally:
            server.should_exit = True
            await serving
            ticking.cancel()
    return held


@pytest.mark.slow
def test_no_request_holds_the_event_loop(root: Path) -> None:
    held = asyncio.run(longest_hold(root, WORST))
    assert max(held.values()) < 0.1, sorted(held.items(), key=lambda entry: -entry[1])[:5]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
BODIES = st.one_of(
    st.binary(max_size=60),
    st.builds(json.dumps, JSON_VALUES).map(str.encode),
    st.fixed_dictionaries(
        {"inputs": JSON_VALUES | st.text() | st.lists(st.lists(st.text(), max_size=3), max_size=5)},
        optional={
            "adapter": st.sampled_from(["mood", "topic", "tags"]) | st.text(),
            "truncate": st.booleans() | JSON_VALUES,
        },
    ).map(lambda value: json.dumps(value).encode()),
)
VECTORS = ("/embed", "/similarity", "/rerank", "/v1/embeddings")
PATHS = st.sampled_from(["/predict", "/", "/models/mood", "/models/x", *VECTORS])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, path=PATHS)
def test_no_request_gets_an_answer_of_class_5xx(running: Running, body: bytes, path: str) -> None:
    assert_answered(running, body, path)


@pytest.mark.faults
@settings(deadline=None, database=None, max_examples=100_000, suppress_health_check=list(HealthCheck))
@given(body=BODIES, path=PATHS)
def test_none_of_a_hundred_thousand_requests_gets_an_answer_of_class_5xx(
    running: Running, body: bytes, path: str
) -> None:
    assert_answered(running, body, path)


def assert_answered(running: Running, body: bytes, path: str) -> None:
    reply = running.ask(path, body)
    assert reply.status < 500
    form = {"message", "code", "type"} if path.startswith("/v1/") else {"error", "error_type"}
    assert reply.status == 200 or set(reply.json) == form


# Queue


class SlowPool:
    """Answers when it may, and fails where a text says so."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.batches: list[int] = []
        self.seen: set[str] = set()

    def answer(self, requests: list[Query]) -> list[dict[str, Any]]:
        self.may.wait(5)
        self.batches.append(len(requests))
        self.seen |= {each.example.text for each in requests}
        if any(each.example.text == "bad" for each in requests):
            raise ValueError("bad")
        return [{"text": each.example.text} for each in requests]


def texts(*some: str) -> list[Query]:
    return [Query("a", Example(text)) for text in some]


def test_overload_is_refused_and_what_was_accepted_is_answered() -> None:
    pool = SlowPool()
    batcher = Batcher(pool, 10)  # type: ignore[arg-type]
    accepted = [batcher.submit(texts(str(i), "x")) for i in range(5)]
    with pytest.raises(Overloaded):
        batcher.submit(texts("y"))
    pool.may.set()
    assert [future.result(5)[0]["text"] for future in accepted] == [str(i) for i in range(5)]
    assert max(pool.batches) > 2  # what waited was answered together
    batcher.submit(texts("y")).result(5)
    last = batcher.submit(texts("z"))
    batcher.close()
    assert last.result(0) == [{"text": "z"}]
    assert batcher.waiting == 0
    with pytest.raises(Closed):
        batcher.submit(texts("y"))


def test_requests_inside_that_are_not_queued_yet_have_places(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[Future[Any]] = []

    def submit(*args: Any, **options: Any) -> Future[Any]:
        inside.append(Future())
        return inside[-1]

    monkeypatch.setattr(running.service.batcher, "submit", submit)
    monkeypatch.setattr(running.service.batcher, "_most_waiting", 2)
    body = json.dumps({"inputs": "a"}).encode()
    start = head(f"Content-Length: {len(body)}")
    with ThreadPoolExecutor(2) as clients, socket.create_connection(("127.0.0.1", running.port)) as slow:
        slow.sendall(start + body[:3])  # who has not said everything has no place yet
        answered = clients.submit(running.predict, "b")
        until(lambda: len(inside) == 1, "a request inside")
        with socket.create_connection(("127.0.0.1", running.port)) as leaving:
            leaving.sendall(start + body)
            until(lambda: len(inside) == 2, "a request inside")
            assert running.predict("c").status == 429
        until(inside[1].cancelled, "the client's leaving")  # who has left leaves a place
        last = clients.submit(running.predict, "d")
        until(lambda: len(inside) == 3, "a request inside")
        assert running.predict("e").status == 429
        for future in (inside[0], inside[2]):
            future.set_result([{"label": "good", "score": 1.0}])
        assert (answered.result(5).status, last.result(5).status) == (200, 200)
        assert running.service.batcher.waiting == 0  # none of it was in the queue


def test_connection_that_was_refused_goes_on_with_its_next_request(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"inputs": "a fine film"}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("POST", "/predict", body, JSON)
    assert connection.getresponse().read()
    for full in (True, True, False):
        monkeypatch.setattr(running.service.batcher, "_waiting", LIMITS.waiting if full else 0)
        connection.putrequest("POST", "/predict")
        for name, value in {**JSON, "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(body[:3])  # what comes of the body after the answer is dropped
        time.sleep(0.1)
        connection.send(body[3:])
        answer = connection.getresponse()
        content = json.loads(answer.read())
        assert (answer.status, "error" in content) == ((429, True) if full else (200, False))
    connection.close()


@pytest.mark.parametrize("line", ["Connection: close", "Expect: 100-continue"])
def test_full_queue_refuses_before_a_body_is_read_and_closes_what_cannot_go_on(
    running: Running, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    refused = running.service.metrics.requests.labels("none", "429")._value
    before = refused.get()
    monkeypatch.setattr(running.service.batcher, "_waiting", LIMITS.waiting)
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as connection:
        connection.sendall(head("Content-Length: 9", line))
        content = b"".join(iter(lambda: connection.recv(65536), b"")).lower()
    assert content.startswith(b"http/1.1 429")
    assert all(part in content for part in (b"connection: close", b"retry-after: 1", b"nosniff"))
    assert running.ask("/health").status == 200
    assert refused.get() == before + 1


def test_failure_is_of_the_request_that_causes_it_and_who_left_costs_nothing() -> None:
    pool = SlowPool()
    batcher = Batcher(pool, 100)  # type: ignore[arg-type]
    first = batcher.submit(texts("first"))
    left, bad, good = (batcher.submit(texts(text)) for text in ("left", "bad", "good"))
    left.cancel()
    pool.may.set()
    assert good.result(5) == [{"text": "good"}]
    assert first.result(5) == [{"text": "first"}]
    with pytest.raises(ValueError, match="bad"):
        bad.result(5)
    batcher.close()
    assert "left" not in pool.seen


# Life


def test_stop_answers_every_accepted_request(root: Path) -> None:
    with serve(root) as stopping, ThreadPoolExecutor(16) as clients:
        answers = [clients.submit(stopping.predict, text) for text in TEXTS[:16]]
        state = stopping.server.server_state
        until(lambda: state.total_requests + len(state.tasks) >= len(answers), "all requests inside")
        stopping.server.should_exit = True
        assert [future.result(10).status for future in answers] == [200] * 16


def test_new_adapters_are_served_without_a_restart_and_those_gone_are_not(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "mood", tmp_path / "mood")
    with serve(tmp_path) as fresh:
        shutil.copytree(root / "topic", fresh.root / "topic")
        for status in (200, 404):
            asyncio.run(fresh.service.reload())
            assert fresh.predict("a film", adapter="topic").status == status
            shutil.rmtree(fresh.root / "topic", ignore_errors=True)


def side(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "lorakit.json").read_text())
    (folder / "lorakit.json").write_text(json.dumps({**raw, **changes}))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WEIGHTS = "adapter_model.safetensors"
SPOILT: dict[str, Callable[[Path], object]] = {
    "no-object": lambda folder: (folder / "lorakit.json").write_text("[]"),
    "types": lambda folder: side(folder, labels=3, columns=[], task=None),
    "pipe": lambda folder: pipe(folder / WEIGHTS),
    "no-sums": lambda folder: (side(folder, files={}), pipe(folder / "adapter_config.json")),
    "device": lambda folder: ((folder / "zero").symlink_to("/dev/zero"), side(folder, files={"zero": "00"})),
    "size": lambda folder: os.truncate(folder / WEIGHTS, 30 * 2**30),
    "cut-off": lambda folder: (folder / WEIGHTS).write_bytes(b"{}"),
}


def test_bad_versions_of_adapters_keep_no_other_from_its_new_one(root: Path, bert: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "mood", tmp_path / "served" / "mood")
    for kind in SPOILT:
        shutil.copytree(root / "topic", tmp_path / "served" / kind)
    ship(tmp_path / "next", bert, "sequence_classification", ("bad", "good"), seed=9)
    with serve(tmp_path / "served") as fresh:
        before = {name: fresh.predict("a film", adapter=name).json for name in ("mood", *SPOILT)}
        for kind, spoil in SPOILT.items():
            spoil(fresh.root / kind)
            spoil(shutil.copytree(fresh.root / "mood", fresh.root / f"new-{kind}"))
        (fresh.root / "mood").rename(tmp_path / "gone")
        (tmp_path / "next").rename(fresh.root / "mood")
        begun = time.monotonic()
        asyncio.run(fresh.service.reload())
        assert time.monotonic() - begun < 5
        after = fresh.predict("a film", adapter="mood").json
        assert after != before["mood"]
        assert scores(after) == pytest.approx(alone(fresh.root / "mood", "a film"), abs=1e-5)
        for kind in SPOILT:
            assert fresh.predict("a film", adapter=kind).json == before[kind]
            assert fresh.predict("a film", adapter=f"new-{kind}").status == 424
        metrics = fresh.ask("/metrics").body.decode()
        assert f'lorakit_reloads_total{{outcome="refused"}} {2 * len(SPOILT)}.0' in metrics
        assert 'lorakit_reloads_total{outcome="served"} 1.0' in metrics


def test_nothing_ends_the_looking_for_new_versions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def fail(path: Path) -> Any:
        looks.append(1)
        raise ZeroDivisionError

    with serve(root, limits=replace(LIMITS, reload_s=0.01)) as fresh:
        monkeypatch.setattr(routes, "find_adapters", fail)
        until(lambda: len(looks) > 2, "another look")
        assert fresh.predict("a film").status == 200
        monkeypatch.undo()


def test_roots_that_cannot_be_read_or_share_a_name_keep_what_they_served(root: Path, tmp_path: Path) -> None:
    for place, name in (("a", "mood"), ("b", "topic")):
        shutil.copytree(root / name, tmp_path / place / name)
    roots = [tmp_path / "a", tmp_path / "b"]
    with AdapterPool(find_all(roots)) as pool:
        service = Service(pool, roots)
        asyncio.run(service.reload())
        shutil.copytree(root / "tags", tmp_path / "b" / "tags")
        shutil.copytree(root / "topic", tmp_path / "a" / "topic")
        asyncio.run(service.reload())
        served = {"mood": tmp_path / "a" / "mood", "topic": tmp_path / "b" / "topic", "tags": tmp_path / "b" / "tags"}
        assert pool.folders == served
        shutil.rmtree(tmp_path / "b")
        asyncio.run(service.reload())
        assert pool.folders == served
        service.batcher.close()


def test_load_takes_no_longer_than_an_answer_may(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, may = SharedModel.build, threading.Event()
    monkeypatch.setattr(SharedModel, "build", lambda model, folder: may.wait(20) and build(model, folder))
    with serve(root, limits=replace(LIMITS, answer_s=0.3)) as slow:
        begun = time.monotonic()
        assert slow.predict("a film").status == 503
        assert slow.ask("/health").status == 200
        may.set()
        until(lambda: slow.predict("a film").status == 200, "an answer")
    assert time.monotonic() - begun < 5


STUCK = """
import time
from lorakit.app.cli import main
from lorakit.app.server import process
from lorakit.inference.shared_base import SharedModel

def hang(*words):
    print("hanging", flush=True)
    time.sleep(600)

{patch}
process.END_S = 1
main(["serve", {folder!r}, "--port", "0", "--timeout", "1", "--json"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "sent", "codes"),
    [
        ("", b"", {0}),
        ("", b"{", {0}),
        ("SharedModel.build = hang", None, {2, 143, -15}),
        ("SharedModel.answer = hang", b'{"inputs":"a"}', {0, 1}),
    ],
    ids=["idle", "half a request", "a load that hangs", "a model that hangs"],
)
def test_signal_ends_the_server_in_any_state(root: Path, patch: str, sent: bytes | None, codes: set[int]) -> None:
    program = STUCK.format(patch=patch, folder=str(root / "mood"))
    with (
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as server,
        socket.socket() as asking,
    ):
        assert server.stdout is not None
        first = server.stdout.readline()
        if sent is not None:
            asking.connect(("127.0.0.1", int(json.loads(first)["url"].rstrip("/").rpartition(":")[2])))
            asking.sendall(head("Content-Length: 14") + sent if sent else b"")
            time.sleep(0.2)
            if "answer" in patch:
                assert server.stdout.readline() == "hanging\n"
        server.terminate()
        begun = time.monotonic()
        assert server.wait(20) in codes
        assert time.monotonic() - begun < 12


# The page and the command


@pytest.mark.parametrize("host", ["localhost", "0:0:0:0:0:0:0:1", "::"])
def test_served_address_is_one_that_answers(root: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lorakit serve --host HOST` up to its first answer, by the URL that it prints."""
    answers: list[int] = []
    servers: list[Server] = []
    monkeypatch.setattr(process, "make_server", lambda *words: servers.append(make_server(*words)) or servers[0])

    def ask(facts: dict[str, Any]) -> None:
        def get() -> None:
            until(lambda: servers and servers[0].started, "a server")
            with urlopen(facts["url"].replace("[::]", "[::1]") + "health", timeout=20) as answer:
                answers.append(answer.status)
            servers[0].should_exit = True

        threading.Thread(target=get).start()

    limits = {"memory": 2**30, "waiting": 8, "inputs": 4, "timeout": 5.0}
    process.run([root / "mood"], (host, 0), None, limits=limits, say=ask)
    assert answers == [200]


def test_page_runs_its_own_script_and_loads_nothing(running: Running) -> None:
    page = running.ask("/")
    html = page.body.decode()
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.headers["content-security-policy"].count("sha256-") == 2
    assert "//" not in html.replace("// ", "")
    assert "innerHTML" not in html
    assert " style=" not in html


def test_serve_says_what_it_would_serve(cli: Cli, root: Path, tagger_run: Path) -> None:
    shown = cli("serve", root, "--dry-run", "--json")
    assert (shown.code, json.loads(shown.out)["adapters"]) == (0, ["mood", "tags", "topic"])
    twice = cli("serve", root, root / "mood", "--dry-run")
    assert (twice.code, "two adapters are called 'mood'" in twice.err) == (3, True)
    other = cli("serve", root, tagger_run, "--dry-run")
    assert (other.code, "trained on another base model" in other.err) == (2, True)
