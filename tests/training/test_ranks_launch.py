"""lorakit train --nproc and torchrun as a user starts them: equal runs, signals, deaths, two nodes. Prints its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import save_bert, until, weights, write_reviews
from tests.training.test_ranks_processes import COUNTED, free_ports

pytestmark = pytest.mark.faults
N = 101  # divisible by neither 2 nor 3, nor by the batch
LONG = ("train.epochs=1000", "train.checkpoint_every=20")  # a run that is ended before its end
WAIT_S = 600  # for what takes seconds on an idle machine
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

RECIPE = """
model = {{ base = "{base}", dtype = "fp32" }}
data = {{ train = "{data}/train.csv", validation = "{data}/validation.csv" }}
lora = {{ r = 4, dropout = 0.1 }}
train = {{ epochs = 3, batch_size = 8, lr = 2e-3 }}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    for name, seed in (("train", 1), ("validation", 2)):
        write_reviews(folder / f"{name}.csv", N, seed)
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(base=save_bert(folder / "bert"), data=folder))
    return path


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, **pipes)


def lorakit(*words: object) -> subprocess.Popen[str]:
    return start(sys.executable, "-m", "lorakit", "train", *map(str, words))


def finished(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What a process that ends with this code has written."""
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == code, err
    return out, err


def processes(folder: Path) -> list[int]:
    """Those of this machine that train into a folder, whoever started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if f"output.dir={folder}".encode() in words.split(b"\0"):
            found.append(int(path.parent.name))
    return found


def began(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


def long_run(recipe: Path, folder: Path, *words: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A run of two processes that has written a checkpoint, and the processes that train."""
    process = lorakit(recipe, f"output.dir={folder}", *(words or LONG), "--nproc", 2)
    until(lambda: began(folder) or process.poll() is not None, "a first checkpoint", WAIT_S)
    assert process.poll() is None, process.communicate()
    ranks = [pid for pid in processes(folder) if pid != process.pid]
    assert len(ranks) == 2
    return process, ranks


def test_number_of_processes_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    scores, adapters = {}, {}
    for n in (1, 2, 3):
        still = ("model.dropout=0", "lora.dropout=0")
        out, _ = finished(lorakit(recipe, f"output.dir={tmp_path / str(n)}", *still, "--nproc", n, "--json"))
        (line,) = out.splitlines()
        scores[n], adapters[n] = (
            json.loads(line),
            load_file(tmp_path / str(n) / "adapter" / "adapter_model.safetensors"),
        )
    for n in (2, 3):
        apart = max(float((adapters[n][key] - value).abs().max()) for key, value in adapters[1].items())
        rates = [scores[k]["examples_per_s"] for k in (1, n)]
        print(
            f"\n{n} processes on {N} examples: largest difference {apart:.1e}; examples/s {rates[0]} alone, {rates[1]}"
        )
        assert {key: scores[n][key] for key in COUNTED} == {key: scores[1][key] for key in COUNTED}
        torch.testing.assert_close(adapters[n], adapters[1], atol=1e-6, rtol=0)


def test_sigterm_saves_once_and_leaves_no_process(recipe: Path, tmp_path: Path) -> None:
    """And the run goes on bit for bit: dropout is on."""
    folder, whole, words = tmp_path / "run", tmp_path / "whole", ("train.checkpoint_every=5", "train.epochs=10")
    process, _ = long_run(recipe, folder, *words)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, err = finished(process, 75)
    print(f"\nfrom SIGTERM to the end of 2 processes and their launcher: {time.monotonic() - sent:.1f} s")
    assert err.count("; to continue: lorakit train") == 1
    assert processes(folder) == []
    finished(lorakit(recipe, f"output.dir={folder}", *words, "--nproc", 2, "--resume", "auto"))
    finished(lorakit(recipe, f"output.dir={whole}", *words, "--nproc", 2))
    assert weights(folder) == weights(whole)


def test_death_of_one_process_ends_the_other(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, ranks = long_run(recipe, folder)
    os.kill(ranks[-1], signal.SIGKILL)
    sent = time.monotonic()
    finished(process, 128 + signal.SIGKILL)
    print(f"\nfrom SIGKILL of one of 2 processes to the end of the run: {time.monotonic() - sent:.1f} s")
    assert processes(folder) == []


def test_death_of_the_launcher_ends_the_processes(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, ranks = long_run(recipe, folder)
    process.kill()
    took = until(lambda: processes(folder) == [], f"the end of {ranks}", WAIT_S)
    process.communicate(timeout=WAIT_S)
    print(f"\nfrom SIGKILL of the launcher to the end of its 2 processes: {took:.1f} s")


def test_mistake_is_printed_once_with_its_code(recipe: Path, tmp_path: Path) -> None:
    words = (f"output.dir={tmp_path / 'run'}", f"data.train={tmp_path / 'missing.csv'}")
    _, err = finished(lorakit(recipe, *words, "--nproc", 2), 3)
    assert err.splitlines() == [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.count("missing.csv: no such file") == 1


def test_two_nodes_train_what_one_process_does(recipe: Path, tmp_path: Path) -> None:
    """Two torchrun on loopback that find each other by the rendezvous, each with its own process."""
    still = ("model.dropout=0", "lora.dropout=0")
    (port,) = free_ports(1)
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two")
    nodes = [
        start(
            *TORCHRUN,
            *("--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *rendezvous, "-m", "lorakit", "train"),
            *(str(recipe), f"output.dir={tmp_path / 'nodes'}", *still, "--json"),
        )
        for _ in range(2)
    ]
    printed = sorted(finished(node)[0] for node in nodes)
    finished(lorakit(recipe, f"output.dir={tmp_path / 'alone'}", *still))
    assert printed[0] == ""
    assert json.loads(printed[1])["metric"] == "accuracy"
    found, alone = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("nodes", "alone"))
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
