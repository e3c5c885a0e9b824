"""`lorakit doctor`: what is wrong is found and has a remedy; nothing prints the token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from lorakit.app.commands import doctor
from lorakit.app.commands.doctor import DEMO, SUMS, Finding, examine
from tests.app.conftest import Cli


def found(name: str) -> Finding:
    (finding,) = [finding for finding in examine() if finding.name == name]
    return finding


def test_this_machine_is_fit_and_its_token_is_never_shown(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_may_see_it")
    code, out, _ = cli("doctor", "--json")
    facts = json.loads(out)
    assert (code, facts["fit"]) == (0, True), facts
    findings = {finding["name"]: finding for finding in facts["findings"]}
    names = "python|lorakit|cpu|threads|dtype|kernels|gpu|memory|disk|hub|hub cache|hub token"
    assert findings.keys() >= set(names.split("|"))
    assert [f for f in findings.values() if f["state"] in ("warning", "failure") and not f["remedy"]] == []
    assert (findings["hub token"]["text"], findings["bundled data"]["state"]) == ("found", "ok")
    printed = cli("doctor").out
    absent = [name for name, f in findings.items() if name.startswith("extra ") and f["state"] == "absent"]
    assert len(printed.splitlines()) == len(facts["findings"]) - len(absent) + (len(absent) > 0) + 1
    assert all(name.removeprefix("extra ") in printed for name in absent)
    assert printed.splitlines()[-1].startswith("ready to train")
    assert "nobody_may_see_it" not in out + printed


def test_damaged_data_prevent_work(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    with (tmp_path / "demo" / "reviews-train.csv").open("a") as file:
        file.write("x")
    monkeypatch.setattr(doctor, "DEMO", tmp_path / "demo")
    code, out, _ = cli("doctor")
    (line,) = [line for line in out.splitlines() if "bundled data" in line]
    assert line.startswith("failure") and "reviews-train.csv" in line and "pip install" in line
    assert (code, out.splitlines()[-1].startswith("not ready to train")) == (1, True)


def test_sums_are_those_of_the_bundled_files() -> None:
    assert {line[66:] for line in (DEMO / SUMS).read_text().splitlines()} == {
        path.relative_to(DEMO).as_posix() for path in DEMO.rglob("*") if path.is_file() and path.name != SUMS
    }


def test_hub_is_asked_unless_offline_mode_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is set" in found("hub").text
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert found("hub").state == "warning"
    assert "127.0.0.1:9 cannot be reached" in found("hub").text


def test_what_is_missing_old_or_full_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=99", "no-such-package>=1", "fastapi>=0.1; extra == 'serve'", "no-such>=1; extra == 'track'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    metadata = type("Metadata", (), {"get_all": lambda self, key: ["serve", "track", "test"]})
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda name: metadata())
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e6}))
    monkeypatch.setattr(doctor, "_can_write", lambda folder: folder == Path.cwd())
    by_name = {finding.name: finding for finding in examine()}
    assert (by_name["torch"].state, by_name["torch"].remedy) == ("failure", "pip install 'torch>=99'")
    assert by_name["no-such-package"].text == "not installed"
    assert by_name["extra serve"].state == "ok"
    assert (by_name["extra track"].state, "lorakit[track]" in by_name["extra track"].remedy) == ("absent", True)
    assert "extra test" not in by_name
    assert (by_name["disk"].state, by_name["hub cache"].state) == ("warning", "warning")


def test_check_that_fails_is_a_failure_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such device")

    broken.__name__ = "gpu"
    monkeypatch.setattr(doctor, "gpu", broken)
    assert found("gpu") == Finding("gpu", "OSError: no such device", "failure")


@pytest.mark.parametrize(("kind", "rest"), [("cuda", "8.0 of 16.0 GB free; "), ("mps", "model")])
def test_accelerators_are_named_with_what_they_compute_in(
    monkeypatch: pytest.MonkeyPatch, kind: str, rest: str
) -> None:
    from tests.runtime.test_device import EMULATED, be

    be(monkeypatch, kind, get_device_name=lambda device: "Tesla T4", **(EMULATED if kind == "cuda" else {}))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (int(8e9), int(16e9)))
    (finding,) = doctor.gpu()
    assert finding.text.startswith(f"Tesla T4 ({kind})")
    assert rest in finding.text
    assert finding.text.endswith("float16" if kind == "cuda" else "float32")
