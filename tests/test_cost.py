"""The model of cost: its bytes are those of a ring that is walked, and it says that more processes never pay more each."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "cost.py"


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["cost"] = importlib.util.module_from_spec(spec)  # which dataclasses look for
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_bytes_are_those_of_a_ring(cost: ModuleType, processes: int) -> None:
    held = [[{rank} for _ in range(processes)] for rank in range(processes)]  # whose gradients each chunk has
    sent = 0
    for turn in range(2 * (processes - 1)):  # first sums travel, then the finished chunks
        before = [[set(chunk) for chunk in row] for row in held]
        for rank in range(processes):
            chunk = (rank - turn) % processes
            held[(rank + 1) % processes][chunk] |= before[rank][chunk]
        sent += 1
    assert all(chunk == set(range(processes)) for row in held for chunk in row)
    chunk_bytes = 4 * 840 / processes
    assert cost.wire_bytes(840, processes) == pytest.approx(sent * chunk_bytes)


def test_efficiency_falls_with_processes_and_larger_batches_take_more_of_them(cost: ModuleType) -> None:
    job, machine = cost.BERT_BASE, cost.A100
    found = [cost.efficiency(job, machine, processes) for processes in (1, 2, 4, 8)]
    assert found[0] == 1 and all(a > b for a, b in pairwise(found))
    most = [cost.most_processes(replace(job, batch_tokens=n * job.batch_tokens), machine) for n in (1, 8, 64)]
    assert most == sorted(set(most))
    alone, packed = (cost.many_adapters_seconds(job, machine, 1000, 8, n) for n in (1, 32))
    assert packed < alone
