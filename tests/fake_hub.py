"""A hub on this machine: the routes that huggingface_hub and datasets use, over folders, with the faults that a real one has."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_secret"


@dataclass
class Repo:
    """A repository: a folder of files for each revision; the first one is main."""

    revisions: dict[str, Path]
    gated: bool = False  # answered to those with a token alone

    def find(self, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a branch or a commit."""
        for name, folder in self.revisions.items():
            sha = hashlib.sha1(f"{folder} {name}".encode()).hexdigest()
            if revision in (name, sha):
                return sha, folder
        return None


@dataclass
class Hub:
    """What it serves, what it does wrong, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)  # by id; those of data sets begin with datasets/
    broken: dict[str, list[int]] = field(default_factory=dict)  # file -> after how many bytes each answer breaks off
    down: int = 0  # a status that is all it answers
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    url: str = ""

    def env(self, home: Path) -> dict[str, str]:
        """The environment in which a process uses it and caches below `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"), "0"),
            **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"),
        }

    def use_here(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """Let this process use it for models; `datasets` keeps copies of what it has read of the environment."""
        from huggingface_hub import constants

        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in values.items():
            patch.setattr(constants, name, value)
        patch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        patch.setattr(
            "huggingface_hub.file_download.time.sleep", lambda _: None, raising=False
        )  # before it tries again


@contextmanager
def serving(**repos: Repo) -> Iterator[Hub]:
    """A hub that answers until the block is left."""
    hub = Hub(dict(repos))

    class Handler(_Handler):
        of = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    of: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.of.asked.append((self.command, unquote(path), self.headers.get("Range", "")))
        if self.of.down:
            self.answer(self.of.down, {})
        elif match := re.fullmatch(
            r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        ):
            kind, name, what, revision, below = match.groups()
            self.api(name if kind == "models" else f"datasets/{name}", what, unquote(revision or "main"), below, body)
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self.answer(404 if path != "/" else 200, {})

    def find(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a repository; None where an error was answered."""
        repo = self.of.repos.get(name)
        if repo is None:
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted"})
        elif (found := repo.find(revision)) is None:
            self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"no {revision}"})
        else:
            return found
        return None

    def api(self, name: str, what: str | None, revision: str, below: str | None, body: bytes) -> None:
        if (found := self.find(name, revision)) is None:
            return
        sha, folder = found
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        if what in ("tree", "paths-info"):
            wanted = (
                json.loads(body)["paths"] if what == "paths-info" else [p for p in paths if p.startswith(below or "")]
            )
            if what == "tree" and "recursive=true" not in self.path.lower():
                depth = len(Path(below or "").parts)
                wanted = [p for p in wanted if len(Path(p).parts) == depth + 1]
            entries = [self.entry(p, paths[p]) for p in wanted if p in paths]
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())
            return
        facts = {
            "id": name.removeprefix("datasets/"),
            "sha": sha,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        siblings = [{"rfilename": p} for p, path in paths.items() if path.is_file()]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps({**facts, "siblings": siblings}).encode())

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}

    def file(self, name: str, revision: str, path: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        sha, folder = found
        headers = {"X-Repo-Commit": sha}
        if not (folder / path).is_file():
            self.answer(404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": f"no {path}"})
            return
        content = (folder / path).read_bytes()
        headers |= {"ETag": f'"{etag(folder / path)}"', "Accept-Ranges": "bytes"}
        status, start, whole = 200, 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, start = 206, int(match[1])
            content = content[start : int(match[2]) + 1 if match[2] else None]
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{whole}"
        breaks = self.of.broken.get(Path(path).name, []) if self.command == "GET" else []
        self.answer(status, headers, content, breaks.pop(0) if breaks else None)

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"", most: int | None = None) -> None:
        """Send an answer; of its content `most` bytes before the connection breaks."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:most])
        if most is not None:
            self.close_connection = True


def etag(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
