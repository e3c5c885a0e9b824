"""The training loop: which examples each step sees, how fast it learns, and what a cut batch changes (nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit.inference.answer import answer_all
from lorakit.recipe import ChosenTrain
from lorakit.task_info import TASKS
from lorakit.tasks.base import rows_of
from lorakit.training.loop import Member, train
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.schedule import Plan, lr_factor, make_optimizer, trained_parameters
from tests.runs import changed, nearly, sections

LENGTHS = [3 + i * 7 % 20 for i in range(41)]
STILL = ("model.dropout=0", "lora.dropout=0")
BASES = {
    "token_classification": "roberta",
    "text2text_ner": "t5",
    "text2text_classification": "t5",
    "text2text_generation": "t5",
}  # bert for all others


def chosen(**keys: Any) -> ChosenTrain:
    return ChosenTrain.model_validate({"epochs": 3, "batch_size": 32, "lr": 5e-4, **keys})


CASES = [*TASKS, "crf", "weighted"]


@pytest.fixture(params=CASES)
def task_sections(request: pytest.FixtureRequest, files: Path) -> Iterator[dict]:
    task = {"crf": "token_classification", "weighted": "sequence_classification"}.get(request.param, request.param)
    raw = sections(request.getfixturevalue(BASES.get(task, "bert")), files, task)
    if request.param == "crf":
        raw["task"]["crf"] = True
    if request.param == "weighted":
        raw["task"]["class_weights"] = {"good": 3.0}
    yield raw


# Which examples a step sees


@pytest.mark.parametrize("start", range(0, 19, 3))
def test_batches_from_a_step_are_the_tail_of_all_batches(start: int) -> None:
    plan = Plan(LENGTHS, chosen(epochs=3, batch_size=6))
    assert list(plan.batches(start)) == list(plan.batches(0))[start:]


def test_batches_hold_every_example_once_an_epoch() -> None:
    plan = Plan(LENGTHS, chosen(epochs=2, batch_size=6))
    batches = list(plan.batches(0))
    assert len(batches) == plan.steps == 2 * plan.steps_per_epoch
    epochs = batches[: plan.steps_per_epoch], batches[plan.steps_per_epoch :]
    assert [sorted(chain.from_iterable(epoch)) for epoch in epochs] == [list(range(len(LENGTHS)))] * 2
    assert epochs[0] != epochs[1]


def test_batches_depend_on_the_seed_alone() -> None:
    first, again, other = (list(Plan(LENGTHS, chosen(batch_size=6, seed=seed)).batches(0)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("max_steps", [1, 7, 8, 100])
def test_max_steps_ends_the_plan_early(max_steps: int) -> None:
    whole = Plan(LENGTHS, chosen(epochs=2, batch_size=6))
    plan = Plan(LENGTHS, chosen(epochs=2, batch_size=6, max_steps=max_steps))
    assert plan.steps == min(max_steps, whole.steps)
    assert list(plan.batches(0)) == list(whole.batches(0))[:max_steps]


# The learning rate


def reference(name: str, warmup: int, steps: int) -> list[float]:
    """transformers' factor at each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {} if name == "constant" else {"num_training_steps": steps}
    make = getattr(transformers, f"get_{name}_schedule_with_warmup")
    schedule = make(optimizer, num_warmup_steps=warmup, **options)
    return [schedule.lr_lambdas[0](step) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_lr_factor_equals_transformers_schedule(schedule: str, warmup: int) -> None:
    steps = 40
    config = chosen(schedule=schedule, warmup=float(warmup))
    ours = [lr_factor(step, steps, config) for step in range(steps)]
    theirs = reference(schedule, warmup, steps)
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert ours[: max(0, warmup - 1)] == pytest.approx(theirs[1:warmup])  # theirs wastes its first step on a rate of 0


def test_lr_factor_reads_a_warmup_below_one_as_a_share() -> None:
    share, number = chosen(warmup=0.25), chosen(warmup=10)
    assert [lr_factor(i, 40, share) for i in range(40)] == [lr_factor(i, 40, number) for i in range(40)]


def test_head_lr_is_the_rate_of_whole_modules_alone(bert: Path, files: Path) -> None:
    prepared = prepare(changed(sections(bert, files), "train.head_lr=0.5"))
    config = prepared.recipe.train
    lora, whole = trained_parameters(prepared.model)
    groups = make_optimizer(lora, whole, config).param_groups
    assert [(group["lr"], set(group["names"])) for group in groups] == [(config.lr, set(lora)), (0.5, set(whole))]
    assert {name.rpartition("lora_")[2] for name in lora} == {"A", "B"}
    assert not any("lora_" in name for name in whole)


def test_loraplus_ratio_raises_the_rate_of_every_b_alone(bert: Path, files: Path) -> None:
    prepared = prepare(changed(sections(bert, files), "train.loraplus_lr_ratio=16.0"))
    config = prepared.recipe.train
    lora, whole = trained_parameters(prepared.model)
    rates = {n: group["lr"] for group in make_optimizer(lora, whole, config).param_groups for n in group["names"]}
    assert rates == {n: config.lr * (16 if n.endswith("lora_B") else 1) for n in (*lora, *whole)}


# One step, however it is cut


def gradients(prepared: Prepared, positions: list[int], micro: int) -> dict[str, torch.Tensor]:
    """The gradient of one step over these examples, taken from what a step leaves before the optimizer has it."""
    found: dict[str, torch.Tensor] = {}
    config = prepared.recipe.train.model_copy(
        update={"batch_size": len(positions), "micro_batch_size": micro, "max_steps": 1, "max_grad_norm": 1e9}
    )
    info = prepared.task.info
    items = [prepared.parts["train"].drawn(info)[i] for i in positions]
    optimizer = make_optimizer(*trained_parameters(prepared.model), config)

    def keep(*_: object) -> None:
        pairs = ((n, p) for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True))
        found.update({name: p.grad.detach().clone() for name, p in pairs if p.grad is not None})

    handle = optimizer.register_step_pre_hook(keep)
    before = {name: p.detach().clone() for name, p in prepared.model.named_parameters()}
    plan = Plan([sum(len(row["input_ids"]) for row in rows_of(info, [each])) for each in items], config)
    (steps,) = train(prepared.model, [Member(prepared.task, items, optimizer, plan)])
    (step,) = steps.values()
    handle.remove()
    with torch.no_grad():
        for name, parameter in prepared.model.named_parameters():
            parameter.copy_(before[name])
    return {**found, "loss": torch.tensor(step.loss)}


# text2text_classification has batches and loss of text2text_generation
@pytest.mark.parametrize("task_sections", [c for c in CASES if c != "text2text_classification"], indirect=True)
def test_gradients_do_not_depend_on_micro_batches(task_sections: dict) -> None:
    """A batch in one piece, in pieces of which the last is smaller, and in single examples."""
    prepared = prepare(changed(task_sections, *STILL))
    positions = list(range(7))
    whole = gradients(prepared, positions, 8)
    assert any(gradient.abs().max() > 0 for name, gradient in whole.items() if name != "loss")
    for micro in (3, 1):
        torch.testing.assert_close(gradients(prepared, positions, micro), whole, atol=1e-6, rtol=1e-4)


def test_step_reports_real_tokens_and_epochs(bert: Path, files: Path) -> None:
    prepared = prepare(changed(sections(bert, files)))
    optimizer = make_optimizer(*trained_parameters(prepared.model), prepared.recipe.train)
    part, plan = prepared.parts["train"], prepared.plan
    member = Member(prepared.task, part.flat, optimizer, plan)
    steps = [step for steps in train(prepared.model, [member]) for step in steps.values()]
    assert [step.number for step in steps] == list(range(1, plan.steps + 1))
    assert sum(step.tokens for step in steps) == 2 * sum(plan.lengths)
    assert sum(step.examples for step in steps) == 2 * len(part.flat)
    assert steps[-1].epoch == 2


def test_bucketed_equals_padded(task_sections: dict) -> None:
    """The summed loss and the answers are those of one batch in which everything is padded to the longest."""
    prepared = prepare(changed(task_sections, *STILL))
    task, model, part = prepared.task, prepared.model.eval(), prepared.parts["train"]
    batches = list(prepared.plan.batches(0))[: prepared.plan.steps_per_epoch]
    together = task.collate(part.flat)
    with torch.no_grad():
        if not task.info.contrasts:  # whose loss is one of a whole batch
            apart = sum(task.losses(model, task.collate([part.flat[i] for i in batch])).sum() for batch in batches)
            torch.testing.assert_close(apart, task.losses(model, together).sum(), atol=1e-4, rtol=1e-5)
        raws = iter(task.predict(model, together))
    padded = [task.answer(e, list(islice(raws, len(own)))) for e, own in zip(part.examples, part.items, strict=True)]
    bucketed = answer_all(model, task, part.examples, part.items, prepared.device)
    assert nearly(task.evaluate(part.examples, bucketed).scores) == task.evaluate(part.examples, padded).scores
    assert [task.to_json(e, a) for e, a in zip(part.examples, bucketed, strict=True)] == [
        nearly(task.to_json(e, a)) for e, a in zip(part.examples, padded, strict=True)
    ]
