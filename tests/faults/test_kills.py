"""The program that kills runs and commands, as tests of `make faults`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.faults
@pytest.mark.parametrize(("what", "kills"), [("runs", 200), ("commands", 60)])
def test_what_is_killed_ends_as_what_never_was(what: str, kills: int) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.faults.kills", what, "--kills", str(kills)]
    assert subprocess.run(command, cwd=root, env=environment, check=False).returncode == 0
