"""Two real processes over gloo: trained, sharded, resumed and failed in, with one start for all."""

from __future__ import annotations

import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before the fork: it takes seconds
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.app.api import train_recipe, train_recipes
from lorakit.errors import DataError, LorakitError, NumericsError
from lorakit.runtime.distributed import Ranks, joined
from lorakit.runtime.events import Event
from lorakit.training.prepare import prepare
from tests.runs import (
    Sections,
    changed,
    children,
    nearly,
    read_lines,
    sections,
    weights,
    without_pictures,
    without_timings,
)

RANKS = 2
COUNTED = ("accuracy", "macro_f1", "mcc", "f1", "best_step")  # scores that are shares of counts
STILL = ("model.dropout=0", "lora.dropout=0", "train.lr=2e-3", "train.micro_batch_size=3")


class Outcome(NamedTuple):
    """What one rank saw of one training."""

    events: int
    scores: dict[str, Any]
    error: str
    exit_code: int


def trained(raw: Sections, words: Sequence[str], resume: str | None = None) -> Outcome:
    """Train in this process, alone or as one of several."""
    events: list[Event] = []
    try:
        result = train_recipe(changed(raw, *words), report=events.append, resume=resume)
    except LorakitError as err:
        return Outcome(len(events), {}, f"{type(err).__name__}: {err}", err.exit_code)
    return Outcome(len(events), result.scores, "", 0)


TOGETHER = {"small": ["lora.r=2", "train.max_steps=3"], "other": ["train.seed=3", "lora.use_dora=true"]}


def together(raw: Sections, folder: Path) -> list[str]:
    """Train two members in one pass, as one of several processes; the errors."""
    recipes = [changed(raw, *STILL, *words, f"output.dir={folder / name}") for name, words in TOGETHER.items()]
    return [str(result) for result in train_recipes(recipes) if isinstance(result, LorakitError)]


def spoiled(raw: Sections, words: Sequence[str]) -> Outcome:
    """The same where the last rank finds a NaN in its gradient at each step but the first four."""
    original, steps = Ranks.sum_gradients, iter(range(1000))

    def sum_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        if next(steps) >= 4 and ranks.rank == RANKS - 1:
            parameters[0].grad = torch.full_like(parameters[0], math.nan)
        return original(ranks, parameters, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "sum_gradients", sum_gradients)
        return trained(raw, words)


def resumed(raw: Sections, words: Sequence[str], folder: Path) -> Outcome:
    """The run named dropout once more from its middle, a copy of what it left being kept."""
    if os.environ["RANK"] == "0":
        shutil.copytree(folder / "dropout", folder / "straight")
    return trained(raw, words, str(folder / "dropout" / "checkpoints" / "step-00000003"))


def held(raw: Sections, words: Sequence[str]) -> int:
    """How many numbers of the model a process holds."""
    with joined() as ranks:
        model = prepare(changed(raw, *words), ranks=ranks).model
        return sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())


Work = tuple[Callable[..., Any], Any]


def on_rank(rank: int, ports: Sequence[int], works: Sequence[Work]) -> list[Any]:
    """What the works of one process give, one after the other."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    results = []
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        for port, (function, *arguments) in zip(ports, works, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            results.append(function(*arguments))
            if dist.is_initialized():  # after a failure
                dist.destroy_process_group()
    return results


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        yield


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def raw(bert: Path, files: Path) -> Sections:
    """A recipe of five steps, evaluated and saved after the third and the last."""
    raw = sections(bert, files)
    raw["train"] |= {"epochs": 1, "eval_every": 3}
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(raw: Sections, folder: Path, alone: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
    """What each rank saw of each work, by its name; after the plain run, which has imported what they need."""
    works: dict[str, Work] = {
        "plain": (trained, raw, (*STILL, f"output.dir={folder / 'plain'}")),
        "sharded": (trained, raw, (*STILL, f"output.dir={folder / 'sharded'}", "train.shard_base=true")),
        "held": (held, raw, ("train.shard_base=true",)),
        "together": (together, raw, folder / "together"),
        "dropout": (trained, raw, (f"output.dir={folder / 'dropout'}",)),
        "resumed": (resumed, raw, (f"output.dir={folder / 'dropout'}",), folder),
        "spoiled": (spoiled, raw, (*STILL, f"output.dir={folder / 'spoiled'}")),
        "no data": (trained, raw, (f"output.dir={folder / 'none'}", f"data.test={folder / 'missing.csv'}")),
    }
    ports = free_ports(len(works))
    with children().Pool(RANKS) as pool:
        arguments = [(rank, ports, list(works.values())) for rank in range(RANKS)]
        found = pool.starmap_async(on_rank, arguments, chunksize=1).get(timeout=300)
    yield {name: list(outcomes) for name, *outcomes in zip(works, *found, strict=True)}


@pytest.fixture(scope="module")
def alone(raw: Sections, folder: Path) -> dict[str, Any]:
    """The scores of the plain run of one process."""
    return trained(raw, (*STILL, f"output.dir={folder / 'alone'}")).scores


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return nearly(without_timings(read_lines(run / "metrics.jsonl")), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_processes_train_what_one_does(
    seen: dict[str, list[Any]], alone: dict[str, Any], folder: Path, name: str
) -> None:
    torch.testing.assert_close(adapter(folder / name), adapter(folder / "alone"), atol=3e-6, rtol=1e-5)
    assert lines(folder / name) == lines(folder / "alone")
    for outcome in seen[name]:
        assert outcome.error == ""
        assert {key: outcome.scores[key] for key in COUNTED} == {key: alone[key] for key in COUNTED}
    files = {path.relative_to(folder / name) for path in (folder / name).rglob("*")}
    assert files == {path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*")}


@pytest.mark.parametrize("name", TOGETHER)
def test_member_trained_by_processes_learns_what_one_process_teaches_it_alone(
    seen: dict[str, list[Any]], raw: Sections, folder: Path, name: str
) -> None:
    assert seen["together"] == [[], []]
    trained(raw, (*STILL, *TOGETHER[name], f"output.dir={folder / 'solo' / name}"))
    places = (folder / "together" / name, folder / "solo" / name)
    torch.testing.assert_close(*map(adapter, places), atol=1e-6, rtol=1e-5)
    assert lines(places[0]) == lines(places[1])


def test_sharded_base_lies_on_each_process_in_part(seen: dict[str, list[Any]], raw: Sections) -> None:
    model = prepare(changed(raw)).model
    total = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.base_model.encoder.parameters() if not p.requires_grad)
    assert seen["held"] == [total - frozen // RANKS] * RANKS


def test_first_process_alone_reports(seen: dict[str, list[Any]]) -> None:
    for first, *others in seen.values():
        if isinstance(first, Outcome):
            assert first.events > 0
            assert [other.events for other in others] == [0] * (RANKS - 1)


def test_run_of_several_processes_resumes_bit_for_bit(seen: dict[str, list[Any]], folder: Path) -> None:
    """With dropout, which each process draws for itself."""
    assert seen["resumed"][0].error == ""
    assert weights(folder / "dropout") == weights(folder / "straight")
    last = "checkpoints/step-00000005/state.safetensors"
    assert (folder / "dropout" / last).read_bytes() == (folder / "straight" / last).read_bytes()


def test_nan_on_one_process_leaves_nothing_on_disk(seen: dict[str, list[Any]], folder: Path) -> None:
    first, second = seen["spoiled"]
    assert first.error.startswith("NumericsError: step 5: the loss is ")
    assert (first.exit_code, second.exit_code) == (NumericsError.exit_code,) * 2
    tensors = [load_file(path) for path in (folder / "spoiled").rglob("*.safetensors")]
    assert tensors
    assert all(value.isfinite().all() for of_file in tensors for value in of_file.values())


def test_mistake_is_told_by_one_process(seen: dict[str, list[Any]], folder: Path) -> None:
    first, second = seen["no data"]
    assert first.error.startswith(f"DataError: {folder / 'missing.csv'}: no such file")
    assert second.error.startswith("RankError: rank 0: ")
    assert (first.exit_code, second.exit_code) == (DataError.exit_code,) * 2
    assert not (folder / "none" / "recipe.toml").exists()
