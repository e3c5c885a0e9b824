"""The command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from lorakit.app.cli import main


class Outcome(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


class NoRoute(Exception):
    """Stands for the HTTP client's error, whose class depends on the hub library's version."""


Cli = Callable[..., Outcome]


def every_command_reads(cli: Cli, run: Path, data: Path) -> None:
    """The commands that read a run of any task end well."""
    commands = (("report", run), ("card", run), ("inspect", run), ("check", data, "--run", run), ("compare", run, run))
    for command in commands:
        done = cli(*command)
        assert done.code == 0, done.err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> Cli:
    """Run `lorakit` with these words in an empty folder; runs get no pictures, which take longer than their training."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Outcome:
        code = 0
        capsys.readouterr()
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub with an empty cache; `offline/...` cannot be reached, anything else does not exist there."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    def not_cached(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError(name)

    def ask(self: object, name: str, **options: object) -> None:
        if name.startswith("offline/"):
            raise NoRoute(name)
        raise RepositoryNotFoundError(name, response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave no pictures and no report, which take longer than training a tiny model."""
    monkeypatch.setattr("lorakit.app.api.write_figures", lambda *arguments: None)
    monkeypatch.setattr("lorakit.app.api.write_report", lambda folder: None)
