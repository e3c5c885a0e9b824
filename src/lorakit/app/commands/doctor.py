"""`lorakit doctor`: what this machine has, lacks, or has in a bad state, with a remedy for each."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

import lorakit
from lorakit.app.printing import Output, begin
from lorakit.errors import first_line
from lorakit.hashing import file_sha256, proc

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DEMO = Path(lorakit.__file__).parent / "demo"
SUMS = "SHA256SUMS"  # of the bundled data, as sha256sum writes it
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # of the CPU, that speed up matrix products
GB = 1e9
LITTLE = 2.0  # GB of memory, or of disk, below which training on a small base is likely to fail
HUB_TIMEOUT_S = 3.0
STATES = ("ok", "absent", "warning", "failure")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Check that this machine has everything lorakit needs.

    Shows versions, CPU, GPU, memory, disk, hub and bundled data. Exits with 1 if lorakit cannot work here.
    """
    begin("checking this machine")
    findings = examine()
    fit = all(finding.state != "failure" for finding in findings)
    n = sum(finding.state in ("warning", "failure") for finding in findings)
    verdict = f"{'ready' if fit else 'not ready'} to train{f'; {n} to look at' if n else ''}"
    facts = {"fit": fit, "findings": [asdict(finding) for finding in findings]}
    extras = [finding for finding in findings if finding.state == "absent" and finding.name.startswith("extra ")]
    lines = [finding.line for finding in findings if finding not in extras]
    if extras:
        names = ", ".join(finding.name.removeprefix("extra ") for finding in extras)
        lines.append(f"absent   extras {names}; install one with pip install 'lorakit[NAME]'")
    Output([*sorted(lines, key=lambda line: STATES.index(line.split()[0])), verdict], facts).show(as_json)
    if not fit:
        sys.exit(1)


@dataclass(frozen=True)
class Finding:
    """The result of one check: a failure prevents work, a warning makes some of it worse or impossible."""

    name: str
    text: str
    state: Literal["ok", "absent", "warning", "failure"] = "ok"
    remedy: str = ""

    @property
    def line(self) -> str:
        """The line to print."""
        return f"{self.state:<8} {self.name}: {self.text}{f'; {self.remedy}' if self.remedy else ''}"


def examine() -> list[Finding]:
    """Run all checks; a check that raises counts as a failure."""
    findings: list[Finding] = []
    for check in (packages, cpu, dtype, kernels, gpu, memory, disk, hub, data):
        try:
            findings += check()
        except Exception as err:
            text = f"{type(err).__name__}: {first_line(err, 'no message')}"
            findings.append(Finding(check.__name__, text, "failure"))
    return findings


def packages() -> Iterator[Finding]:
    """The interpreter, required packages, and those of extras."""
    from packaging.requirements import Requirement  # of transformers' own needs

    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    yield Finding("lorakit", f"{lorakit.__version__}, {Path(lorakit.__file__).parent}")
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires("lorakit") or ()]
        extras = importlib.metadata.metadata("lorakit").get_all("Provides-Extra") or ()
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, which is not installed
        return
    always = [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    yield from map(_package, always)
    for extra in (name for name in extras if name != "test"):
        mine = [_package(n) for n in needs if n not in always and n.marker and n.marker.evaluate({"extra": extra})]
        if all(finding.state == "ok" for finding in mine):
            yield Finding(f"extra {extra}", ", ".join(f"{finding.name} {finding.text}" for finding in mine))
        else:
            remedy = f"install it with pip install 'lorakit[{extra}]'"
            yield Finding(f"extra {extra}", "not installed", "absent", remedy)


def _package(need: Requirement) -> Finding:
    command = f"pip install '{need.name}{need.specifier}'"
    try:
        version = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(need.name, "not installed", "failure", command)
    if not need.specifier.contains(version, prereleases=True):
        return Finding(need.name, f"{version} is older than lorakit needs", "failure", command)
    return Finding(need.name, version)


def cpu() -> Iterator[Finding]:
    """Cores, relevant instruction sets, and threads."""
    import torch

    from lorakit.runtime.device import cpu_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = proc("cpuinfo", "flags", "Features").split()
    flags = ", ".join(flag for flag in FLAGS if flag in known) or "vector instructions unknown"
    yield Finding("cpu", f"{cpu_name()}, {cores} cores, {flags}")
    threads = torch.get_num_threads()
    if threads > cores:
        remedy = f"set OMP_NUM_THREADS={cores}; more threads are slower"
        yield Finding("threads", f"torch uses {threads} on {cores} cores", "warning", remedy)
    else:
        yield Finding("threads", f"torch uses {threads}")


def dtype() -> Iterator[Finding]:
    """What models compute in where a recipe does not say, measured in a few milliseconds."""
    from lorakit.runtime.device import bf16_gain, pick_device, pick_dtype

    picked = str(pick_dtype("auto", "lora", pick_device())).removeprefix("torch.")
    yield Finding("dtype", f"model.dtype = 'auto' is {picked} (bf16 products {bf16_gain():.1f}x as fast)")


def kernels() -> Iterator[Finding]:
    """Whether the passes between matrix products can be compiled."""
    import torch

    from lorakit.lora.kernels import library

    if library(torch.float32):
        yield Finding("kernels", "compiled, so BERT's blocks skip padding")
    else:
        yield Finding("kernels", "no C compiler (cc, gcc or clang); results are the same, but BERT is slower", "absent")


def gpu() -> Iterator[Finding]:
    """The GPUs that torch can use."""
    import torch

    from lorakit.runtime.device import gpu_name, pick_dtype

    if (kind := torch.accelerator.current_accelerator(check_available=True)) is None:
        yield Finding("gpu", "torch finds none, so everything runs on the CPU", "absent")
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(kind.type, index)
        dtype = str(pick_dtype("auto", "lora", device)).removeprefix("torch.")
        memory = ""
        if kind.type in ("cuda", "xpu"):
            free, total = torch.accelerator.get_memory_info(device)
            memory = f", {free / GB:.1f} of {total / GB:.1f} GB free"
        yield Finding(
            "gpu", f"{gpu_name(device).removesuffix(', ')} ({kind.type}){memory}; model.dtype = 'auto' is {dtype}"
        )


def memory() -> Iterator[Finding]:
    """Free memory."""
    if available := proc("meminfo", "MemAvailable"):
        remedy = "close other programs, or train with model.quantize=int8 or train.micro_batch_size=8"
        yield _room("memory", float(available.split()[0]) * 1024 / GB, remedy)
    else:
        yield Finding("memory", "unknown on this system", "absent")


def disk() -> Iterator[Finding]:
    """Free space and write permission in the working folder."""
    here = Path.cwd()
    if _can_write(here):
        remedy = f"runs and checkpoints are written to {here}; set output.dir to put them elsewhere"
        yield _room("disk", shutil.disk_usage(here).free / GB, remedy)
    else:
        yield Finding("disk", f"{here} cannot be written to", "failure", "change to another folder, or set output.dir")


def _room(name: str, free: float, remedy: str) -> Finding:
    return Finding(name, f"{free:.1f} GB free", *(("warning", remedy) if free < LITTLE else ()))


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def hub() -> Iterator[Finding]:
    """The hub's cache folder, whether the hub answers (unless offline mode is set), and whether there is a token."""
    from huggingface_hub import constants, get_token

    home = Path(constants.HF_HOME)
    if _can_write(next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())):
        yield Finding("hub cache", str(home))
    else:
        yield Finding("hub cache", f"{home} cannot be written to", "warning", "set HF_HOME to a folder of yours")
    without = "minilm, t5-demo, and models in folders or the cache work without it"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", f"offline mode is set; {without}", "absent", "unset HF_HUB_OFFLINE to download")
    else:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
                yield Finding("hub", f"{constants.ENDPOINT} answers")
        except urllib.error.HTTPError as err:  # any response shows that it answers
            yield Finding("hub", f"{constants.ENDPOINT} answers ({err.code})")
        except (OSError, ValueError) as err:
            remedy = f"check the network, or set a proxy (HTTPS_PROXY); {without}"
            yield Finding("hub", f"{constants.ENDPOINT} cannot be reached ({err})", "warning", remedy)
    if get_token():
        yield Finding("hub token", "found")
    else:
        remedy = "only needed for private models and lorakit push: run hf auth login, or set HF_TOKEN"
        yield Finding("hub token", "none", "absent", remedy)


def data() -> Iterator[Finding]:
    """Whether the bundled data are complete."""
    sums = [line.split("  ", 1) for line in (DEMO / SUMS).read_text(encoding="utf-8").splitlines()]
    damaged = [name for sha256, name in sums if not (DEMO / name).is_file() or file_sha256(DEMO / name) != sha256]
    if damaged:
        text, remedy = f"missing or changed: {', '.join(damaged)}", "pip install --force-reinstall --no-deps lorakit"
        yield Finding("bundled data", text, "failure", remedy)
    else:
        yield Finding("bundled data", "whole")
