"""The loss on the validation examples against the task's own, one item at a time, and what it costs beside the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.inference.answer import Judged, answer_all, mean_loss, with_loss
from lorakit.runtime.device import evaluating, to_device
from lorakit.training.prepare import prepare
from tests.runs import changed, fit, read_lines, sections

TASKS = {
    "bert": ("sequence_classification", "multi_label_classification", "ordinal_classification", "sequence_regression"),
    "roberta": ("token_classification",),
    "t5": ("text2text_ner", "text2text_generation"),  # of which text2text_classification has batches and loss
}
CHANGES = {"sequence_classification": ("task.class_weights=balanced",), "token_classification": ("task.crf=true",)}


@pytest.mark.parametrize(("base", "task"), [(base, task) for base, tasks in TASKS.items() for task in tasks])
def test_loss_is_the_mean_of_the_task_s_own_and_needs_no_second_forward(
    request: pytest.FixtureRequest, files: Path, base: str, task: str
) -> None:
    raw = sections(request.getfixturevalue(base), files, task)
    words = ("task.max_target_length=16",) if task == "text2text_ner" else CHANGES.get(task, ())
    ready = prepare(changed(raw, *words))
    part, device = ready.parts["validation"], ready.device
    n_forwards = 0

    def count(*arguments: object) -> None:
        nonlocal n_forwards
        n_forwards += 1

    ready.model.register_forward_hook(count)
    arguments = (ready.model, ready.task, part.examples, part.items, device)
    answers, alone = answer_all(*arguments), n_forwards
    judged = answer_all(arguments[0], with_loss(ready.task), *arguments[2:])
    assert [ready.task.to_json(e, j.answer) for e, j in zip(part.examples, judged, strict=True)] == [
        ready.task.to_json(e, a) for e, a in zip(part.examples, answers, strict=True)
    ]
    if base != "t5":
        assert n_forwards == 2 * alone
    with evaluating(ready.model):
        batches = [to_device(ready.task.collate([item]), device) for own in part.items for item in own]
        total = torch.stack([ready.task.losses(ready.model, batch).sum() for batch in batches]).sum()
    n = sum(int(batch["n_targets"].sum()) for batch in batches)
    assert mean_loss(judged) == pytest.approx(total.item() / n, rel=1e-3 if ready.dtype == torch.bfloat16 else 1e-4)


def test_nothing_labelled_or_finite_has_no_loss() -> None:
    assert mean_loss([]) is None
    assert mean_loss([Judged("", float("inf"), 1)]) is None


def test_every_evaluation_logs_the_loss_and_it_is_no_score(bert: Path, files: Path, tmp_path: Path) -> None:
    scores = fit(changed(sections(bert, files), "train.max_steps=2", "train.eval_every=1"), tmp_path).scores
    lines = read_lines(tmp_path / "metrics.jsonl")
    evaluations = [line["validation"] for line in lines if "validation" in line]
    assert all(line["loss"] == pytest.approx(line["nll"], rel=1e-3) for line in evaluations)  # of classes
    assert "loss" not in {**scores, **scores["last"]}
