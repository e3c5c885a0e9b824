"""How all commands print: control characters in files, labels and texts are escaped, so that they cannot affect a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Collection
from typing import Any, NamedTuple

import click

# All of Unicode's control characters but tab and newline, and halves of surrogate pairs, which no terminal can show
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters escaped as in Python and JSON; valid JSON keeps its meaning."""
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def echo(text: str, *, err: bool = False, color: str | None = None) -> None:
    """Print one or more lines on stdout, or on stderr, as they are: for programs, or to be copied."""
    is_colored = color is not None and is_terminal(err) and not os.environ.get("NO_COLOR")
    click.echo(click.style(visible(text), fg=color, bold=True) if is_colored else visible(text), err=err)


def tell(text: str, *, err: bool = False, color: str | None = None) -> None:
    """Print lines for people: on a terminal they are broken between words."""
    if is_terminal(err):
        width = shutil.get_terminal_size().columns
        text = "\n".join(part for line in text.split("\n") for part in _broken(line, width))
    echo(text, err=err, color=color)


def begin(text: str) -> None:
    """Say on a terminal what begins, before torch is imported, which takes seconds."""
    if is_terminal(err=True):
        tell(f"{text} ...", err=True)


def is_terminal(err: bool) -> bool:
    """Whether a person reads stdout, or stderr."""
    return (sys.stderr if err else sys.stdout).isatty()


def _broken(line: str, width: int) -> list[str]:
    """A line in parts no wider than the terminal, where its words allow that; the later ones are indented as the first."""
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) <= width:
        return [line]
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return wrapper.wrap(line) or [line]


class Output(NamedTuple):
    """The result of a command: lines for people, and the same as facts for programs (`--json`)."""

    lines: list[str]
    facts: dict[str, Any]

    def plus(self, more: Output) -> Output:
        """This output followed by more."""
        return Output([*self.lines, *more.lines], {**self.facts, **more.facts})

    def show(self, as_json: bool, verdicts: Collection[str] = ()) -> None:
        """Print the lines or the facts on stdout; of the lines the `verdicts` have a colour."""
        if as_json:
            echo(json.dumps(self.facts))
            return
        for line in self.lines:
            tell(line, color="cyan" if line in verdicts else None)
