"""A headless Chromium that tests drive through its debugging pipe, without a driver of its own or a library."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
READS, WRITES = 3, 4  # the descriptors at which Chromium takes commands and tells answers


class Tab:
    """One page at a time."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest = commands, answers, b""
        self._number, self._session = 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        command = json.dumps({"id": self._number, "method": method, "params": params, **session})
        os.write(self._commands, command.encode() + b"\0")
        while True:
            answer = json.loads(self._line())
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _line(self) -> bytes:
        while b"\0" not in self._rest:
            more = os.read(self._answers, 65536)
            assert more, "Chromium has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return line

    def open(self, url: str) -> None:
        """Go there and wait for the page."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """What an expression gives, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def resize(self, width: int, height: int = 800) -> None:
        """As wide as a phone or a desk."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A page of a browser whose profile is in a folder."""
    assert PATH is not None
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_commands, write_answers)]

    def place() -> None:
        os.dup2(theirs[0], READS)
        os.dup2(theirs[1], WRITES)

    words = [PATH, *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    process = subprocess.Popen(words, preexec_fn=place, pass_fds=(READS, WRITES), stderr=subprocess.DEVNULL)
    for end in (read_commands, write_answers, *theirs):
        os.close(end)
    try:
        yield Tab(commands, answers)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(answers)
