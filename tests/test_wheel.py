"""The wheel: it has everything that a command reads, and the commands of README and of every page run in order with it alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest

import lorakit
from tests.test_documents import PAGES, ROOT, blocks

PACKAGE = Path(lorakit.__file__).parent
RECORDS = 24  # of each file that the commands train on
NO_WHEEL = {"README", "index", "hub", "texts-t5", "labels-t5"}  # has a test of its own; no commands; need a hub


def test_data_of_the_package_are_below_what_the_wheel_packs() -> None:
    """A file elsewhere, or a link to one, would be there in a clone alone."""
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert packed == {"packages": ["src/lorakit"]}
    for name in ("recipes/sst2-bert.toml", "demo/t5-demo/config.json", "app/report/run.html.jinja", "py.typed"):
        assert (PACKAGE / name).is_file()
    assert [path for path in PACKAGE.rglob("*") if path.is_symlink()] == []


def commands() -> list[str]:
    """README's lines that begin with `lorakit`, but those whose remark says that they need the hub."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("lorakit ") and "from the hub" not in line]


class Shell(NamedTuple):
    """A terminal in a folder, with nothing of lorakit but the wheel."""

    folder: Path
    environment: dict[str, str]

    def run(self, line: str) -> str:
        """Run one line; it has to succeed. Copied data are shortened, for time."""
        words = f"{line.partition(' #')[0]} --dry-run" if line.startswith("lorakit serve") else line
        done = subprocess.run(words, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        if "--copy-data" in line:
            for path in (*self.folder.glob("*.csv"), *self.folder.glob("*.conll")):
                separator = "\n" if path.suffix == ".csv" else "\n\n"
                path.write_text(separator.join(path.read_text().split(separator)[: RECORDS + 1]) + "\n")
        return done.stdout

    def python(self, code: str) -> str:
        (self.folder / "run.py").write_text(code)
        return self.run("python run.py")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a terminal after the wheel was built and installed."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    wheels, venv = tmp_path / "dist", tmp_path / "venv"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    missing = {name for name in files if "__pycache__" not in name} - set(ZipFile(wheel).namelist())
    assert missing == set()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    subprocess.run([*pip, "--python", venv / "bin" / "python", "install", "--no-deps", wheel], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]  # what lorakit needs is installed here
    (site / "libraries.pth").write_text("\n".join(libraries))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    assert str(site) in Shell(tmp_path, environment).run("lorakit doctor")
    return environment


@pytest.mark.slow
def test_commands_of_readme_run_from_the_wheel_in_an_empty_folder(tmp_path: Path, installed: dict[str, str]) -> None:
    shell = Shell(tmp_path, installed)
    for line in commands():
        shell.run(line)
    train, estimator, *_ = [block.body for block in blocks(ROOT / "README.md") if block.kind == "python"]
    assert re.search(r"^Result\('runs/python', accuracy [01]\.\d+ \[", shell.python(train))
    assert re.search(r"^\['(good|bad)'\]", shell.python(estimator))


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES if page.stem not in NO_WHEEL])
def test_commands_of_a_page_run_from_the_wheel_over_the_real_base(
    page: Path, tmp_path: Path, installed: dict[str, str]
) -> None:
    """As people type them: minilm and t5-demo themselves, a process for each command."""
    shell, code, ran = Shell(tmp_path, installed), "", ""
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(block.body, encoding="utf-8")
        elif block.reason is None and block.kind == "console":
            if code != ran:  # what a page defines before a command stays defined after it
                shell.python(code)
                ran = code
            for line in block.commands:
                shell.run(line)
        elif block.reason is None and block.kind == "python":
            code += block.body
    if code != ran:
        shell.python(code)
