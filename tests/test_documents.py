"""The documents: every example in them runs, what is generated is up to date, the site builds without a broken link.

Run in each page's order, in a folder of its own: blocks marked `console` (lines that begin with $) and `python`; a block with a
title is the file of that name. A block below a comment `<!-- not run: reason -->` is left out, and listed by
`test_what_is_not_run_says_why`. Replaced, for time, are base models by tiny ones of their family, files by their first records
(a short file's are repeated, so that some can be held out), and what is chosen for few examples by less (`short_runs`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import pytest

from lorakit.app.cli import COMMANDS, commands, main
from tests.runs import reviews, write_reviews
from tests.tiny import tiny_bert

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    DOCS / "index.md",
    DOCS / "tutorial.md",
    DOCS / "from-scratch.md",
    *(DOCS / f"{name}.md" for name in ("clusters", "data", "exports", "report", "scale", "serving")),
    *sorted(DOCS.glob("how-to/*.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(
    r'(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<body>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
RECORDS = 16  # of a file
SLOW = {
    "compare",
    "deploy",
    "entities-t5",
    "exports",
    "labels-t5",
    "reports",
    "scikit-learn",
    "sweep",
}  # commands with tests of their own


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str
    body: str
    title: str | None = None
    reason: str | None = None  # why it is not run

    @property
    def commands(self) -> list[str]:
        """The lines of a terminal that are typed, those that end with a backslash joined."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    return [
        Block(m["kind"], m["body"], m["title"], m["reason"]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


# Running


@pytest.fixture
def desk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert: Path, sentence_bert: Path, t5: Path, short_runs: None
) -> Callable[..., None]:
    """Run blocks one after the other in an empty folder, with tiny base models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorakit.model_files._minilm", lambda: sentence_bert)
    monkeypatch.setattr("lorakit.model_files.T5_DEMO", t5)
    monkeypatch.setattr("lorakit.model_files._from_hub", lambda name, revision: t5 if "t5" in name else bert)
    screen = ModuleType("IPython.display")
    screen.IFrame = lambda source, width, height: source  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", screen)

    def run(given: list[Block], **names: Any) -> None:
        names["__name__"] = "__main__"
        for block in given:
            if block.title:
                Path(block.title).write_text(block.body, encoding="utf-8")
            elif block.reason is None and block.kind == "python":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(block.body, "example", "exec"), names)
            elif block.reason is None and block.kind == "console":
                for line in block.commands:
                    obey(line)
                    shorten()
            shorten()

    return run


def obey(line: str) -> None:
    """Run a line of a terminal; it has to be one of ours, and to end with 0."""
    program, *words = shlex.split(line, comments=True)
    assert program == "lorakit", f"{line!r}: only lorakit is run; another program needs a reason not to be"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            assert not end.code, f"{line!r} ended with {end.code}: {err.getvalue()[-600:]}"


def shorten() -> None:
    """Give each file of data here RECORDS records: after every command, since the next one may train on it."""
    for path in Path().glob("*.c*"):
        resized(path)


def resized(path: Path) -> None:
    """Make a file of data have RECORDS records, its first ones or all of them again and again."""
    text = path.read_text(encoding="utf-8")
    is_table = path.suffix == ".csv"
    head, *rest = text.splitlines(keepends=True) if is_table else ("", *re.split(r"(?<=\n)\n+", text.strip() + "\n"))
    if is_table and len(rest) != RECORDS:
        path.write_text("".join([head, *(rest * RECORDS)[:RECORDS]]), encoding="utf-8")
    elif not is_table and len(rest) != RECORDS:
        path.write_text("\n".join((rest * RECORDS)[:RECORDS]), encoding="utf-8")


def readme_names() -> dict[str, Any]:
    """What the README's lines of Python take for given."""
    write_reviews(Path("reviews.csv"), RECORDS)
    texts, labels = zip(*reviews(24), strict=True)
    return {"texts": texts, "labels": labels, "model": tiny_bert(), "folder": Path("saved")}


each_page_dtype = pytest.mark.parametrize(
    "each_auto_dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)], indirect=True
)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            p, id=p.stem if p.parent == DOCS else f"how-to-{p.stem}", marks=[pytest.mark.slow] if p.stem in SLOW else []
        )
        for p in PAGES
    ],
)
@each_page_dtype
def test_examples_run(page: Path, desk: Callable[..., None], each_auto_dtype: str) -> None:
    if page.stem == "README":  # each of its blocks stands alone
        for block in blocks(page):
            desk([block], **readme_names())
    else:
        desk(blocks(page))


def test_what_is_not_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = [(page.stem, block) for page in PAGES for block in blocks(page) if block.reason is not None]
    with capsys.disabled():
        for name, block in left_out:
            print(f"\nnot run: {name}: {block.reason}", end="")
    assert all(len(block.reason or "") > 10 for _, block in left_out)
    run = [
        block for page in PAGES for block in blocks(page) if block.kind in ("python", "console") and not block.reason
    ]
    assert len(left_out) * 3 <= len(run)


# What is typed somewhere, but not run: its options and keys exist


def typed() -> Iterator[tuple[str, list[str]]]:
    """Each line of the documents that begins with `lorakit`, in any block that is not run."""
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        if page.parent.name == "reference":
            continue
        for fence in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in fence[2].replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if line.startswith("lorakit ") and "COMMAND" not in line:
                    words = shlex.split(re.split(r"\s{3,}", line)[0], comments=True)
                    yield f"{page.stem}: {line}", words[1:]


def test_every_line_that_is_shown_has_options_that_exist() -> None:
    seen, program = 0, click.Context(commands, **commands.context_settings)
    for place, words in typed():
        assert words[0] in COMMANDS, place
        command = commands.load(words[0])
        plain = [word for word in words[1:] if not re.fullmatch(r"\[.*|.*\]|RUN|\||head|jq", word)] or words[1:]
        try:
            command.make_context(words[0], plain, program, resilient_parsing=True)
        except click.UsageError as err:
            pytest.fail(f"{place}: {err.format_message()}")
        seen += 1
    assert seen > 30


# What is generated


def test_reference_is_what_the_program_says_of_itself() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "reference.py"))["pages"]()
    for name, text in made.items():
        found = (ROOT / name).read_text(encoding="utf-8")
        assert found == text, f"{name} is out of date; python scripts/reference.py writes it"


# The site


def test_navigation_has_every_page_once() -> None:
    def pages(entry: Any) -> list[str]:
        inner = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [page for one in inner for page in pages(one)]

    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    assert sorted(pages(nav)) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="needs lorakit[docs]")
@pytest.mark.slow
def test_site_builds_with_no_broken_link_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]*"')
    assert {page.name: found for page in pages if (found := loaded.findall(page.read_text(encoding="utf-8")))} == {}


# The notebooks


def cells(notebook: Path) -> list[Block]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [Block("python", "".join(cell["source"])) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem == "entities" else []) for p in NOTEBOOKS],
)
@each_page_dtype
def test_notebooks_run(notebook: Path, desk: Callable[..., None], each_auto_dtype: str) -> None:
    desk(cells(notebook))


def test_notebooks_are_stored_without_outputs() -> None:
    for notebook in NOTEBOOKS:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            assert cell["cell_type"] != "code" or (cell["outputs"], cell["execution_count"]) == ([], None), notebook
