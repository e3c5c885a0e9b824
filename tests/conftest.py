"""Model folders, data files and trained runs, each made once for the whole session and only read by the tests."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("lorakit", deadline=None, max_examples=30)  # --hypothesis-profile=default: a hundred
settings.load_profile("lorakit")

N_TRAIN, N_VALIDATION = 36, 12  # with a batch of 8: four whole batches and a ragged one


def pytest_configure(config: pytest.Config) -> None:
    """Orders are random, seeds are not: a test seeds what it draws, and a library may not seed torch three times a test."""
    config.option.randomly_reset_seed = False


def pytest_collection_finish() -> None:
    """The garbage collector leaves alone what importing left, half a million objects that live as long as the tests.

    It looks less often at what comes later, modules that tests import for the most part.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """The hub's libraries answer from their caches alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def auto_dtype() -> Iterator[None]:
    """What model.dtype = "auto" takes does not depend on the machine: fp32, or what the environment's AUTO_DTYPE says.

    Tests of what depends on it take `each_auto_dtype`, which is first the one and then the other.
    """
    with pytest.MonkeyPatch.context() as patch:
        set_auto_dtype(patch, os.environ.get("AUTO_DTYPE", "fp32"))
        yield


@pytest.fixture(params=["fp32", "bf16"])
def each_auto_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The dtype that model.dtype = "auto" takes; bf16 is slow where the CPU has no units for it, so tiny runs only."""
    set_auto_dtype(monkeypatch, request.param)
    return str(request.param)


def set_auto_dtype(patch: pytest.MonkeyPatch, dtype: str) -> None:
    """Let this process find bf16 much faster than fp32, or slower."""
    patch.setattr("lorakit.runtime.device.bf16_gain", {"fp32": lambda: 0.5, "bf16": lambda: 5.0}[dtype])


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What is written is not pushed to the disk, an eighth of a tiny run's time; tests/faults has the disk fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_pairs() -> Iterator[None]:
    """Runs over few examples learn from few pairs, which take most of their time; test_contrast has as many as users have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorakit.training.head_start.EXAMPLES_PER_STEP", 100)
        patch.setattr("lorakit.training.head_start.STEPS_PER_LABEL", 1)
        yield


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe leaves open is little, for runs that need not be good: two epochs, two folds, no pictures and no report."""
    from lorakit.training import budget

    for name in ("TWO_LABELS", "ROWS"):
        monkeypatch.setattr(budget, name, tuple(row._replace(epochs=2) for row in getattr(budget, name)))
    monkeypatch.setattr("lorakit.training.parts.FOLDS", ((500, 2),))
    monkeypatch.setattr("lorakit.app.api.write_figures", lambda *arguments: None)
    monkeypatch.setattr("lorakit.app.api.write_report", lambda folder: (folder / "report.html").write_text("<p>"))


@pytest.fixture(scope="session", autouse=True)
def base_read_once() -> Iterator[None]:
    """Base models are copies of what was read first, a tenth of the tests' time; `base_read_anew` is for tests of reading."""
    from lorakit import models
    from tests.tiny import read_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_model", read_once(models._model))
        yield


@pytest.fixture
def base_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each base model is read from its files by transformers."""
    from lorakit import models

    monkeypatch.setattr(models, "_model", models._model.__wrapped__)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runs import save_bert

    return save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def sentence_bert(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """The same, with the file by which a sentence encoder says that a text is the mean over its tokens."""
    shutil.copytree(bert, folder := tmp_path_factory.mktemp("models") / "sentence-bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}'
    )
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, sentence_bert: Path) -> Path:
    """The same in the whole layout of sentence-transformers."""
    from tests.related import laid_out

    return laid_out(tmp_path_factory.mktemp("models") / "encoder", sentence_bert)


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of texts that belong together: pairs.csv, scores.csv and classes.csv."""
    from tests.related import save_related

    return save_related(tmp_path_factory.mktemp("related"))


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runs import save_roberta

    return save_roberta(tmp_path_factory.mktemp("models") / "roberta")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runs import save_t5

    return save_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train and validation files: .csv to classify, .ratings, .pairs, .choices, .conll with entities."""
    from tests.runs import write_choices, write_entities, write_pairs, write_ratings, write_reviews

    folder = tmp_path_factory.mktemp("data")
    for name, n, seed in (("train", N_TRAIN, 1), ("validation", N_VALIDATION, 2)):
        write_reviews(folder / f"{name}.csv", n, seed)
        write_ratings(folder / f"{name}.ratings.csv", n, seed)
        write_pairs(folder / f"{name}.pairs.csv", n, seed)
        write_choices(folder / f"{name}.choices.csv", n, seed)
        write_entities(folder / f"{name}.conll", n, seed)
    return folder


@pytest.fixture(scope="session")
def bert_run(tmp_path_factory: pytest.TempPathFactory, bert: Path, files: Path) -> Path:
    """A complete run folder of sequence classification."""
    return _complete_run(tmp_path_factory, bert, files, "sequence_classification")


@pytest.fixture(scope="session")
def tagger_run(tmp_path_factory: pytest.TempPathFactory, roberta: Path, files: Path) -> Path:
    """A complete run folder of token classification."""
    return _complete_run(tmp_path_factory, roberta, files, "token_classification")


@pytest.fixture(scope="session")
def t5_run(tmp_path_factory: pytest.TempPathFactory, t5: Path, files: Path) -> Path:
    """A complete run folder of text-to-text NER, short since random weights never end a sentence."""
    return _complete_run(tmp_path_factory, t5, files, "text2text_ner", "train.max_steps=3")


@pytest.fixture(scope="session")
def mean_run(tmp_path_factory: pytest.TempPathFactory, sentence_bert: Path, files: Path) -> Path:
    """A run of sequence classification by the mean over tokens, as all below without pictures and report."""
    words = ("train.lr=5e-3", "train.seed=1", "model.dropout=0.1")
    return _run(tmp_path_factory, sentence_bert, files, "sequence_classification", *words)


@pytest.fixture(scope="session")
def multi_label_run(tmp_path_factory: pytest.TempPathFactory, bert: Path, files: Path) -> Path:
    """A run of multi-label classification."""
    return _run(tmp_path_factory, bert, files, "multi_label_classification")


@pytest.fixture(scope="session")
def ordinal_run(tmp_path_factory: pytest.TempPathFactory, bert: Path, files: Path) -> Path:
    """A run of ordinal classification."""
    return _run(tmp_path_factory, bert, files, "ordinal_classification")


@pytest.fixture(scope="session")
def regression_run(tmp_path_factory: pytest.TempPathFactory, bert: Path, files: Path) -> Path:
    """A run of regression."""
    return _run(tmp_path_factory, bert, files, "sequence_regression")


def _complete_run(factory: pytest.TempPathFactory, base: Path, files: Path, task: str, *words: str) -> Path:
    from lorakit.app.report.architecture import write_figures
    from lorakit.app.report.page import write_report

    # the test that asks first may have taken away what writes pictures and report
    return _run(factory, base, files, task, *words, write_figures=write_figures, write_report=write_report)


def _run(
    factory: pytest.TempPathFactory, base: Path, files: Path, task: str, *words: str, **writers: Callable[..., object]
) -> Path:
    from lorakit.app import api
    from tests.runs import changed, sections, without_pictures

    folder = factory.mktemp("runs") / task
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        for name, writer in writers.items():
            patch.setattr(api, name, writer)
        return api.train_recipe(changed(sections(base, files, task), f"output.dir={folder}", *words)).folder


@pytest.fixture(scope="session")
def five_steps(bert: Path, files: Path) -> dict[str, dict[str, Any]]:
    """A recipe of 5 steps with dropout, evaluated at 3 and 5, a checkpoint after each second step."""
    from tests.runs import sections

    recipe = sections(bert, files)
    recipe["train"] |= {"eval_every": 3, "checkpoint_every": 2, "epochs": 1}
    return recipe


@pytest.fixture(scope="session")
def never_stopped(five_steps: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of them leaves that nothing interrupts."""
    from tests.faults.outcome import outcome
    from tests.runs import changed, fit

    folder = tmp_path_factory.mktemp("never-stopped")
    fit(changed(five_steps), folder)
    return outcome(folder)
