"""`lorakit doctor`: what this machine has, lacks, or has in a bad state, each with what would help."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lorakit.errors import first_line
from lorakit.hashing import file_sha256

DEMO = Path(__file__).parent.parent / "demo"
SUMS = "SHA256SUMS"  # of the bundled data, as sha256sum writes it
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # of the CPU, that matrix products profit from
GB = 1e9
LITTLE = 2.0  # GB of memory, or of disk, below which training on a small base is likely to fail
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at: a failure prevents work, a warning makes some of it worse or impossible."""

    name: str
    text: str
    state: Literal["ok", "absent", "warning", "failure"] = "ok"
    remedy: str = ""

    @property
    def line(self) -> str:
        """The same for a reader."""
        return f"{self.state:<8} {self.name}: {self.text}{f'; {self.remedy}' if self.remedy else ''}"


class Examination(NamedTuple):
    """All findings."""

    findings: list[Finding]

    @property
    def is_fit(self) -> bool:
        """Whether nothing prevents work."""
        return all(finding.state != "failure" for finding in self.findings)

    @property
    def lines(self) -> list[str]:
        """For a reader."""
        n = sum(finding.state in ("warning", "failure") for finding in self.findings)
        verdict = "fit to train" if self.is_fit else "not fit to train"
        return [*(finding.line for finding in self.findings), f"{verdict}{f'; {n} to look at' if n else ''}"]

    @property
    def facts(self) -> dict[str, Any]:
        """For a program."""
        return {"fit": self.is_fit, "findings": [asdict(finding) for finding in self.findings]}


def examine() -> Examination:
    """Look at everything; a check that itself fails is a failure found."""
    findings: list[Finding] = []
    for check in (python, packages, extras, cpu, kernels, gpu, memory, disk, cache, hub, token, data):
        try:
            findings += check()
        except Exception as err:
            text = f"{type(err).__name__}: {first_line(err, 'no message')}"
            findings.append(Finding(check.__name__, text, "failure"))
    return Examination(findings)


def python() -> Iterator[Finding]:
    """The interpreter."""
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")


def packages() -> Iterator[Finding]:
    """What lorakit cannot do without: there, and new enough."""
    import lorakit

    yield Finding("lorakit", f"{lorakit.__version__}, {Path(lorakit.__file__).parent}")
    for requirement in _requirements():
        if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def extras() -> Iterator[Finding]:
    """What some verbs need besides."""
    for extra in importlib.metadata.metadata("lorakit").get_all("Provides-Extra") or ():
        if extra == "test":
            continue
        mine = [r for r in _requirements() if r.marker and r.marker.evaluate({"extra": extra}) and _is_extra(r)]
        lacking = [r for r in mine if _package(r).state != "ok"]
        if lacking:
            yield Finding(
                f"extra {extra}", "not installed", "absent", f"pip install 'lorakit[{extra}]' where you want it"
            )
        else:
            yield Finding(f"extra {extra}", ", ".join(_package(r).name + " " + _package(r).text for r in mine))


def _is_extra(requirement: Any) -> bool:
    return not requirement.marker.evaluate({"extra": ""})


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement  # of transformers' own needs

    try:
        return [Requirement(text) for text in importlib.metadata.requires("lorakit") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []  # a checkout on the path, which is not installed


def _package(requirement: Any) -> Finding:
    command = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "not installed", "failure", command)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, f"{version}, older than lorakit needs", "failure", command)
    return Finding(requirement.name, version)


def cpu() -> Iterator[Finding]:
    """Cores, the instructions that count, and threads."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    has = _cpuinfo("flags") or _cpuinfo("Features")
    flags = [flag for flag in FLAGS if flag in has.split()]
    yield Finding("cpu", f"{cpu_name()}, {cores} cores, {', '.join(flags) or 'no vector instructions known of'}")
    threads = torch.get_num_threads()
    if threads > cores:
        yield Finding(
            "threads",
            f"{threads} of torch on {cores} cores",
            "warning",
            f"set OMP_NUM_THREADS={cores}: more are slower",
        )
    else:
        yield Finding("threads", f"{threads} of torch")


def cpu_name() -> str:
    """What the CPU calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # other systems than Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def kernels() -> Iterator[Finding]:
    """Which fast parts pay here, by a measurement of some hundred milliseconds."""
    from lorakit.app.commands.inspect import inspect_kernels

    facts = inspect_kernels().facts
    yield Finding(
        "kernels",
        f"model.dtype = 'auto' is {facts['auto_dtype']} (bf16 products {facts['bf16_gain']:.1f}x as fast), adapted linear "
        f"layers {facts['adapted_linear_gain']:.1f}x, bf16 attention by way of fp32 {facts['fp32_attention_gain']:.1f}x",
    )


def gpu() -> Iterator[Finding]:
    """The accelerators that torch can use."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", "none that torch can use; everything runs on the CPU", "absent")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("gpu", f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free")


def memory() -> Iterator[Finding]:
    """What programs may still take."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
        rows = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next((float(row.split()[1]) * 1024 / GB for row in rows if row.startswith("MemAvailable")), free)
    except (OSError, ValueError):
        yield Finding("memory", "this system does not tell", "absent")
        return
    yield _room("memory", free, "close other programs, or train with model.quantize=int8 or train.micro_batch_size=8")


def disk() -> Iterator[Finding]:
    """Room and right to write in the working folder."""
    here = Path.cwd()
    if not _can_write(here):
        yield Finding("disk", f"{here} cannot be written to", "failure", "change to another folder, or set output.dir")
        return
    yield _room(
        "disk", shutil.disk_usage(here).free / GB, f"runs and checkpoints go to {here}; set output.dir elsewhere"
    )


def _room(name: str, free: float, remedy: str) -> Finding:
    if free < LITTLE:
        return Finding(name, f"{free:.1f} GB free", "warning", remedy)
    return Finding(name, f"{free:.1f} GB free")


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cache() -> Iterator[Finding]:
    """Where models of the hub are kept."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    there = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())
    if _can_write(there):
        yield Finding("hub cache", str(home))
    else:
        yield Finding("hub cache", f"{home} cannot be written to", "warning", "set HF_HOME to a folder of yours")


def hub() -> Iterator[Finding]:
    """Whether the hub answers; offline mode is respected."""
    from huggingface_hub import constants

    without = "models in the cache or in folders, minilm and t5-demo need none"
    if constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE:
        yield Finding("hub", f"offline mode is set; {without}", "absent", "unset HF_HUB_OFFLINE to download")
        return
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            yield Finding("hub", f"{constants.ENDPOINT} answers")
    except urllib.error.HTTPError as err:  # an answer, whatever it says
        yield Finding("hub", f"{constants.ENDPOINT} answers ({err.code})")
    except (OSError, ValueError) as err:
        remedy = f"see to the network or a proxy (HTTPS_PROXY); {without}"
        yield Finding("hub", f"{constants.ENDPOINT} cannot be reached ({err})", "warning", remedy)


def token() -> Iterator[Finding]:
    """Whether there is a token; what it is stays where it is."""
    from huggingface_hub import get_token

    if get_token():
        yield Finding("hub token", "there is one")
    else:
        yield Finding(
            "hub token", "none", "absent", "private models and lorakit push need one: hf auth login, or HF_TOKEN"
        )


def data() -> Iterator[Finding]:
    """Whether the bundled data are whole."""
    damaged = [name for sha256, name in _sums() if not _is_whole(DEMO / name, sha256)]
    if damaged:
        text, remedy = f"missing or changed: {', '.join(damaged)}", "pip install --force-reinstall --no-deps lorakit"
        yield Finding("bundled data", text, "failure", remedy)
    else:
        yield Finding("bundled data", "whole")


def _sums() -> Sequence[tuple[str, str]]:
    lines = (DEMO / SUMS).read_text(encoding="utf-8").splitlines()
    return [(line[:64], line[66:]) for line in lines]


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256
