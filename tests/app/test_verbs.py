"""Every command: --json that a program can read, --dry-run where something is written, and what a shell completes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
import torch
from click.shell_completion import ShellComplete

import lorakit.app.commands
from lorakit.app.arguments import DEVICE
from lorakit.app.cli import COMMANDS, MODULES, commands
from lorakit.app.commands.completion import SHELLS
from lorakit.recipe import TrainSection
from tests.app.conftest import Cli

# Verbs without --json, and why.
PLAIN = {
    "completion": "its output is a script",
    "predict": "its answers are JSON in any case",
    "recipe": "its list takes it",
}
# Verbs that write somewhere by themselves; combine and predict do with --out alone.
WRITE = {"card", "export", "import", "merge", "push", "quickstart", "report", "serve", "sweep", "train"}
WORDS: Mapping[str, tuple[str, ...]] = {
    "card": ("{run}",),
    "check": ("{files}/train.csv",),
    "combine": ("{run}", "{run}", "--weights", "1,0"),
    "compare": ("{run}", "{run}"),
    "evaluate": ("{run}", "{files}/validation.csv"),
    "export": ("{run}", "--to", "peft", "--out", "exported"),
    "import": ("{run}/adapter", "--out", "adopted", "--labels", "bad,good"),
    "inspect": ("{run}",),
    "merge": ("{run}", "--out", "merged"),
    "push": ("{run}", "you/reviews"),
    "report": ("{run}",),
    "serve": ("{run}", "--port", "0"),
    "sweep": ("{run}/recipe.toml", "train.lr=1e-3,1e-2", "output.dir=points"),
    "train": ("{run}/recipe.toml", "output.dir=again"),
}


def options(verb: str) -> set[str]:
    return {name for parameter in commands.load(verb).params for name in parameter.opts}


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_table_has_every_command_and_its_line() -> None:
    files = Path(lorakit.app.commands.__path__[0]).glob("[a-z]*.py")
    assert {path.stem for path in files} == {MODULES.get(name, name) for name in COMMANDS}
    for name, line in COMMANDS.items():
        command = commands.load(name)
        assert command.name == name
        assert re.split(r"\n\n|\n\x08", command.help or "")[0].replace("\n", " ") == line
        assert len(line) <= 66  # on one line of 80 columns


def test_each_verb_has_json_and_each_that_writes_has_dry_run() -> None:
    assert {verb for verb in COMMANDS if "--json" not in options(verb)} <= set(PLAIN)
    assert {verb for verb in WRITE if "--dry-run" not in options(verb)} == set()
    assert (set(COMMANDS) - WRITE).isdisjoint(verb for verb in COMMANDS if "--dry-run" in options(verb))


HEAVY = ("combine", "evaluate", "export", "merge", "report", "serve")  # which have tests of their own with --json


@pytest.mark.parametrize("verb", [pytest.param(v, marks=[pytest.mark.slow] if v in HEAVY else []) for v in WORDS])
def test_json_can_be_read_and_dry_run_leaves_nothing(
    verb: str, cli: Cli, bert_run: Path, files: Path, tmp_path: Path
) -> None:
    words = [word.format(run=bert_run, files=files) for word in WORDS[verb]]
    before = tree(tmp_path) | tree(bert_run)
    code, out, err = cli(verb, *words, "--json", *(["--dry-run"] if verb in WRITE else []))
    assert code == 0, err
    assert isinstance(json.loads(out), dict)
    assert tree(tmp_path) | tree(bert_run) == before


# Completion


def complete(*words: str) -> list[str]:
    """What click offers for the last word."""
    found = ShellComplete(commands, {}, "lorakit", "_X").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


def test_verbs_options_and_keys_are_completed() -> None:
    assert complete("tra") == ["train"]
    assert "--resume" in complete("train", "a.toml", "--r")
    assert complete("train", "a.toml", "lora.r=4", "lora.ran") == ["lora.rank_pattern="]
    assert complete("sweep", "a.toml", "train.sched") == ["train.schedule="]
    assert complete("train", "sst2") == ["sst2-bert", "sst2-bert-tuned"]


def test_runs_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("reviews", "reviews-2", "tags"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.toml").write_text("")
    (tmp_path / "runs" / "rest").mkdir()
    for verb in ("predict", "merge", "compare", "serve"):
        assert complete(verb, "") == ["runs/reviews", "runs/reviews-2", "runs/tags"]
        assert complete(verb, "runs/rev") == ["runs/reviews", "runs/reviews-2"]
    (item,) = ShellComplete(commands, {}, "lorakit", "_X").get_completions(["merge"], "else")
    assert item.type == "dir"


@pytest.mark.parametrize("shell", SHELLS)
def test_script_names_program_and_variable(shell: str, cli: Cli) -> None:
    code, out, _ = cli("completion", shell)
    assert code == 0
    assert "_LORAKIT_COMPLETE=" in out and "lorakit" in out
    assert (shell == "bash") == ("compopt -o nospace" in out)


@pytest.mark.slow
def test_bash_completes_without_torch(tmp_path: Path, cli: Cli) -> None:
    """bash itself, with the script, in an empty environment."""
    (tmp_path / "lorakit").write_text(
        f'#!/bin/sh\nexec {sys.executable} -X importtime -m lorakit "$@" 2>{tmp_path}/imports\n'
    )
    (tmp_path / "lorakit").chmod(0o755)
    (tmp_path / "script").write_text(cli("completion", "bash").out)
    ask = (
        f"PATH={tmp_path}:$PATH; source {tmp_path}/script; COMP_WORDS=(lorakit train a.toml lora.a); COMP_CWORD=3; "
        '_lorakit_completion lorakit 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "--norc", "-c", ask], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["lora.alpha=", "lora.alpha_pattern="], done.stderr
    assert "torch" not in (tmp_path / "imports").read_text()


def test_every_command_that_answers_takes_a_device(
    bert_run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def pick(name: str = "auto", key: str = "device") -> torch.device:
        names.append(name)
        return torch.device("cpu")

    (tmp_path / "data.csv").write_text("text,label,by\na superb film,good,a\na stale plot,bad,a\n")
    (tmp_path / "a").symlink_to(bert_run)
    commands = {
        ("predict", bert_run, "a superb film"): 0,
        ("predict", "--adapters", ".", "--file", "data.csv", "--adapter-column", "by"): 0,
        ("evaluate", bert_run, "data.csv"): 0,
        ("serve", bert_run, "--dry-run"): 0,
        ("embed", bert_run, "--file", "data.csv", "--out", "v.npy"): 3,  # it gives no vectors
    }
    with monkeypatch.context() as patch:
        for place in ("predictor", "shared_base"):
            patch.setattr(f"lorakit.inference.{place}.pick_device", pick)
        for words, code in commands.items():
            assert cli(*words, "--device", "xpu").code == code, words
    assert names == ["xpu"] * len(commands)
    for words in commands:
        refused = cli(*words, "--device", "cuda")
        assert refused.code == 2 and "device = 'cuda': torch" in refused.err, refused.err
    recipes = TrainSection.model_fields["device"].annotation
    assert DEVICE(lambda: None).__click_params__[0].type.choices == get_args(recipes)
