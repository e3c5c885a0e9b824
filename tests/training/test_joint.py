"""Members of a joint run against the same recipes trained alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.errors import LorakitError, NumericsError
from lorakit.recipe import Recipe
from lorakit.runtime.events import Event, Note
from lorakit.training import joint, loop
from lorakit.training.checkpoint import find_checkpoint, newest_checkpoint
from lorakit.training.joint import groups_of, prepare_all
from lorakit.training.loop import plan_forwards
from lorakit.training.prepare import Prepared
from lorakit.training.results import Result
from lorakit.training.run import Run, fit_all
from tests.runs import Sections, Stopped, changed, fit, sections, stop_after

STILL = ("model.dropout=0", "lora.dropout=0", "train.lr=1e-3")
SAME = {"atol": 1e-6, "rtol": 0}


def ready(prepared: Sequence[Prepared | LorakitError]) -> list[Prepared]:
    assert all(isinstance(member, Prepared) for member in prepared)
    return [member for member in prepared if isinstance(member, Prepared)]


def runs_of(recipes: Sequence[Recipe], folder: Path) -> list[Run]:
    """Runs over one model, each in a folder of its own."""
    members = ready(prepare_all(recipes))
    assert len(groups_of(members)) == 1
    runs = []
    for i, member in enumerate(members):
        place = folder / str(i)
        place.mkdir(parents=True, exist_ok=True)
        runs.append(Run(member, place))
        if (checkpoint := find_checkpoint(place, "auto", lambda _: None)) is not None:
            runs[-1].restore(checkpoint)
    return runs


def fit_jointly(recipes: Sequence[Recipe], folder: Path) -> list[Result]:
    results = [result for result in fit_all(runs_of(recipes, folder)) if isinstance(result, Result)]
    assert len(results) == len(recipes)
    return results


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What a run has trained, and its optimizer's state, after the last step."""
    return newest_checkpoint(folder / "checkpoints")[0].tensors


def assert_alike(folder: Path, alone: Path, exact: bool = False) -> None:
    torch.testing.assert_close(tensors(folder), tensors(alone), **({"atol": 0, "rtol": 0} if exact else SAME))
    weights = [load_file(place / "adapter" / "adapter_model.safetensors") for place in (folder, alone)]
    torch.testing.assert_close(weights[0], weights[1], **SAME)


MIXED = {  # by name: the words of each member
    "ranks, scalings, targets": (
        ["lora.r=2"],
        ["lora.r=4", "lora.alpha=8", "lora.target_modules=query,value"],
        ["lora.use_rslora=true", "train.lr=5e-4", "train.schedule=cosine"],
    ),
    "variants": (["lora.use_dora=true"], ["lora.init=pissa"], ["lora.update=lora_fa"], ["lora.update=adalora"]),
    "orders, batches, ends": (
        ["train.seed=3", "train.patience=1", "train.eval_every=2"],
        ["train.batch_size=5", "train.max_steps=9"],
        ["train.micro_batch_size=3", "train.max_steps=6"],
    ),
    "blocks below that are looked up": (
        ["lora.layers_to_transform=1,", "train.seed=1"],
        ["lora.layers_to_transform=1,", "train.batch_size=5"],
    ),
}
LONG = "ranks, scalings, targets"  # in which rounding has 15 steps to grow


@pytest.mark.parametrize("mixed", MIXED)
def test_a_member_learns_what_it_learns_alone(mixed: str, bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sections(bert, files)
    long = ["train.epochs=3", "train.max_steps=15", "train.eval_every=15"] if mixed == LONG else ["train.max_steps=7"]
    recipes = [changed(raw, *STILL, *long, *words) for words in MIXED[mixed]]  # into a second epoch at least
    for i, result in enumerate(fit_jointly(recipes, tmp_path / "joint")):
        alone = fit(recipes[i], tmp_path / f"alone-{i}")
        assert_alike(result.folder, alone.folder)
        for key in ("accuracy", "best_step", "parameters"):
            assert result.scores[key] == alone.scores[key]


def test_dropout_is_drawn_as_alone_to_the_bit(bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sections(bert, files)  # dropout in the base and in the adapter
    recipes = [changed(raw, "train.max_steps=6", *words) for words in (["train.seed=1"], ["lora.r=2"])]
    for i, result in enumerate(fit_jointly(recipes, tmp_path / "joint")):
        assert_alike(result.folder, fit(recipes[i], tmp_path / str(i)).folder, exact=True)


@pytest.mark.parametrize(
    ("base", "tasks"),
    [
        (
            "bert",
            ("sequence_classification", "multi_label_classification", "ordinal_classification", "sequence_regression"),
        ),
        ("sentence_bert", ("sequence_classification", "ordinal_classification")),
        ("roberta", ("token_classification", "token_classification")),
        ("t5", ("text2text_ner", "text2text_classification")),
    ],
)
def test_tasks_share_a_base(
    base: str, tasks: Sequence[str], request: pytest.FixtureRequest, files: Path, tmp_path: Path
) -> None:
    """Heads of 2, 3 and 1 outputs among them; members of one task share forwards."""
    folder = request.getfixturevalue(base)
    recipes = [
        changed(sections(folder, files, task), *STILL, "train.max_steps=2", f"lora.r={2 + i}")
        for i, task in enumerate(tasks)
    ]
    for i, result in enumerate(fit_jointly(recipes, tmp_path / "joint")):
        assert_alike(result.folder, fit(recipes[i], tmp_path / str(i)).folder)


def test_killed_members_go_on_each_from_its_own_step(bert: Path, files: Path, tmp_path: Path) -> None:
    words = (["train.checkpoint_every=2"], ["train.checkpoint_every=3", "lora.r=2"], ["train.max_steps=2"])
    recipes = [changed(sections(bert, files), *STILL, *some) for some in words]
    straight = fit_jointly(recipes, tmp_path / "straight")
    runs = runs_of(recipes, tmp_path / "killed")
    runs[0].report = stop_after(7)
    with pytest.raises(Stopped):
        fit_all(runs)
    again = runs_of(recipes, tmp_path / "killed")
    assert [run.start for run in again] == [6, 6, 2]
    for run, result, whole in zip(again, fit_all(again), straight, strict=True):
        assert isinstance(result, Result)
        assert_alike(run.folder, whole.folder)


def test_what_is_not_finite_ends_one_member_alone(bert: Path, files: Path, tmp_path: Path) -> None:
    raw = sections(bert, files)
    recipes = [changed(raw, *STILL, "train.max_steps=3", *some) for some in (["train.lr=1e30"], [])]
    wild, good = fit_all(runs_of(recipes, tmp_path / "joint"))
    assert isinstance(wild, NumericsError)
    assert isinstance(good, Result)
    assert_alike(good.folder, fit(recipes[1], tmp_path / "alone").folder)


def test_members_of_one_order_share_forwards_within_the_limit(
    bert: Path, files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = runs_of([changed(sections(bert, files), *STILL, f"lora.r={r}") for r in (1, 2, 3)], tmp_path)
    seen: list[list[int]] = []

    def spy(*arguments: object) -> object:
        seen.append([len(forward.parts) for forward in plan_forwards(*arguments)])  # type: ignore[arg-type]
        raise Stopped  # the first step's are enough

    monkeypatch.setattr(loop, "plan_forwards", spy)
    for tokens in (loop.FORWARD_TOKENS[True], 2 * 8 * 12, 1):  # 8 * 12: of a member's batch, at most
        monkeypatch.setattr(loop, "FORWARD_TOKENS", {True: tokens})
        with pytest.raises(Stopped):
            fit_all(runs)
    assert (seen[0], seen[2]) == ([3], [1, 1, 1])
    assert max(seen[1]) < 3


def test_memory_that_is_short_of_room_for_several_has_them_one_by_one(
    bert: Path, files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipes = [changed(sections(bert, files), *STILL, "train.max_steps=2", f"lora.r={r}") for r in (1, 2)]
    runs = runs_of(recipes, tmp_path / "joint")
    task = type(runs[0].prepared.task)
    losses = task.losses

    def limited(self: object, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled() and len(batch["input_ids"]) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return losses(self, model, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(task, "losses", limited)
    for run, result in zip(runs, fit_all(runs), strict=True):
        assert isinstance(result, Result)
        assert run.history.micro_batch_size is None  # each whole batch has room
        alone = fit(run.prepared.recipe, tmp_path / f"alone-{run.folder.name}")
        assert_alike(result.folder, alone.folder)


def test_members_share_a_model_only_where_they_can(bert: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = sections(bert, files)
    words = (
        [],
        ["train.method=full"],
        ["model.dropout=0", "lora.dropout=0"],
        ["model.quantize=int8"],
        ["train.seed=1"],
    )
    recipes = [changed(raw, *some) for some in words]
    events: list[Event] = []
    groups = groups_of(prepare_all(recipes, events.append))
    assert [list(group) for group in groups] == [[0, 4], [1], [2], [3]]
    assert sum(isinstance(event, Note) and "text is column" in event.text for event in events) == 2  # train, validation
    monkeypatch.setattr(joint, "MEMBERS_BYTES", 1)
    assert len(groups_of(prepare_all(recipes[::4]))) == 2


def test_a_recipe_that_cannot_be_leaves_the_others(bert: Path, files: Path) -> None:
    raw: Sections = sections(bert, files)
    wrong, good = prepare_all([changed(raw, "lora.target_modules=qery"), changed(raw)])
    assert isinstance(wrong, LorakitError)
    assert "query" in str(wrong)
    assert isinstance(good, Prepared)
