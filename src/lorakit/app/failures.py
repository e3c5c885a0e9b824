"""What a command that ends early says, and the exit code it leaves."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from lorakit.app.printing import echo
from lorakit.errors import EXIT_CODES

CODES = "Exit codes:\n\n\b\n" + "\n".join(f"{code:>2}  {meaning}" for code, meaning in EXIT_CODES.items())


def fail(message: str, code: int, debug: bool) -> None:
    """End the process with one line on stderr, or with a traceback before it."""
    if debug:
        import traceback

        echo(traceback.format_exc(), err=True)
    one_line = " ".join(line.strip() for line in message.splitlines())  # a library's message may have several
    echo(f"error: {one_line}", err=True)
    sys.exit(code)


def how_to_go_on(words: Sequence[str]) -> str:
    """The command that goes on with a training, a sweep or answers to files, or nothing after another command."""
    if words[0] == "predict":
        return f"; to go on: {shlex.join(['lorakit', *words])}"
    if words[0] == "sweep":
        return f"; to go on: {shlex.join(['lorakit', *(word for word in words if word != '--resume'), '--resume'])}"
    if words[0] != "train":
        return ""
    kept = [word for i, word in enumerate(words) if not word.startswith("--resume") and words[i - 1] != "--resume"]
    return f"; to go on: {shlex.join(['lorakit', *kept, '--resume', 'auto'])}"
