"""How all commands print: control characters in files, labels and texts are escaped, so that they cannot affect a terminal."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import click

# All of Unicode's control characters but tab and newline, and halves of surrogate pairs, which no terminal can show
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters escaped as in Python and JSON; valid JSON keeps its meaning."""
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def echo(text: str, *, err: bool = False) -> None:
    """Print one or more lines on stdout, or on stderr."""
    click.echo(visible(text), err=err)


class Output(NamedTuple):
    """The result of a command: lines for people, and the same as facts for programs (`--json`)."""

    lines: list[str]
    facts: dict[str, Any]

    def plus(self, more: Output) -> Output:
        """This output followed by more."""
        return Output([*self.lines, *more.lines], {**self.facts, **more.facts})

    def show(self, as_json: bool) -> None:
        """Print the lines or the facts on stdout."""
        echo(json.dumps(self.facts) if as_json else "\n".join(self.lines))
