"""`lorakit push`: the adapter's files and nothing else, over HTTP to a hub of this machine; what it refuses is one line."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tests.app.conftest import Cli

TOKEN = "hf_a_token_that_nobody_may_see"


@dataclass
class Hub:
    """A hub that takes small files as they are, and knows one token."""

    url: str = ""
    private: bool = True
    status: int = 200  # of everything
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, {"error": "no"}
        if path == "/api/repos/create":
            new = json.loads(body)
            self.repositories[new["name"]] = new
            return 200, {"url": f"{self.url}/you/{new['name']}"}
        if "/branch/" in path:
            self.branches.append(path.rpartition("/")[2])
            return 200, {}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            return 200, {"commitUrl": f"{self.url}/you/reviews/commit/1", "commitOid": "1" * 40, "success": True}
        return 200, {"id": "you/reviews", "private": self.private, "siblings": [], "sha": "1" * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, answer = found.answer(self.command, self.path, body) if known else (401, {"error": "who?"})
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=found.url, token=TOKEN))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(bert_run: Path, tmp_path: Path) -> Path:
    """A run into whose adapter somebody has put what must stay here."""
    shutil.copytree(bert_run, tmp_path / "run")
    for name in ("train.csv", "predictions.jsonl", ".netrc", "notes.md", "optimizer.pt"):
        (tmp_path / "run" / "adapter" / name).write_text("a secret text")
    (tmp_path / "run" / "adapter" / "checkpoints").mkdir()
    (tmp_path / "run" / "adapter" / "checkpoints" / "state.json").write_text("{}")
    return tmp_path / "run"


def shipped(bert_run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (bert_run / "adapter").iterdir()}


def test_hub_has_what_ships_and_nothing_else(cli: Cli, hub: Hub, run: Path, bert_run: Path) -> None:
    code, out, err = cli("push", run, "you/reviews", "--private", "--revision", "v1")
    assert (code, out.splitlines()[-1]) == (0, f"pushed: {hub.url}/you/reviews/commit/1"), err
    assert hub.files == shipped(bert_run)
    assert "README.md" in hub.files
    assert hub.repositories["reviews"]["visibility" if "visibility" in hub.repositories["reviews"] else "private"] in (
        True,
        "private",
    )
    assert hub.branches == ["v1"]
    assert TOKEN not in out + err


def test_dry_run_lists_the_same_and_asks_nobody(
    cli: Cli, run: Path, bert_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    found = json.loads(cli("push", run, "you/reviews", "--dry-run", "--json").out)
    assert found["files"] == {name: len(content) for name, content in sorted(shipped(bert_run).items())}
    lines = cli("push", run, "you/reviews", "--dry-run").out.splitlines()
    assert [line.split()[-1] for line in lines[: len(found["files"])]] == list(found["files"])


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


def no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub, "HfApi", partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token=TOKEN)
    )


def refused(status: int) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    return lambda hub, monkeypatch: setattr(hub, "status", status)


def public(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private = False


@pytest.mark.parametrize(
    ("arrange", "says"),
    [
        (offline, ("HF_HUB_OFFLINE", "unset")),
        (no_token, ("no hub token", "hf auth login")),
        (no_network, ("cannot be reached",)),
        (refused(401), ("you/reviews", "not valid", "hf auth login")),
        (refused(403), ("you/reviews", "may not write", "settings/tokens")),
        (refused(404), ("you/reviews", "no such repository")),
        (refused(422), ("you/reviews", "the hub answered 422")),
        (public, ("you/reviews", "is public", "another name")),
    ],
)
def test_refusal_is_one_line(
    cli: Cli,
    hub: Hub,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrange: Callable[[Hub, pytest.MonkeyPatch], None],
    says: tuple[str, ...],
) -> None:
    arrange(hub, monkeypatch)
    code, out, err = cli("push", run, "you/reviews", "--private")
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert all(part in err for part in says), err
    assert TOKEN not in err
    assert hub.files == {}
