"""What commands print: the table of scores, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorakit.app.console import Screen, score_lines
from lorakit.app.printing import visible
from lorakit.runtime.events import Note
from tests.app.conftest import Cli

SCORES = {"accuracy": 0.875, "intervals": {"accuracy": [0.85, 0.9]}, "train_seconds": 3.0}


def test_score_lines_show_the_interval_beside_the_score() -> None:
    assert score_lines({**SCORES, "linear_probe": 0.5}) == ["accuracy           0.8750 [0.850, 0.900]"]


def test_score_lines_name_both_readings_of_entities() -> None:
    first, second = score_lines({"entity_f1": 1.0, "entity_f1_strict": 0.5})
    assert "conlleval" in first
    assert "strict IOB2" in second


def test_score_lines_end_with_the_test_part() -> None:
    *_, last = score_lines({**SCORES, "evaluations": 3, "test": {"accuracy": 0.5, "intervals": {}}})
    assert last == "test accuracy           0.5000"


# Control characters

TITLE = "\x1b]0;owned\x07\x9b2J"  # sets a terminal's title, and clears it


def test_control_characters_are_shown_as_json_writes_them() -> None:
    assert visible(f"a\t{TITLE}\r\n") == "a\t\\u001b]0;owned\\u0007\\u009b2J\\u000d\n"
    assert json.loads(visible(json.dumps(TITLE, ensure_ascii=False))) == TITLE
    assert visible("héllo \u4e2d \U0001f600 \ud800") == "héllo \u4e2d \U0001f600 \\ud800"


def test_labels_names_and_texts_do_nothing_to_a_terminal(cli: Cli, bert_run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(bert_run / "adapter", tmp_path / f"a{TITLE}")
    side = json.loads((adapter / "lorakit.json").read_text())
    (adapter / "lorakit.json").write_text(json.dumps({**side, "labels": [TITLE, "good"]}))
    commands = [
        ("inspect", adapter),
        ("predict", adapter, f"a film {TITLE}"),
        ("merge", TITLE, "--out", "x"),
    ]
    for words in commands:
        _, out, err = cli(*words)
        assert "owned" in out + err
        assert [c for c in out + err if c != "\n" and not c.isprintable()] == []


def test_notes_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Screen()(Note(f"file {TITLE}"))
    assert capsys.readouterr().err == "file \\u001b]0;owned\\u0007\\u009b2J\n"
