"""What commands print: the table of scores, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click
import pytest

from lorakit.app.console import Screen, score_lines
from lorakit.app.printing import begin, echo, tell, visible
from lorakit.runtime.events import Note, Started, Step
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


def test_time_left_is_judged_by_the_steps_after_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it adapters learn from pairs, so that of a minute's training ten were foretold."""
    times = iter([0, 0, 100, *[110] * 3])
    monkeypatch.setattr("lorakit.app.console.time.monotonic", lambda: next(times))
    screen = Screen()
    screen(Started(24, 0, "accuracy"))
    for number in (1, 2):
        screen(Step(number, 1.0, 0.5, 1e-3, 1.0, 16, 200, 16))
    assert capsys.readouterr().err == "step 2/24  loss 0.5000  2 examples/s  220 s left\n"


# A terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stdout and stderr are a terminal of 40 columns."""
    monkeypatch.setattr("lorakit.app.printing.is_terminal", lambda err: True)
    monkeypatch.setattr(click.utils, "should_strip_ansi", lambda *stream: False)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_lines_for_people_are_broken_between_words(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"  accuracy {'word ' * 20}\n/a/path/longer/than/any/terminal/of/forty/columns.csv"
    tell(text, color="red")
    colored = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    tell(text, color="red")
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b[31m" in colored and "\x1b" not in "".join(lines)
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert all(len(line) <= 40 for line in lines[:-1]) and lines[1].startswith("    word")
    echo(json.dumps({"text": text}))
    assert len(capsys.readouterr().out.splitlines()) == 1  # for programs


def test_a_line_is_there_before_torch_and_no_loss_before_the_first_step(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin("loading runs/reviews")
    assert capsys.readouterr().err == "loading runs/reviews ...\n"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # for rich
    screen = Screen()
    screen(Started(10, 0, "accuracy"))
    screen.close()
    shown = capsys.readouterr().err
    assert "0/10" in shown and "loss" not in shown and "0.0000" not in shown


def test_names_of_any_length_share_a_column() -> None:
    row = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}
    lines = score_lines({"accuracy": 1.0, "per_class": {"a label of thirty letters": row, "b": row}})
    assert {line.index("precision") for line in lines[1:]} == {lines[0].index("1.0000")}
