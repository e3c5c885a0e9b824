"""The examples in the docstrings of what is public: each runs, and prints what it says."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lorakit
import lorakit.lora
from lorakit import recipe
from tests.runs import reviews, write_entities
from tests.tiny import tiny_bert


def public(module: ModuleType) -> dict[str, Any]:
    things = {name: getattr(module, name) for name in module.__all__}
    return {name: thing for name, thing in things.items() if inspect.isclass(thing) or inspect.isroutine(thing)}


def run(name: str, thing: Any, names: dict[str, Any]) -> int:
    """Run the examples of a thing and of its methods; returns their number."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = doctest.DocTestFinder().find(thing, name, module=False, globs=names)  # type: ignore[arg-type]
    printed: list[str] = []
    for test in tests:
        runner.run(test, out=printed.append)
    assert not runner.failures, "".join(printed)
    return sum(len(test.examples) for test in tests)


@pytest.mark.parametrize("name", public(lorakit.lora))
def test_lora(name: str, tmp_path: Path) -> None:
    thing = public(lorakit.lora)[name]
    batch = {"input_ids": torch.ones(3, 5, dtype=torch.long)}
    given = {"torch": torch, "model": tiny_bert(), "other_model": tiny_bert(), "batch": batch, "folder": tmp_path / "a"}
    assert run(name, thing, {**public(lorakit.lora), **given})


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert: Path, short_runs: None) -> dict[str, Any]:
    """What the examples of `lorakit` take for given: files, two runs and lists, with a tiny base for minilm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorakit.model_files._minilm", lambda: bert)
    for table in ("lorakit.task_info.TASKS", "lorakit.data.formats.FORMATS", "lorakit.data.formats.ENDINGS"):
        place, _, name = table.rpartition(".")
        monkeypatch.setattr(table, dict(getattr(import_module(place), name)))
    monkeypatch.setattr("lorakit.recipe.FORMATS", [*recipe.FORMATS])
    texts, labels = zip(*reviews(24), strict=True)
    labels = tuple({"good": "positive", "bad": "negative"}[label] for label in labels)
    lines = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    Path("reviews.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    write_entities(Path("notes.conll"), 16)
    lorakit.train(model="minilm", data="reviews.csv", epochs=1, folder="runs/reviews")
    lorakit.train(model="minilm", data="notes.conll", epochs=1, folder="runs/entities")
    lorakit.train(model="minilm", data="reviews.csv", task="embedding", epochs=1, folder="runs/search")
    sentences, tags = [["Ingrid", "left"], ["He", "left"]] * 8, [["B-PER", "O"], ["O", "O"]] * 8
    stars = [float(label == "positive") for label in labels]
    return {"lorakit": lorakit, "texts": texts, "labels": labels, "stars": stars, "sentences": sentences, "tags": tags}


def test_root(demo: dict[str, Any]) -> None:
    for name, thing in public(lorakit).items():
        assert run(name, thing, demo) > 0, name
