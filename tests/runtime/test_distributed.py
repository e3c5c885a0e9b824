"""Several ranks against one: shares, sums, errors, steps and answers, with threads in the place of processes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.training.prepare as prepare_module
from lorakit.errors import ConfigError, DataError, LorakitError, NumericsError, RankError
from lorakit.inference.answer import Most, predict_all
from lorakit.models import load_base
from lorakit.runtime.distributed import ALONE, Ranks
from lorakit.runtime.signals import ELSEWHERE, Stop
from lorakit.training.joint import prepare_all
from lorakit.training.loop import Member, train
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.schedule import make_optimizer, trained_parameters
from tests.runs import changed, sections

COSTS = ([5], [3, 3, 3], [100, 1, 1], [1, 1, 100], [7] * 8, [i * 7 % 20 + 1 for i in range(41)])


class ThreadRanks(Ranks):
    """A rank that is a thread: values lie on a shelf which all of them see."""

    def __init__(self, rank: int, shelf: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(shelf))
        self.shelf, self.barrier = shelf, barrier

    def gather(self, value: Any) -> list[Any]:
        self.shelf[self.rank] = value
        self.barrier.wait(timeout=30)
        values = list(self.shelf)
        self.barrier.wait(timeout=30)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        first, *others = self.gather(tensor.clone())
        return tensor.copy_(sum(others, first))


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank's work gives, or the failure that ended it."""
    shelf, barrier = [None] * size, threading.Barrier(size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadRanks(rank, shelf, barrier))
        except LorakitError as err:
            return err
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.fixture(scope="module")
def prepared(roberta: Path, files: Path) -> Prepared:
    """Sentences with very different numbers of targets."""
    raw = sections(roberta, files, "token_classification")
    return prepare(changed(raw, "model.dropout=0", "lora.dropout=0", "train.epochs=1", "train.micro_batch_size=3"))


def trained(prepared: Prepared, ranks: Ranks, spoil: Callable[[Ranks, nn.Module], None] = lambda *_: None) -> Any:
    """The steps of a whole training on a copy of the model, and the parameters it leaves."""
    model = copy.deepcopy(prepared.model)
    spoil(ranks, model)
    optimizer = make_optimizer(*trained_parameters(model), prepared.recipe.train)
    items = prepared.parts["train"].flat
    member = Member(prepared.task, items, optimizer, prepared.plan)
    steps = [step for steps in train(model, [member], ranks=ranks) for step in steps.values()]
    return steps, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# Shares


@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_share_cuts_into_about_equal_pieces(costs: Sequence[int]) -> None:
    for size in (1, 2, 3, 5):
        shares = [Ranks(rank, size).share(costs) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(len(costs)))
        assert max(sum(costs[i] for i in share) for share in shares) <= sum(costs) / size + max(costs)


# Values and errors


@pytest.mark.parametrize("size", [1, 3])
def test_values_are_the_same_on_every_rank(size: int) -> None:
    def work(ranks: Ranks) -> tuple[Any, ...]:
        given = ranks.first(lambda: f"from {ranks.rank}")
        return ranks.total(ranks.rank + 1), ranks.any(ranks.rank == size - 1), ranks.any(False), given

    assert on_ranks(size, work) == [(sum(range(1, size + 1)), True, False, "from 0")] * size


def test_together_ends_all_ranks_with_the_first_one_that_fails() -> None:
    def work(ranks: Ranks) -> None:
        with ranks.together():
            if ranks.rank in (1, 2):
                raise NumericsError(f"of {ranks.rank}")

    first, second, third, last = on_ranks(4, work)
    assert isinstance(second, NumericsError)
    for other in (first, third, last):
        assert isinstance(other, RankError)
        assert (str(other), other.exit_code) == ("rank 1: of 1", NumericsError.exit_code)
    with pytest.raises(DataError, match="alone"), ALONE.together():
        raise DataError("alone")


def test_copy_first_gives_every_rank_the_same_start() -> None:
    def work(ranks: Ranks) -> list[float]:
        tensors = [torch.full((2,), float(ranks.rank)), torch.tensor(ranks.rank + 5.0)]
        ranks.copy_first_(tensors)
        return [*tensors[0].tolist(), float(tensors[1])]

    assert on_ranks(3, work) == [[0.0, 0.0, 5.0]] * 3


def test_prepare_refuses_ranks_with_other_data(
    bert: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.csv"
    other.write_text((files / "train.csv").read_text() + "fresh,good\n")

    loading = threading.Lock()  # transformers takes things out of its classes while it loads, and puts them back

    def load(*args: Any, **options: Any) -> Any:
        with loading:
            return load_base(*args, **options)

    monkeypatch.setattr(prepare_module, "load_base", load)

    def work(ranks: Ranks) -> Any:
        word = [f"data.test={other}"] if ranks.rank else [f"data.test={files / 'train.csv'}"]
        return prepare(changed(sections(bert, files), *word), ranks=ranks)

    first, second = on_ranks(2, work)
    assert isinstance(first, ConfigError)
    assert "rank 1 has another recipe than rank 0" in str(first)
    assert isinstance(second, RankError)


# Steps


def test_steps_do_not_depend_on_the_number_of_ranks(prepared: Prepared) -> None:
    """The last batch has fewer examples than seven ranks."""
    steps, parameters = trained(prepared, ALONE)
    assert min(step.examples for step in steps) < 7 < max(step.examples for step in steps)
    found = on_ranks(7, lambda ranks: trained(prepared, ranks))
    for theirs, values in found:
        torch.testing.assert_close(values, parameters, atol=1e-6, rtol=1e-5)
        assert all(torch.equal(values[name], found[0][1][name]) for name in values)
        for step, alone in zip(theirs, steps, strict=True):
            assert vars(step) == pytest.approx(vars(alone), rel=1e-4)


def test_gradients_that_no_rank_has_stay_away() -> None:
    """Weight decay would move a parameter whose gradient is zero instead of none."""

    def work(ranks: Ranks) -> list[Any]:
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        parameters[0].grad = torch.full((2,), ranks.rank + 1.0)
        if ranks.rank:
            parameters[1].grad = torch.ones(2)
        loss = ranks.sum_gradients(parameters, torch.tensor(0.5))
        return [float(loss), *(None if p.grad is None else p.grad.tolist() for p in parameters)]

    assert on_ranks(2, work) == [[1.0, [3.0, 3.0], [1.0, 1.0], None]] * 2


def test_nan_on_one_rank_is_seen_by_all_before_the_step(prepared: Prepared) -> None:
    before = {name: p.detach().clone() for name, p in prepared.model.named_parameters()}
    models: dict[int, nn.Module] = {}

    def spoil(ranks: Ranks, model: nn.Module) -> None:
        models[ranks.rank] = model
        if ranks.rank == 1:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda grad: torch.full_like(grad, torch.nan))

    for steps, _ in on_ranks(2, lambda ranks: trained(prepared, ranks, spoil)):
        assert all(step.skipped for step in steps)
    for model in models.values():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# Answers


@pytest.mark.parametrize("size", [2, 3])
def test_answers_do_not_depend_on_the_number_of_ranks(
    prepared: Prepared, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.inference.answer.READ", Most(5, 5, 2048))
    items = prepared.parts["validation"].items
    alone = predict_all(prepared.model, prepared.task, items, prepared.device)
    models = [copy.deepcopy(prepared.model) for _ in range(size)]
    for found in on_ranks(size, lambda r: predict_all(models[r.rank], prepared.task, items, prepared.device, ranks=r)):
        pairs = [pair for own, theirs in zip(alone, found, strict=True) for pair in zip(own, theirs, strict=True)]
        assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_signal_to_one_rank_breaks_off_the_answers_of_all(prepared: Prepared) -> None:
    def work(ranks: Ranks) -> str:
        stop = Stop()
        if ranks.rank == 1:
            stop.signal = "SIGTERM"
        model = copy.deepcopy(prepared.model)
        with pytest.raises(KeyboardInterrupt):
            predict_all(
                model, prepared.task, prepared.parts["validation"].items, prepared.device, ranks=ranks, stop=stop
            )
        return stop.signal

    assert on_ranks(3, work) == [ELSEWHERE, "SIGTERM", ELSEWHERE]


def test_members_of_a_joint_run_learn_the_same_on_two_ranks(roberta: Path, files: Path) -> None:
    raw = sections(roberta, files, "token_classification")
    words = (["lora.r=2"], ["train.batch_size=5", "train.seed=1"])
    still = ("model.dropout=0", "lora.dropout=0", "train.epochs=1", "train.lr=1e-3")
    members = [
        member
        for member in prepare_all([changed(raw, *still, *some) for some in words])
        if isinstance(member, Prepared)
    ]

    def learned(ranks: Ranks) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(members[0].model)
        own = [trained_parameters(model, member.adapter) for member in members]
        joint = [
            Member(m.task, m.parts["train"].flat, make_optimizer(*both, m.recipe.train), m.plan, m.adapter, draws=False)
            for m, both in zip(members, own, strict=True)
        ]
        assert all(len(steps) for steps in train(model, joint, ranks=ranks))
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    alone = learned(ALONE)
    assert len({name.partition(".adapters.")[2].partition(".")[0] for name in alone}) == 2
    for found in on_ranks(2, learned):
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
