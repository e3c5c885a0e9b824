"""The files that start servers and workers elsewhere: valid, closed, and patient enough to answer what was accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from lorakit.app.cli import commands
from lorakit.app.server import process
from lorakit.app.server.routes import HEALTH, OPEN, Limits
from lorakit.inference.adapter_pool import AdapterPool

DEPLOY = Path(__file__).parents[1] / "deploy"
SCHEMA = "1.31"  # of Kubernetes
MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}")
    for path in sorted(DEPLOY.glob("*.yaml"))
    if path.name != "compose.yaml"
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
PODS = [param for param in MANIFESTS if "template" in param.values[0].get("spec", {})]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", MANIFESTS)
def test_manifest_is_what_kubernetes_takes(document: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    validate(document, SCHEMA, strict=True)


@pytest.mark.parametrize("document", PODS)
def test_pod_is_closed_and_its_command_is_one_of_ours(document: dict[str, Any]) -> None:
    pod = document["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        closed = container["securityContext"]
        assert closed["readOnlyRootFilesystem"] and closed["capabilities"] == {"drop": ["ALL"]}
        assert not closed["allowPrivilegeEscalation"] and "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for container in pod["containers"]:
        assert_ours(container["args"])


def test_server_is_ready_when_loaded_and_drains_before_it_is_killed() -> None:
    server = next(param.values[0] for param in PODS if param.values[0]["kind"] == "Deployment")["spec"]
    pod = server["template"]["spec"]
    (container,) = pod["containers"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert ("GET", get["path"]) in OPEN and str(named[get["port"]]) == option(container["args"], "--port")
    drain = container["lifecycle"]["preStop"]["sleep"]["seconds"] + float(option(container["args"], "--timeout")) + 1
    assert pod["terminationGracePeriodSeconds"] > drain
    assert server["selector"]["matchLabels"].items() <= server["template"]["metadata"]["labels"].items()


def test_compose_file_is_closed_and_patient() -> None:
    server = COMPOSE["services"]["server"]
    assert_ours(server["command"])
    assert server["read_only"] and server["cap_drop"] == ["ALL"] and server["user"].split(":")[0] != "0"
    assert int(server["stop_grace_period"].removesuffix("s")) > float(option(server["command"], "--timeout")) + 1
    assert any(path in server["healthcheck"]["test"][-1] for path in HEALTH)
    for service in COMPOSE["services"].values():
        assert {volume.split(":")[0] for volume in service["volumes"]} <= COMPOSE["volumes"].keys()
    assert server["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}


def test_dockerfile_copies_what_is_there_and_ends_as_another_user() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = shlex.split(line)[1:]
            assert all((DEPLOY.parent / source).exists() for source in sources)
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001"]
    assert_ours(yaml.safe_load(lines[-1].removeprefix("CMD ")))
    extras = re.search(r"ARG EXTRAS=(\S+)", text)
    declared = (DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert extras and all(f"\n{extra} = [" in declared for extra in extras[1].split(","))


def test_nothing_listens_before_all_adapters_are_loaded(bert_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[list[str]] = []
    pools: list[AdapterPool] = []
    load = AdapterPool.load

    def noted(pool: AdapterPool, name: str) -> Any:
        pools.append(pool)
        return load(pool, name)

    def listening(host: str, port: int) -> Any:
        loaded.append(pools[0].resident)
        raise ConnectionAbortedError

    monkeypatch.setattr(AdapterPool, "load", noted)
    monkeypatch.setattr(process, "listen", listening)
    limits = {"memory": 2**20, "waiting": 1, "inputs": 1, "timeout": Limits().answer_s}
    with pytest.raises(ConnectionAbortedError):
        process.run([bert_run], ("127.0.0.1", 0), None, limits=limits, say=lambda facts: None)
    assert loaded == [[bert_run.name]]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def assert_ours(words: list[str]) -> None:
    """The command is known, and each of its options."""
    shown = CliRunner().invoke(commands, [words[0], "--help"])
    assert shown.exit_code == 0
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in shown.output, word
