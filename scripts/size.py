"""Count what the plainest commands enter, and how large the package is: python scripts/size.py [--list]

`lorakit train reviews.csv --model BASE` and `lorakit predict RUN TEXT` run in a process each, over a tiny random model. Counted
are functions of the package that are called (comprehensions and lambdas belong to the function around them; what a template is
compiled to does not count), their lines, and the files they are in; `--list` names each, with how often it was called. Needs
the test dependencies; no network.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lorakit"
COMMANDS = {
    "train": ["train", "reviews.csv", "--model", "bert", "train.epochs=2", "train.batch_size=8", "output.dir=run"],
    "predict": ["predict", "run", "a superb film"],
}


def enter(command: str, names: bool) -> None:
    """Run a command in the current folder, and print how many functions, lines and files of the package it enters.

    With names, also a line a function: where it stands, how often it was called, how many lines it has.
    """
    from lorakit.app.cli import main

    called: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<"):
            called[code] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(COMMANDS[command])
    sys.setprofile(None)
    of_package = (c for c in called if c.co_filename.startswith(str(PACKAGE)) and c.co_filename.endswith(".py"))
    own = sorted(of_package, key=_place)
    lines = sum(_last_line(code) - code.co_firstlineno + 1 for code in own)
    print(f"{command:<8} {len(own)} functions, {lines:,} lines, {len({code.co_filename for code in own})} files")
    for code in own if names else ():
        path, first = _place(code)
        print(f"  {path}:{first} {code.co_qualname} called {called[code]} x, {_last_line(code) - first + 1} lines")


def _place(code: CodeType) -> tuple[str, int]:
    return str(Path(code.co_filename).relative_to(PACKAGE)), code.co_firstlineno


def _last_line(code: CodeType) -> int:
    inner = [_last_line(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return max([code.co_firstlineno, *inner, *(line for _, _, line in code.co_lines() if line)])


def package() -> str:
    """Files and lines of the package, and which share of its lines of code are imports."""
    files = sorted(PACKAGE.rglob("*.py"))
    lines = code = imports = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines += len(text.splitlines())
        code += len(code_lines(text) - docstring_lines(tree))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports += (node.end_lineno or node.lineno) - node.lineno + 1
    return f"package  {len(files)} files, {lines:,} lines, {code:,} of code, {imports / code:.1%} of them imports"


def code_lines(source: str) -> set[int]:
    """The lines that are not blank and not a comment alone."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {line for t in tokens if t.type not in layout for line in range(t.start[0], t.end[0] + 1)}


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of docstrings."""
    owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    strings = [n.body[0] for n in owners if ast.get_docstring(n) is not None]
    return {line for s in strings for line in range(s.lineno, (s.end_lineno or 0) + 1)}


def main() -> None:
    """Print all of it."""
    sys.path[:0] = [str(ROOT)]
    from tests.runs import save_bert, write_reviews

    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'scripts'}",
    }
    with tempfile.TemporaryDirectory() as folder:
        save_bert(Path(folder) / "bert")
        write_reviews(Path(folder) / "reviews.csv", 40)
        for command in COMMANDS:
            code = f"import size; size.enter({command!r}, {'--list' in sys.argv[1:]})"
            subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, check=True)
    print(package())


if __name__ == "__main__":
    main()
