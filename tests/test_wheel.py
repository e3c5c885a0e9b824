"""The wheel: it has everything that a command reads, and README's commands run in their order with it alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

import lorakit
from tests.test_documents import ROOT, blocks

PACKAGE = Path(lorakit.__file__).parent
RECORDS = 24  # of each file that the commands train on


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


@pytest.mark.slow
def test_commands_of_readme_run_from_the_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    wheels, venv, empty = tmp_path / "dist", tmp_path / "venv", tmp_path / "empty"
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
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

    def run(line: str) -> str:
        words = f"{line.partition(' #')[0]} --dry-run" if line.startswith("lorakit serve") else line
        done = subprocess.run(words, shell=True, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        return done.stdout

    assert str(site) in run("lorakit doctor")
    for line in commands():
        run(line)
        if "--copy-data" in line:
            for path in empty.iterdir():
                separator = "\n" if path.suffix == ".csv" else "\n\n"
                path.write_text(separator.join(path.read_text().split(separator)[: RECORDS + 1]) + "\n")
    (python, *_) = [block.body for block in blocks(ROOT / "README.md") if "lorakit.train(" in block.body]
    (empty / "run.py").write_text(python)
    assert re.search(r"^Result\('runs/python', accuracy [01]\.\d+ \[", run("python run.py"))
