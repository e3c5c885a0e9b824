"""The program that kills runs, as a test of `make faults`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.faults
def test_killed_runs_end_as_those_never_killed() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.faults.kills", "--kills", "200"]
    assert subprocess.run(command, cwd=root, env=environment, check=False).returncode == 0
