"""Many adapters over one base: the oracle is each adapter's own Predictor."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.data.example import Example
from lorakit.errors import AdapterError, DataError, OutputError
from lorakit.inference import answer
from lorakit.inference.adapter_pool import AdapterPool, Query, find_adapters
from lorakit.inference.predictor import load
from lorakit.inference.shared_base import SharedModel
from lorakit.lora import hosts
from lorakit.runtime.files import temporary_name
from tests.runs import BAD, GOOD, NEUTRAL, PEOPLE, PLACES, save_bert
from tests.shipped import ship

CLASSES = ("alpha", "beta", "gamma", "delta", "epsilon")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
MOST_OFF = 1e-5  # of probabilities


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    chance = random.Random(0)
    words = (*GOOD, *BAD, *NEUTRAL, *PEOPLE, *PLACES)
    return [" ".join(chance.choices(words, k=chance.randint(1, 14))) for _ in range(60)]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory, bert: Path, request: pytest.FixtureRequest) -> dict[str, Path]:
    """Adapters over one BERT that differ in rank, targets, variant, task and the width of the head."""
    folder = tmp_path_factory.mktemp("readers")
    one = ("sequence_classification", ("bad", "good"))
    return {
        "trained": request.getfixturevalue("bert_run"),
        "wide": ship(folder / "wide", bert, one[0], CLASSES, seed=1, r=2, target_modules="all-linear", use_rslora=True),
        "dora": ship(folder / "dora", bert, *one, seed=2, r=3, use_dora=True),
        "dora, other values": ship(folder / "dora-2", bert, *one, seed=12, r=3, use_dora=True),
        "high": ship(
            folder / "high", bert, *one, seed=3, r=8, lora_alpha=4, target_modules=("key", "intermediate.dense")
        ),
        "stars": request.getfixturevalue("ordinal_run"),
        "topics": request.getfixturevalue("multi_label_run"),
        "number": request.getfixturevalue("regression_run"),
    }


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory, sentence_bert: Path, mean_run: Path) -> dict[str, Path]:
    """Adapters whose classifiers read the mean over tokens, of different widths."""
    folder = tmp_path_factory.mktemp("means") / "wide"
    return {"trained": mean_run, "wide": ship(folder, sentence_bert, "multi_label_classification", CLASSES, seed=1)}


@pytest.fixture(scope="module")
def taggers(tmp_path_factory: pytest.TempPathFactory, roberta: Path, tagger_run: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("taggers")
    task = "token_classification"
    return {
        "trained": tagger_run,
        "crf": ship(folder / "crf", roberta, task, TAGS, seed=1, r=2, knobs={"crf": True}),
        "crf, other values": ship(folder / "crf-2", roberta, task, TAGS, seed=11, r=2, knobs={"crf": True}),
        "people": ship(folder / "people", roberta, task, TAGS[:3], seed=2, r=5, use_dora=True),
    }


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, t5: Path, t5_run: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("writers") / "classes"
    knobs = {"constrained": True}
    return {
        "trained": t5_run,
        "classes": ship(folder, t5, "text2text_classification", CLASSES, target_modules=("q", "v"), knobs=knobs),
    }


def mixed(names: Sequence[str], sentences: Sequence[str], n: int = 60) -> list[Query]:
    chance = random.Random(1)
    return [Query(chance.choice(names), Example(text)) for text in sentences[:n]]


def one_by_one(folders: Mapping[str, Path], queries: Sequence[Query]) -> list[dict[str, Any]]:
    answers: dict[int, dict[str, Any]] = {}
    for name, folder in folders.items():
        own = [i for i, each in enumerate(queries) if each.adapter == name]
        answers.update(zip(own, load(folder).predict([queries[i].example.text for i in own]), strict=True))
    return [answers[i] for i in range(len(queries))]


def assert_alike(a: Any, b: Any) -> None:
    """Equal but for rounding, however deep."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for inner in zip(a, b, strict=True):
            assert_alike(*inner)
    else:
        assert a == (pytest.approx(b, abs=MOST_OFF) if isinstance(b, float) else b)


# Answers


@pytest.mark.parametrize("kind", ["readers", "means", "taggers", "writers"])
def test_answers_of_a_mixed_batch_are_those_of_each_predictor(
    kind: str, request: pytest.FixtureRequest, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = request.getfixturevalue(kind)
    queries = mixed(list(folders), sentences, 12 if kind == "writers" else len(sentences))
    in_one: list[int] = []
    forward = answer._forward

    def counted(model: Any, rows: Sequence[answer.Row], device: torch.device) -> list[Any]:
        in_one.append(len({row.adapter.key for row in rows}))
        return forward(model, rows, device)

    monkeypatch.setattr(answer, "_forward", counted)
    with AdapterPool(folders) as pool:
        found = pool.answer(queries)
    monkeypatch.undo()
    assert_alike(found, one_by_one(folders, queries))
    assert max(in_one) == (1 if kind == "writers" else len(folders))


def test_kinds_of_models_over_one_quantised_base_share_its_weights(
    bert: Path, sentence_bert: Path, tmp_path: Path, sentences: list[str]
) -> None:
    kinds = {
        "labels": (bert, "sequence_classification", CLASSES),
        "means": (sentence_bert, "sequence_classification", ("bad", "good")),
        "tags": (bert, "token_classification", TAGS),
        "more tags": (bert, "token_classification", TAGS[:3]),
    }
    folders = {
        name: ship(tmp_path / name, base, task, labels, seed=seed, changes={"quantize": "nf4"})
        for seed, (name, (base, task, labels)) in enumerate(kinds.items())
    }
    queries = mixed(list(folders), sentences)
    with AdapterPool(folders) as pool:
        assert_alike(pool.answer(queries), one_by_one(folders, queries))
        models = {id(model): model for name in folders if (model := pool.in_memory(name).shared)}  # type: ignore[union-attr]
        assert len(models) == 3
        tensors = [dict(model._plain.base_model.named_parameters()) for model in models.values()]
        shared = set.intersection(*({id(tensor) for tensor in own.values()} for own in tensors))
        alone = [path for own in tensors for path, tensor in own.items() if id(tensor) not in shared]
        assert len(shared) > 30
        assert all(path.startswith(("pooler", "classifier")) for path in alone), alone


# Memory


def test_least_recently_used_adapters_make_room(readers: dict[str, Path], sentences: list[str]) -> None:
    names = list(readers)
    with AdapterPool(readers) as pool:
        size = max(pool.load(name).result().size for name in names)
    queries = [Query(name, Example(text)) for text in sentences[:3] for name in names]
    with AdapterPool(readers, limit_bytes=2 * size) as pool:
        found = pool.answer(queries)
        assert 0 < pool.size <= pool.limit_bytes
        assert pool.resident[-1] == names[-1]
        kept = {pool._resident[name].key for name in pool.resident}
        assert {key for _, host in hosts(pool.shared.model) for key in host.adapters} == kept
        pool.load(pool.resident[0]).result()
        first, *_ = pool.resident
        pool.load(names[0]).result()
        assert pool.resident[-1] == names[0]
        assert first not in pool.resident or pool.size <= pool.limit_bytes
    assert_alike(found, one_by_one(readers, queries))


def test_adapters_of_the_batch_in_hand_stay(readers: dict[str, Path]) -> None:
    with AdapterPool(readers) as pool:
        size = pool.load("trained").result().size
        pool.limit_bytes = 2 * size
        with pool.held(["trained", "dora", "high"]) as residents:
            assert set(residents) == set(pool.resident)
            held = {one.key for one in residents.values()}
            assert {key for _, host in hosts(pool.shared.model) for key in host.adapters} == held


def test_adapter_larger_than_the_limit_is_refused(readers: dict[str, Path]) -> None:
    with AdapterPool(readers, limit_bytes=100) as pool, pytest.raises(AdapterError, match="the limit is 100"):
        pool.load("dora").result()


# New versions


def test_new_version_of_a_folder_serves_after_a_refresh_and_none_is_mixed(
    bert: Path, tmp_path: Path, sentences: list[str]
) -> None:
    task, labels = "sequence_classification", ("bad", "good")
    versions = [ship(tmp_path / f"v{i}", bert, task, labels, seed=i, r=2 + i) for i in range(2)]
    served = tmp_path / "served"
    shutil.copytree(versions[0], served)
    queries = [Query("served", Example(text)) for text in sentences[:8]]
    with AdapterPool({"served": served}) as pool:
        by_version = []
        for version in versions:
            replace(served, version)
            pool.load("served").result()
            by_version.append(pool.answer(queries))
        assert by_version[0] != by_version[1]
        assert_alike(by_version[1], one_by_one({"served": versions[1]}, queries))
        assert pool.refresh() == {}
        seen: list[Any] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                seen.append(pool.answer(queries))

        asking = threading.Thread(target=ask)
        asking.start()
        for turn in range(6):
            replace(served, versions[turn % 2])
            for future in pool.refresh().values():
                future.result()
        done.set()
        asking.join()
        assert all(answer in by_version for answer in seen)
        assert len({key for _, host in hosts(pool.shared.model) for key in host.adapters}) == 1


def replace(folder: Path, other: Path) -> None:
    """One rename, as whatever writes adapters does it."""
    shutil.copytree(other, folder.with_name("next"))
    folder.rename(folder.with_name("before"))
    folder.with_name("next").rename(folder)
    shutil.rmtree(folder.with_name("before"))


def test_damaged_new_version_leaves_the_old_one_serving(readers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(readers["dora"], tmp_path / "dora")
    queries = [Query("dora", Example("a superb film"))]
    with AdapterPool({"dora": tmp_path / "dora"}) as pool:
        before = pool.answer(queries)
        weights = tmp_path / "dora" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(AdapterError, match="safetensors: damaged: "):
            pool.refresh()["dora"].result()
        assert pool.refresh() == {}  # it is not tried again until it changes
        assert pool.answer(queries) == before


def test_load_that_hangs_keeps_no_other_from_loading(readers: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    build, may = SharedModel.build, threading.Event()

    def slow(model: SharedModel, folder: Path) -> Any:
        if folder == readers["wide"]:
            may.wait(20)
        return build(model, folder)

    monkeypatch.setattr(SharedModel, "build", slow)
    with AdapterPool(readers, load_s=0.2) as pool:
        hanging = pool.load("wide")
        time.sleep(0.3)
        assert pool.load("dora").result(5).folder == readers["dora"]
        with pytest.raises(TimeoutError):
            pool.answer([Query("wide", Example("a film"))])
        may.set()
        with pytest.raises(AdapterError, match=r"not read within 0\.2 s"):
            hanging.result(5)
        assert pool.load("high").result(5).folder == readers["high"]
    assert set(pool.resident) == {"dora", "high"} or set(pool.resident) == {"dora", "high", "wide"}
    may.clear()
    begun = time.monotonic()
    with AdapterPool(readers, load_s=0.2) as pool:
        pool.load("wide")
    assert time.monotonic() - begun < 5
    may.set()


def test_error_of_any_kind_is_of_the_folder_that_causes_it(
    readers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: shutil.copytree(readers[name], tmp_path / name) for name in ("dora", "high", "wide")}
    with AdapterPool(folders) as pool:
        for name in folders:
            pool.load(name).result()
        for name, other in (("dora", "dora, other values"), ("wide", "wide")):
            replace(folders[name], readers[other])
        shutil.rmtree(folders["high"])
        build = SharedModel.build

        def failing(model: SharedModel, folder: Path) -> Any:
            if folder == folders["wide"]:
                raise ZeroDivisionError
            return build(model, folder)

        monkeypatch.setattr(SharedModel, "build", failing)
        loading = pool.refresh()
        with pytest.raises(ZeroDivisionError):
            loading["wide"].result()
        with pytest.raises(OutputError, match="no such run folder"):
            loading["high"].result()
        assert loading["dora"].result().key == pool.in_memory("dora").key  # type: ignore[union-attr]
        assert pool.refresh() == {}


# Refusals


def test_what_does_not_belong_beside_the_others_is_refused(
    readers: dict[str, Path], tagger_run: Path, bert: Path, tmp_path: Path
) -> None:
    one = ("sequence_classification", ("bad", "good"))
    other = save_bert(tmp_path / "other", seed=1)
    wrong = {
        "trained on another base model": ship(tmp_path / "a", other, *one),
        r"another base model \(.*roberta": tagger_run,
        "dtype = 'bf16'": ship(tmp_path / "b", bert, *one, changes={"dtype": "bf16"}),
        "a fully fine-tuned model": ship(tmp_path / "c", bert, *one, changes={"method": "full"}),
        "adapter differently": ship(
            tmp_path / "d", bert, *one, r=2, target_modules=("classifier",), modules_to_save=("pooler",)
        ),
        "outputs but no head": ship(tmp_path / "e", bert, one[0], CLASSES, modules_to_save=("pooler",)),
    }
    with AdapterPool({**readers, **wrong}) as pool:
        pool.load("trained").result()
        for message in wrong:
            with pytest.raises(AdapterError, match=message) as caught:
                pool.load(message).result()
            assert "\n" not in str(caught.value)
        assert pool.resident == ["trained"]


def test_unknown_adapters_are_refused(readers: dict[str, Path]) -> None:
    with AdapterPool(readers) as pool:
        with pytest.raises(DataError, match=r"no adapter 'dara'; did you mean 'dora'\?"):
            pool.answer([Query("dora", Example("a film")), Query("dara", Example("a film"))])
        with pytest.raises(DataError, match="no adapter 'x'; known: dora"):
            pool.load("x")


def test_find_adapters_names_runs_by_their_folders(readers: dict[str, Path], bert_run: Path, tmp_path: Path) -> None:
    assert find_adapters(readers["dora"].parent) == {name: readers[name] for name in ("dora", "high", "wide")} | {
        "dora-2": readers["dora, other values"]
    }
    assert find_adapters(bert_run / "adapter") == {bert_run.name: bert_run / "adapter"}
    for path in (
        tmp_path / "some" / "reviews",
        temporary_name(tmp_path / "some" / "half"),
    ):  # of which one is being written
        shutil.copytree(bert_run / "adapter", path)
    assert find_adapters(tmp_path / "some") == {"reviews": tmp_path / "some" / "reviews"}
    for path, message in ((tmp_path, "not a run, an adapter"), (tmp_path / "x", "no such folder")):
        with pytest.raises(OutputError, match=message):
            find_adapters(path)
