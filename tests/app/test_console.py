"""The table of scores that commands print."""

from __future__ import annotations

from lorakit.app.console import score_lines

SCORES = {"accuracy": 0.875, "intervals": {"accuracy": [0.85, 0.9]}, "train_seconds": 3.0}


def test_score_lines_show_the_interval_beside_the_score() -> None:
    assert score_lines(SCORES) == ["accuracy           0.8750 [0.850, 0.900]"]


def test_score_lines_name_both_readings_of_entities() -> None:
    first, second = score_lines({"entity_f1": 1.0, "entity_f1_strict": 0.5})
    assert "conlleval" in first
    assert "strict IOB2" in second


def test_score_lines_say_that_the_best_of_several_evaluations_is_optimistic() -> None:
    assert score_lines({**SCORES, "evaluations": 1}) == score_lines(SCORES)
    assert "best of 3 evaluations" in score_lines({**SCORES, "evaluations": 3})[-1]


def test_score_lines_end_with_the_test_part() -> None:
    *_, last = score_lines({**SCORES, "evaluations": 3, "test": {"accuracy": 0.5, "intervals": {}}})
    assert last == "test accuracy           0.5000"
